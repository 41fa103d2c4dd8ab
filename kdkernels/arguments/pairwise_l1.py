"""The arguments of ``pairwise_l1``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.arguments.rows import check_same_device, check_same_vocab, side
from kdkernels.backends.rows import PairSpec, Side, Tempering, compute_dtype
from kdkernels.checks import check_real
from kdkernels.sources import Source

__all__ = ["Pairs", "prepare_pairs"]


class Pairs(NamedTuple):
    """Two sources of which every row of one meets every row of the other."""

    student: Side
    teacher: Side
    batch_shape: torch.Size
    """Of the problems."""
    dtype: torch.dtype
    """The compute type."""
    spec: PairSpec


def prepare_pairs(
    student: Source,
    teacher: Source,
    *,
    temperature: float,
    teacher_temperature: float | None,
    vocab_size: int | None,
) -> Pairs:
    """Checks the arguments of ``pairwise_l1``."""
    student_side, shape, vocab = side("student", student, vocab_size)
    teacher_side, teacher_shape, teacher_vocab = side("teacher", teacher, vocab_size)
    for name, rows in (("student", shape), ("teacher", teacher_shape)):
        if not rows:
            raise ValueError(f"{name} must have rows to pair, shape [..., rows, V] or an LMHead of [..., rows, H]")
    if shape[:-1] != teacher_shape[:-1]:
        raise ValueError(
            f"student and teacher must have the same batch: the student's has the shape {tuple(shape[:-1])}, "
            f"the teacher's {tuple(teacher_shape[:-1])}"
        )
    check_same_vocab(vocab, teacher_vocab)
    check_same_device(student_side, teacher_side)
    tau = check_real("temperature", temperature, positive=True)
    teacher_tau = tau
    if teacher_temperature is not None:
        teacher_tau = check_real("teacher_temperature", teacher_temperature, positive=True)
    batch = shape[:-1]
    spec = PairSpec(
        batch.numel(),
        shape[-1],
        teacher_shape[-1],
        Tempering(tau, student_side.softcap),
        Tempering(teacher_tau, teacher_side.softcap),
    )
    return Pairs(student_side, teacher_side, batch, compute_dtype(student_side.tensor, teacher_side.tensor), spec)
