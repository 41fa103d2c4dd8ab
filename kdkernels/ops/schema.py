"""The part of an operator's schema that says how rows are read, and its way back into a ``RowSpec``."""

from __future__ import annotations

from kdkernels.backends.rows import RowSpec

__all__ = ["SPEC", "spec_gradients"]

SPEC = (
    "int kind, float a, float b, float student_temperature, Tensor? student_temperatures, float teacher_temperature, "
    "Tensor? teacher_temperatures, float student_softcap, float teacher_softcap, Tensor? labels, Tensor? active"
)
"""The fields of ``RowSpec`` in their order; an operator takes them unpacked."""


def spec_gradients() -> tuple[None, ...]:
    """Autograd's answer for these arguments: none of them has a gradient."""
    return (None,) * len(RowSpec._fields)
