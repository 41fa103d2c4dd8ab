"""The family head_mass on the CPU."""

from __future__ import annotations

from torch import Tensor

from kdkernels.backends.compiled.divergence import sides_arguments
from kdkernels.backends.cpu.launching import LIBRARY, address, module
from kdkernels.backends.head_mass import empty
from kdkernels.backends.rows import RowSpec

__all__ = ["head_mass"]


def head_mass(teacher: Tensor, student: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    thresholds, gaps = empty(teacher, student)
    # The kernel has the sides in the order that all kernels have them; without a student that side is not read.
    module().head_mass(
        *sides_arguments(LIBRARY, teacher if student is None else student, teacher, spec),
        spec.a,
        address(spec.parameters),
        spec.b != 0,
        thresholds.data_ptr(),
        0 if student is None else gaps.data_ptr(),
    )
    return thresholds, gaps
