"""The losses under the keys of their papers, and what the catalogue says of all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from kdkernels.catalogue import ENTRIES, Entry
from kdkernels.catalogue.entry import CHAPTERS, KINDS
from kdkernels.checks import check_choice

__all__ = ["describe", "get", "names", "register"]

Loss = TypeVar("Loss", bound=type[nn.Module])

LOSSES: dict[str, type[nn.Module]] = {}


def register(key: str) -> Callable[[Loss], Loss]:
    """A class decorator: the loss is known by this key."""

    def keep(loss: Loss) -> Loss:
        if LOSSES.setdefault(key, loss) is not loss:
            raise ValueError(f"key {key!r} is that of {LOSSES[key].__name__} already")
        return loss

    return keep


def names(*, chapter: str | None = None, kind: str | None = None) -> list[str]:
    """The keys of the catalogue, in its order.

    Args:
        chapter: only those of this chapter: "blocks", "A", "A2", "B" to "I".
        kind: only those of this kind: "loss" (a class of ``kd.losses``, see ``get``), "arguments", "helper", "recipe" or
            "outside".
    """
    if chapter is not None:
        check_choice("chapter", chapter, tuple(CHAPTERS))
    if kind is not None:
        check_choice("kind", kind, tuple(KINDS))
    return [key for key, entry in ENTRIES.items() if chapter in {None, entry.chapter} and kind in {None, entry.kind}]


def describe(key: str) -> Entry:
    """What the catalogue says of a key: title, source, formula, lines that use it, cost, and how sure all that is.

    Raises:
        KeyError: there is no such key; the text lists those there are.
    """
    if key not in ENTRIES:
        raise KeyError(f"no objective is called {key!r}; there are {', '.join(ENTRIES)}")
    return ENTRIES[key]


def get(key: str) -> type[nn.Module]:
    """The class of a loss.

    Args:
        key: one of ``names(kind="loss")``.

    Raises:
        KeyError: there is no such key (the text lists those there are), or it has no class because it is something else:
            arguments, a helper, a recipe. The text then shows the lines that use it.
    """
    if key in LOSSES:
        return LOSSES[key]
    entry = describe(key)
    raise NoClassError(
        f"{key!r} has no class: it is {KINDS[entry.kind]}. Lines that use it, after those of kd.catalogue.PRELUDE:\n{entry.use}"
    )


class NoClassError(KeyError):
    """A KeyError whose text has several lines, and is shown as such."""

    def __str__(self) -> str:
        return str(self.args[0])
