"""The arguments of ``relation_loss``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.arguments.divergence import REDUCTIONS, Total
from kdkernels.arguments.rows import REAL_DTYPES, Problem, active_rows, per_token
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.relations import Masks, Relations
from kdkernels.backends.rows import RowSpec, Side
from kdkernels.checks import check_choice, check_dense, check_flag, check_floating, check_integral, check_real
from kdkernels.debugging import values_are_checked
from kdkernels.divergences import TVD, Divergence

__all__ = ["Relation", "prepare_relation"]

IGNORED = -100
"""The label of rows that do not count."""

SCORES = ("dot", "cosine", "sqeuclidean")


class Relation(NamedTuple):
    """Relations, and how their rows become the result."""

    relations: Relations
    problem: Problem
    """The student's rows ``[P n, d]``."""
    total: Total


def check_side(name: str, left: Any, right: Any) -> None:
    for half, tensor in (("left", left), ("right", right)):
        check_floating(f"{name}_{half}", tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{name}_{half} must have the shape [..., rows, d], got {list(tensor.shape)}")
    if left.shape[:-2] != right.shape[:-2] or left.shape[-1] != right.shape[-1]:
        raise ValueError(
            f"{name}_left [..., n, d] and {name}_right [..., m, d] must agree in all dimensions but the rows, "
            f"got {list(left.shape)} and {list(right.shape)}"
        )
    if left.device != right.device:
        raise ValueError(f"{name}_left is on {left.device}, {name}_right on {right.device}")
    if not left.shape[-1]:
        raise ValueError(f"{name}_left: d must be at least 1, got {list(left.shape)}")


def scored(left: Tensor, right: Tensor, score: str, scale: float | None, name: str) -> tuple[Tensor, Tensor, float]:
    """Rows ``[P, n, d]`` and ``[P, m, d]`` whose scaled products are the scores, but for what is the same all along a row."""
    factor = check_real(name, scale) if scale is not None else left.shape[-1] ** -0.5 if score == "dot" else 1.0
    left, right = (half.flatten(0, -3) if half.dim() > 2 else half.unsqueeze(0) for half in (left, right))
    if score == "dot":
        return left, right, factor
    with autocast_disabled(left.device.type):
        if left.dtype != torch.float64:
            left, right = left.float(), right.float()
        if score == "cosine":
            return torch.nn.functional.normalize(left, dim=-1), torch.nn.functional.normalize(right, dim=-1), factor
        # -|x - y|^2 is 2 <x, y> - |y|^2 up to the |x|^2 of a row; about the mean, which spares digits.
        origin = right.detach().mean(-2, keepdim=True)
        left, right = left - origin, right - origin
        ones = torch.ones_like(left[..., :1])
        return torch.cat([2 * left, ones], -1), torch.cat([right, -right.square().sum(-1, True)], -1), factor


def mask_of(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """A bool mask that broadcasts to the shape, flattened to ``[P, size]``."""
    if mask is None:
        return None
    check_dense(name, mask, (torch.bool,))
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the student on {device}")
    try:
        whole = mask.broadcast_to(shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to the shape {list(shape)}, got {list(mask.shape)}") from None
    return whole.reshape(-1, shape[-1])


def within(lengths: Tensor | None, batch: torch.Size, size: int, device: torch.device) -> Tensor | None:
    """bool ``[P, size]``: which of the rows are within the lengths of their problems."""
    if lengths is None:
        return None
    check_integral("lengths", lengths)
    if lengths.device != device:
        raise ValueError(f"lengths is on {lengths.device}, the student on {device}")
    if values_are_checked(lengths) and bool(((lengths < 0) | (lengths > size)).any()):
        raise ValueError(f"lengths must lie between 0 and {size}, got {int(lengths.min())} to {int(lengths.max())}")
    try:
        whole = lengths.broadcast_to(batch)
    except RuntimeError:
        raise ValueError(f"lengths must broadcast to the shape {list(batch)}, got {list(lengths.shape)}") from None
    return torch.arange(size, device=device) < whole.reshape(-1, 1)


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one & other


def masks_of(
    column_mask: Tensor | None, pair_mask: Any, causal: bool, batch: torch.Size, n: int, m: int, device: torch.device
) -> Masks:
    pairs = None
    if pair_mask is not None:
        check_dense("pair_mask", pair_mask, (torch.bool,))
        if pair_mask.device != device:
            raise ValueError(f"pair_mask is on {pair_mask.device}, the student on {device}")
        if pair_mask.shape not in ((n, m), (*batch, n, m)):
            raise ValueError(f"pair_mask must have the shape {[*batch, n, m]} or {[n, m]}, got {list(pair_mask.shape)}")
        pairs = pair_mask if pair_mask.dim() == 2 else pair_mask.reshape(-1, n, m)
    if check_flag("causal", causal) and n != m:
        raise ValueError(f"causal relations need as many left as right rows, got {n} and {m}")
    return Masks(column_mask, pairs, causal)


def rows_with_columns(masks: Masks, problems: int, n: int) -> Tensor | None:
    """bool ``[P, n]``: which rows have any column at all; None: all."""
    if masks.columns is None and masks.pairs is None:
        return None
    if masks.pairs is None:
        assert masks.columns is not None
        if masks.causal:
            return masks.columns.cumsum(-1) > 0
        return masks.columns.any(-1, keepdim=True).expand(problems, n)
    pairs = masks.pairs.tril() if masks.causal else masks.pairs
    if masks.columns is None:
        return pairs.any(-1).expand(problems, n)
    if pairs.dim() == 3:
        return (pairs & masks.columns.unsqueeze(-2)).any(-1)
    # As a product: nothing of the size of all pairs of all problems where they share one mask.
    return masks.columns.float() @ pairs.float().mT > 0


def prepare_relation(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    divergence: Divergence,
    *,
    score: str,
    scales: tuple[float | None, float | None],
    row_mask: Tensor | None,
    column_mask: Tensor | None,
    pair_mask: Tensor | None,
    lengths: Tensor | None,
    causal: bool,
    weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float | None,
    reduction: str,
) -> Relation:
    """Checks the arguments of ``relation_loss``."""
    student_left, student_right, teacher_left, teacher_right = tensors
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be an instance such as kd.ForwardKL(), got {divergence!r}")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("score", score, SCORES)
    check_side("student", student_left, student_right)
    batch, (n, m), device = (
        student_left.shape[:-2],
        (student_left.shape[-2], student_right.shape[-2]),
        student_left.device,
    )
    if (teacher_left is None) != (teacher_right is None):
        raise TypeError("teacher_left and teacher_right must both be given or both be None")
    if teacher_left is not None and teacher_right is not None:
        check_side("teacher", teacher_left, teacher_right)
        for name, mine, other in (
            ("left", student_left, teacher_left),
            ("right", student_right, teacher_right),
        ):
            if mine.shape[:-1] != other.shape[:-1]:
                raise ValueError(
                    f"teacher_{name} must have the rows of student_{name}, {list(mine.shape[:-1])}, "
                    f"got {list(other.shape[:-1])}"
                )
        if teacher_left.device != device:
            raise ValueError(f"the student is on {device} and the teacher on {teacher_left.device}")
    elif labels is None:
        raise TypeError("teacher_left and teacher_right may be None only if labels are given")
    if ce_weight is None:
        ce_weight = 1.0 if teacher_left is None else 0.0
    elif check_real("ce_weight", ce_weight) != 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} asks for a hard-label term, which needs labels")
    student = scored(student_left, student_right, score, scales[0], "student_scale")
    teacher: tuple[Any, Any, float] = (None, None, 1.0)
    if teacher_left is not None and teacher_right is not None:
        teacher = scored(teacher_left, teacher_right, score, scales[1], "teacher_scale")
    inside = within(lengths, batch, n, device)
    if lengths is not None and n != m:
        raise ValueError(f"lengths need as many left as right rows, got {n} and {m}")
    columns = both(inside, mask_of("column_mask", column_mask, torch.Size((*batch, m)), device))
    masks = masks_of(columns, pair_mask, causal, batch, n, m, device)
    problems = student[0].shape[0]
    rows = both(inside, mask_of("row_mask", row_mask, torch.Size((*batch, n)), device))
    rows = both(rows, rows_with_columns(masks, problems, n))
    # Without a teacher only the cross-entropy counts; the total variation is finite whatever is masked.
    form = TVD().form if teacher[0] is None else divergence.form
    dtype = (
        torch.float64 if torch.float64 in {tensor.dtype for tensor in tensors if tensor is not None} else torch.float32
    )
    flat = student[0].reshape(problems * n, student[0].shape[-1])
    problem = Problem(Side(flat), None, student_left.shape[:-1], m, dtype, RowSpec(*form))
    mask = None if rows is None else rows.reshape(student_left.shape[:-1])
    problem = active_rows(problem, mask, labels, IGNORED)
    if ce_weight == 0:
        problem = problem._replace(spec=problem.spec._replace(labels=None))
    if weight is not None:
        weight = per_token("weight", "real", weight, REAL_DTYPES, problem.batch_shape, device).to(dtype)
        if problem.spec.active is not None:
            weight = weight.masked_fill(~problem.spec.active, 0.0)
    relations = Relations(*student[:2], *teacher[:2], student[2], teacher[2], masks, problem.spec)
    total = Total(reduction, 0.0 if teacher[0] is None else 1.0, ce_weight, weight, None)
    return Relation(relations, problem, total)
