"""The losses under the keys of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["get", "names", "register"]

Loss = TypeVar("Loss", bound=type[nn.Module])

LOSSES: dict[str, type[nn.Module]] = {}


def register(key: str) -> Callable[[Loss], Loss]:
    """A class decorator: the loss is known by this key."""

    def keep(loss: Loss) -> Loss:
        if LOSSES.setdefault(key, loss) is not loss:
            raise ValueError(f"key {key!r} is that of {LOSSES[key].__name__} already")
        return loss

    return keep


def names() -> list[str]:
    """The keys of all losses, in order."""
    return sorted(LOSSES)


def get(key: str) -> type[nn.Module]:
    """The class of a loss.

    Args:
        key: one of ``names()``.

    Raises:
        KeyError: there is no such loss; the text lists those there are.
    """
    if key not in LOSSES:
        raise KeyError(f"no loss is called {key!r}; there are {', '.join(names())}")
    return LOSSES[key]
