"""Which backend serves a tensor here, and why not the others.

``reference`` is plain PyTorch, ``cpu`` the native C++ kernels, ``triton`` the GPU kernels (and Triton's interpreter on CPU
tensors), ``cuda`` the GPU kernels in CUDA C++. Each of the last three is a row backend, see ``kdkernels.backends.rows``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any, NamedTuple

__all__ = ["BackendStatus", "able", "backends", "row_backend", "select", "serves"]

NAMES = ("reference", "cpu", "triton", "cuda")
BEST = {"cpu": ("cpu",)}
BEST_ELSEWHERE = ("triton", "cuda")
"""The backends with kernels for a type of device, best first. No order of the last two has been measured: Triton has every
family."""
HAVE_TOTAL = ("cpu",)
"""The row backends with a ``divergence_total``."""
HAVE_LISTS = ("cpu",)
"""The row backends whose fused functions take ``lists``, see ``gradient_entries``."""
HAVE_LOGITS_FREE_HEADS = ("triton",)
"""The row backends with a ``linear_divergence`` that never writes logits, where ``linear_divergence_applies``."""
HAVE_RELATION = ("cpu",)
"""The row backends with a kernel for whole ``relations``, where ``relation_applies`` to them."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used in this process."""

    name: str
    available: bool
    reason: str
    """What it runs on, or why it is not available."""


@functools.cache
def status(name: str) -> BackendStatus:
    if name == "reference":
        return BackendStatus(name, True, "plain PyTorch, on any device")
    return BackendStatus(name, *row_backend(name).status())


def backends() -> dict[str, BackendStatus]:
    """Every backend by name: whether it is available here and, if not, the reason."""
    return {name: status(name) for name in NAMES}


@functools.cache
def row_backend(name: str) -> Any:
    """The module of a row backend; it imports without what the backend needs."""
    return importlib.import_module(f"kdkernels.backends.{name}")


@functools.cache
def warn_fallback(name: str, reason: str) -> None:
    warnings.warn(f"kdkernels falls back to plain PyTorch: the {name} backend is not available, {reason}", stacklevel=2)


def serves(name: str, family: str) -> tuple[bool, str]:
    """Whether a backend has kernels of a family, and the reason why not."""
    families = getattr(row_backend(name), "FAMILIES", None) if name != "reference" else None
    if families is None or family in families:
        return True, ""
    return False, f"it has no kernel for {family} (it has {', '.join(families)})"


def select(requested: str | None, device: str, family: str = "divergence") -> str:
    """The backend for tensors on a device of this type: the one requested, or the best that has the family.

    Raises:
        TypeError, ValueError: ``backend`` is not the name of one, or it does not serve the device or the family.
        RuntimeError: the backend requested by name is not available here.
    """
    if requested is not None and not isinstance(requested, str):
        raise TypeError(f"backend must be None or one of {', '.join(NAMES)}, got {requested!r}")
    return choose(requested, device, family)


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes longer than all the rest.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def able(device: str, family: str) -> tuple[tuple[str, ...], str]:
    """The backends that have the family for a type of device, best first, and why the best of all is not among them."""
    names, reasons = [], []
    for name in BEST.get(device, BEST_ELSEWHERE):
        usable, reason = row_backend(name).supports(device)
        if usable:
            usable, reason = serves(name, family)
        if usable:
            names.append(name)
        reasons.append("" if usable else reason)
    return tuple(names), reasons[0]


@functools.cache
def choose(requested: str | None, device: str, family: str) -> str:
    if requested is None:
        names, reason = able(device, family)
        if names:
            return names[0]
        warn_fallback(BEST.get(device, BEST_ELSEWHERE)[0], reason)
        return "reference"
    if requested not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(NAMES)}, got {requested!r}")
    if not status(requested).available:
        raise RuntimeError(f"backend={requested!r} is not available: {status(requested).reason}")
    if requested != "reference":
        supported, reason = row_backend(requested).supports(device)
        if not supported:
            raise ValueError(f"backend={requested!r} cannot be used here: {reason}")
        served, reason = serves(requested, family)
        if not served:
            raise ValueError(
                f"backend={requested!r} cannot be used here: {reason}; leave backend at None, which takes one that has it"
            )
    return requested
