"""What every family needs to call the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import native
from kdkernels.backends.rows import Composition

__all__ = ["DTYPES", "FLOAT64", "address", "composition", "module", "status", "supports"]

FLOAT64 = 3

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: FLOAT64}


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


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def composition(parts: Composition | None) -> Any:
    """What the kernels are told about a composition whose sources are logits; None: nothing."""
    if parts is None:
        return None
    others = [
        (other.tensor.data_ptr(), other.tensor.stride(0), DTYPES[other.tensor.dtype], other.softcap)
        for other in parts.others
    ]
    columns = parts.columns
    return module().Composition(
        others,
        address(parts.coefficients),
        address(parts.offsets),
        address(parts.class_bias),
        address(parts.bounds),
        0 if columns is None else columns.shape[1],
        address(columns),
        address(parts.values),
    )
