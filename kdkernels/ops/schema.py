"""The part of an operator's schema that says how rows are read: a ``RowSpec`` on its way in and back out.

Numbers that may change from step to step go in as tensors. Under ``torch.compile`` a float argument of an operator is a
constant, and every new value of it would compile the whole graph anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec

__all__ = ["SPEC", "TAGS", "as_numbers", "has_labels", "pack_spec", "spec_gradients", "unpack_spec"]

SPEC = (
    "int kind, Tensor numbers, Tensor? student_temperatures, Tensor? teacher_temperatures, Tensor? labels, Tensor? active, "
    "Tensor? gradient_seed"
)

# Kernels are launched with numbers read on the host, which a captured CUDA graph would keep for ever.
TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def as_numbers(values: Sequence[float]) -> Tensor:
    """A float64 tensor on the CPU; in a compiled graph, products of a constant, which is what keeps the values variable."""
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


def pack_spec(spec: RowSpec) -> tuple[Any, ...]:
    """The arguments of ``SPEC``."""
    numbers = as_numbers(
        (
            spec.a,
            spec.b,
            spec.student_temperature,
            spec.teacher_temperature,
            spec.student_softcap,
            spec.teacher_softcap,
            spec.gradient_tolerance,
        )
    )
    tensors = spec.student_temperatures, spec.teacher_temperatures, spec.labels, spec.active, spec.gradient_seed
    return spec.kind, numbers, *tensors


def unpack_spec(packed: Sequence[Any]) -> RowSpec:
    """The specification from the arguments of ``SPEC``."""
    kind, numbers, student_temperatures, teacher_temperatures, labels, active, gradient_seed = packed
    a, b, student_temperature, teacher_temperature, student_softcap, teacher_softcap, tolerance = numbers.tolist()
    return RowSpec(
        kind,
        a,
        b,
        student_temperature,
        student_temperatures,
        teacher_temperature,
        teacher_temperatures,
        student_softcap,
        teacher_softcap,
        labels,
        active,
        tolerance,
        gradient_seed,
    )


def has_labels(packed: Sequence[Any]) -> bool:
    """The same question as ``unpack_spec(packed).labels is not None``, which a graph in the making may ask."""
    return packed[4] is not None


def spec_gradients() -> tuple[None, ...]:
    """Autograd's answer for these arguments: none of them has a gradient."""
    return (None,) * 7
