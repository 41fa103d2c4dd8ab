"""What every family needs to call the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.backends import native
from kdkernels.backends.compiled.library import DTYPES, FLOAT64, Library, address

__all__ = ["DTYPES", "FLOAT64", "LIBRARY", "address", "module", "status", "supports"]


def status() -> tuple[bool, str]:
    """Whether the backend can be used, and its instruction set or the reason why not."""
    if native.module is None:
        return False, native.reason
    try:
        return True, f"instruction set {native.module.isa()}, {torch.get_num_threads()} threads"
    except RuntimeError as error:
        return False, str(error)


def supports(device: str) -> tuple[bool, str]:
    """Whether the backend takes tensors on a device of this type, and the reason why not."""
    available, reason = status()
    if not available:
        return False, reason
    return device == "cpu", f"the cpu backend takes cpu tensors, and these are on {device}"


def module() -> Any:
    if native.module is None:
        raise RuntimeError(f"the cpu backend is not available: {native.reason}")
    return native.module


LIBRARY = Library(module, lambda tensor: torch.get_num_threads())
"""The kernels, on as many threads as torch uses."""
