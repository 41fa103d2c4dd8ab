"""The family sparse_divergence in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.rows import RowSpec, compute_dtype
from kdkernels.backends.sparse_rows import Policy, SparseRows, entries
from kdkernels.backends.triton.launching import load_kernels, on_device_of, prepare_launch
from kdkernels.backends.triton.records import unpack_records

__all__ = ["sparse_divergence_fused"]


def sparse_divergence_fused(
    student: Tensor,
    teacher: SparseRows,
    spec: RowSpec,
    grad_divergence: Tensor | None,
    grad_cross_entropy: Tensor | None,
    grad_student: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The values and, where `grad_student` is given, the gradient: two launches."""
    rows, vocab_size = student.shape
    kernels = load_kernels().sparse_divergence
    divergence = torch.empty(rows, dtype=compute_dtype(student, None), device=student.device)
    cross_entropy = divergence.new_empty(0 if spec.labels is None else rows)
    if not rows:
        return divergence, cross_entropy
    found = entries(teacher.unpacked(vocab_size, unpack_records), spec, vocab_size, divergence.dtype)
    ids = found.ids.masked_fill(found.ids >= vocab_size, kernels.NO_ID.value).int()
    count = ids.shape[1]
    statistics = divergence.new_empty(rows, kernels.STATISTICS.value)
    gathered, terms = torch.empty_like(found.values), torch.empty_like(found.values)
    entropy = teacher.constants if teacher.policy == Policy.SAMPLED else None
    launch = prepare_launch(student, kernel="sparse_divergence_forward")
    student_arguments = {
        "labels": spec.labels,
        "active": spec.active,
        "student_temperatures": spec.student_temperatures,
        "student_temperature": spec.student_temperature,
        "student_softcap": spec.student_softcap,
        "HAS_STUDENT_CAP": spec.student_softcap != 0,
        "COMPUTE": launch.compute,
    }
    with on_device_of(student, "sparse_divergence"):
        kernels.sparse_divergence_forward_kernel[(rows,)](
            student,
            launch.stride(student),
            vocab_size,
            ids,
            found.values.contiguous(),
            found.log_tail.contiguous(),
            None if entropy is None else entropy.to(divergence.dtype),
            count,
            divergence,
            None if spec.labels is None else cross_entropy,
            statistics,
            gathered,
            terms,
            **student_arguments,
            a=spec.a,
            parameters=spec.parameters,
            b=spec.b,
            KIND=spec.kind,
            POLICY=teacher.policy,
            FAST_LOG=launch.fast_log,
            UNROLL=launch.unroll,
            LANES=launch.lanes,
            WIDTH=launch.width,
            num_warps=launch.num_warps,
        )
        if grad_student is not None and grad_divergence is not None:
            launch = prepare_launch(student, grad_student, kernel="sparse_divergence_backward")
            kernels.sparse_divergence_backward_kernel[(rows,)](
                student,
                grad_student,
                launch.stride(student),
                launch.stride(grad_student),
                vocab_size,
                ids,
                count,
                statistics,
                gathered,
                terms,
                grad_divergence.contiguous(),
                None if grad_cross_entropy is None else grad_cross_entropy.contiguous(),
                **student_arguments,
                TILE=launch.unroll * launch.lanes * launch.width,
                REST_TILE=launch.lanes * launch.width,
                LANES=launch.lanes,
                WIDTH=launch.width,
                num_warps=launch.num_warps,
            )
    return divergence, cross_entropy
