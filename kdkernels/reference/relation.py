"""``relation_loss`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Relation
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.relations import Relations
from kdkernels.divergences import Divergence, ForwardKL
from kdkernels.reductions import reduce_rows
from kdkernels.reference import rows as reference

__all__ = ["loss", "relation_loss", "row_values"]


def relation_loss(
    student_left: Tensor,
    student_right: Tensor,
    teacher_left: Tensor | None = None,
    teacher_right: Tensor | None = None,
    divergence: Divergence = ForwardKL(),  # noqa: B008 - immutable
    *,
    score: str = "dot",
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    row_mask: Tensor | None = None,
    column_mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """See ``kdkernels.relation_loss``: same arguments, computed from scores ``[..., n, m]`` made whole."""
    relation = arguments.prepare_relation(
        (student_left, student_right, teacher_left, teacher_right),
        divergence,
        score=score,
        scales=(student_scale, teacher_scale),
        row_mask=row_mask,
        column_mask=column_mask,
        pair_mask=pair_mask,
        lengths=lengths,
        causal=causal,
        weight=weight,
        labels=labels,
        ce_weight=ce_weight,
        reduction=reduction,
    )
    with autocast_disabled(student_left.device.type):
        return loss(relation)


def loss(relation: Relation) -> Tensor:
    """The loss of checked arguments."""
    values = row_values(relation.relations)
    total = relation.total
    value = values[0] * total.divergence_scale
    if len(values) > 1:
        value = value + total.cross_entropy_scale * values[1]
    return reduce_rows(value, relation.problem, total)


def row_values(relations: Relations) -> list[Tensor]:
    """The divergence ``[P n]`` and, where there are labels, the cross-entropy; differentiable any number of times."""
    problems, rows, columns = relations.shape
    spec, masks = relations.spec, relations.masks

    def scores(left: Tensor, right: Tensor, scale: float) -> Tensor:
        left, right = left.to(relations.dtype), right.to(relations.dtype)
        if spec.active is not None:
            left = left.masked_fill(~spec.active.view(problems, rows, 1), 0)
        if masks.columns is not None:
            right = right.masked_fill(~masks.columns.unsqueeze(-1), 0)
        found = scale * (left @ right.mT)
        masks.hide(found, slice(0, problems), slice(0, rows))
        return found.reshape(problems * rows, columns)

    student = scores(relations.student_left, relations.student_right, relations.student_scale)
    if relations.teacher_left is None or relations.teacher_right is None:
        divergence = torch.zeros_like(student[:, 0])
    else:
        teacher = scores(relations.teacher_left, relations.teacher_right, relations.teacher_scale)
        divergence = reference.divergence(student, teacher, spec)
    if spec.labels is None:
        return [divergence]
    return [divergence, reference.cross_entropy(student, spec, divergence.dtype)]
