"""An extension module of C++ kernels, and how it is told about tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.backends.rows import Composition

__all__ = ["DTYPES", "FLOAT64", "Library", "address", "composition"]

FLOAT64 = 3

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: FLOAT64}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def composition(parts: Composition | None) -> tuple[Any, ...] | None:
    """What the kernels are told about a composition whose sources are logits; None: nothing."""
    if parts is None:
        return None
    others = [
        (other.tensor.data_ptr(), other.tensor.stride(0), DTYPES[other.tensor.dtype], other.softcap)
        for other in parts.others
    ]
    columns = parts.columns
    return (
        others,
        address(parts.coefficients),
        address(parts.offsets),
        address(parts.class_bias),
        address(parts.bounds),
        0 if columns is None else columns.shape[1],
        address(columns),
        address(parts.values),
    )


class Library(NamedTuple):
    """The kernels of one backend. They read and write memory that its tensors own."""

    module: Callable[[], Any]
    """The extension; raises RuntimeError if it is not there."""
    place: Callable[[Tensor], Any]
    """Where kernels run that work on a tensor, as the extension takes it: threads, or a device and its stream."""
