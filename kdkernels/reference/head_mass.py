"""``mass_threshold`` and ``head_tail_gap`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import HeadProblem
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import Side, compute_dtype, row_temperature
from kdkernels.reference.rows import effective_logits, side_logits
from kdkernels.sources import Source

__all__ = ["head_mass_rows", "head_tail_gap", "mass_threshold"]


def mass_threshold(
    source: Source,
    mass: float | Tensor,
    *,
    crossing: bool = False,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """See ``kdkernels.mass_threshold``: same arguments, computed by sorting whole ``[N, V]`` tensors."""
    problem = arguments.prepare_mass_threshold(
        source, mass, crossing=crossing, temperature_of=temperature, vocab_size=vocab_size
    )
    return head_mass_rows(problem)[0].reshape(problem.batch_shape)


def head_tail_gap(
    student: Source,
    teacher: Source,
    mass: float | Tensor = 0.5,
    *,
    crossing: bool = False,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``kdkernels.head_tail_gap``: same arguments, computed by sorting whole ``[N, V]`` tensors."""
    problem = arguments.prepare_head_tail_gap(
        student,
        teacher,
        mass,
        crossing=crossing,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        vocab_size=vocab_size,
    )
    head, tail = head_mass_rows(problem)[1].unbind(-1)
    return head.reshape(problem.batch_shape), tail.reshape(problem.batch_shape)


@torch.no_grad()
def head_mass_rows(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    """``(thresholds [N], gaps [N, 2] or [0, 2])`` of a checked problem."""
    teacher, student, _, spec = problem
    dtype = compute_dtype(teacher.tensor, None if student is None else student.tensor)

    def probabilities(side: Side, softcap: float, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        logits = effective_logits(side_logits(side, spec.active), softcap, dtype)
        return logits, torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)

    with autocast_disabled(teacher.tensor.device.type):
        tau = row_temperature(spec.teacher_temperature, spec.teacher_temperatures)
        logits, p = probabilities(teacher, spec.teacher_softcap, tau)
        thresholds = threshold_by_sorting(
            logits, p, spec.a if spec.parameters is None else spec.parameters, spec.b != 0
        )
        gaps = thresholds.new_empty(0, 2)
        if student is not None:
            tau = row_temperature(spec.student_temperature, spec.student_temperatures)
            gap = (p - probabilities(student, spec.student_softcap, tau)[1]).abs()
            head = logits >= thresholds.unsqueeze(-1)
            gaps = torch.stack([gap.masked_fill(~head, 0).sum(-1), gap.masked_fill(head, 0).sum(-1)], -1)
            gaps = torch.where(thresholds.isnan().unsqueeze(-1), thresholds.unsqueeze(-1), gaps)
    if spec.active is not None:
        thresholds = thresholds.masked_fill(~spec.active, 0)
        gaps = gaps.masked_fill(~spec.active.unsqueeze(-1), 0) if student is not None else gaps
    return thresholds, gaps


def threshold_by_sorting(logits: Tensor, probabilities: Tensor, mass: float | Tensor, crossing: bool) -> Tensor:
    """The lowest logit ``[N]`` of the head of logits ``[N, V]``."""
    falling, order = logits.sort(-1, descending=True)
    mass_until = probabilities.gather(-1, order).double().cumsum(-1)
    # Of equal logits the last says what all of them hold.
    last = torch.ones_like(falling, dtype=torch.bool)
    last[..., :-1] = falling[..., :-1] > falling[..., 1:]
    target = torch.as_tensor(mass, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    inside = last & ((mass_until <= target) | (target >= 1))
    inside |= falling == falling[..., :1]
    found = falling.masked_fill(~inside, torch.inf).amin(-1)
    if crossing:
        head = logits >= found.unsqueeze(-1)
        held = probabilities.double().masked_fill(~head, 0).sum(-1, keepdim=True)
        following = logits.masked_fill(head, -torch.inf).amax(-1)
        found = torch.where((held < target).squeeze(-1) & (following > -torch.inf), following, found)
    return torch.where(probabilities.sum(-1).isfinite(), found, torch.nan)
