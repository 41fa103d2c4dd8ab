"""The family head_mass in Triton."""

from __future__ import annotations

from torch import Tensor

from kdkernels.backends.head_mass import empty
from kdkernels.backends.rows import RowSpec
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch, row_arguments

__all__ = ["head_mass"]


def head_mass(teacher: Tensor, student: Tensor | None, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """(thresholds [N], gaps [N, 2] or [0, 2])."""
    rows, vocab_size = teacher.shape
    thresholds, gaps = empty(teacher, student)
    launch = prepare_launch(teacher, student, kernel="head_mass")
    if rows:
        with on_device_of(teacher, "head_mass"):
            load_kernels().head_mass.head_mass_kernel[(rows,)](
                teacher,
                student,
                launch.stride(teacher),
                launch.stride(student),
                vocab_size,
                spec.parameters,
                spec.a,
                thresholds,
                gaps,
                **row_arguments(spec),
                CROSSING=spec.b != 0,
                **launch.options,
            )
    return thresholds, gaps
