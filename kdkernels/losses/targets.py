"""Targets made from a teacher's logits and the labels, as mixtures that kernels form while they read."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.functional.token_statistics import token_statistics
from kdkernels.losses.sequences import IGNORED
from kdkernels.sources import LogitMixture, Source

__all__ = ["label_mixed", "swapped_with_label"]


@torch.no_grad()
def label_mixed(
    teacher: Source,
    labels: Tensor,
    label_weight: float | Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> LogitMixture:
    """The target ``label_weight e_y + (1 - label_weight) softmax(teacher / temperature)``, as logits at that temperature.

    Only the label's logit changes, to ``temperature log(exp(t_y / temperature) + w / (1 - w) sum exp(t / temperature))``;
    a weight of 1 stands for the largest finite one.

    Args:
        teacher: logits or a head; ``labels``: ids ``[...]``, -100 where there is none and the target is the teacher.
        label_weight: between 0 and 1, a number, 0-d or ``[...]``.
        temperature: that the loss takes the target at.
        backend: of the kernels.
    """
    known = token_statistics(teacher, None, labels, temperature=temperature, backend=backend)
    assert known.label_log_prob_student is not None
    log_y, lse = known.label_log_prob_student, known.lse_student
    weight = torch.as_tensor(label_weight, dtype=lse.dtype, device=lse.device)
    odds = torch.logit(weight, eps=torch.finfo(lse.dtype).eps)
    value = temperature * (lse + torch.logaddexp(log_y, odds.expand_as(log_y)))
    value = torch.where(weight == 0, temperature * (lse + log_y), value)
    return LogitMixture([teacher], replaced_ids=labels.long().masked_fill(labels == IGNORED, -1), replacements=value)


@torch.no_grad()
def swapped_with_label(teacher: Source, labels: Tensor, *, backend: str | None = None) -> LogitMixture:
    """The teacher's logits where those of the label ``[...]`` and of the largest are exchanged; -100: no label, no exchange."""
    known = token_statistics(teacher, None, labels, backend=backend)
    assert known.label_log_prob_student is not None
    label_logit = known.lse_student + known.label_log_prob_student
    ids = torch.stack([known.argmax_student, labels.long()], -1)
    values = torch.stack([label_logit, known.max_student], -1)
    return LogitMixture(
        [teacher], replaced_ids=ids.masked_fill((labels == IGNORED).unsqueeze(-1), -1), replacements=values
    )
