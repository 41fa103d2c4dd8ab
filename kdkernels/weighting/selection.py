"""Which samples to train on: scores, and what is picked by them."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.checks import check_count, check_floating, check_real
from kdkernels.losses.sequences import check_mask, mean_over

__all__ = ["best", "difference_scores", "farthest_first", "margins", "robust_sampling"]


def difference_scores(teacher_log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[B]``, the mean over each text's tokens of ``log p_teacher - log p_reference`` (MiniPLM).

    High where a large model finds a text much likelier than a small one: worth learning, and not yet learnt. Source: Gu et
    al. 2025 (ICLR; arXiv 2410.17215). Confidence: from the authors' code, which takes this difference; its readme prints a
    ratio.

    Args:
        teacher_log_probs, reference_log_probs: of the text's tokens, ``[B, T]``, from ``kd.token_log_probs``.
        mask: bool ``[B, T]``, True where a token counts.
    """
    check_floating("teacher_log_probs", teacher_log_probs)
    check_floating("reference_log_probs", reference_log_probs)
    if teacher_log_probs.dim() != 2 or reference_log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            "teacher_log_probs and reference_log_probs must have the same shape [B, T], "
            f"got {tuple(teacher_log_probs.shape)} and {tuple(reference_log_probs.shape)}"
        )
    difference = (teacher_log_probs - reference_log_probs).detach()
    return mean_over(difference, check_mask("mask", mask, difference), -1)


def best(scores: Tensor, *, count: int | None = None, fraction: float | None = None) -> Tensor:
    """The places of the highest scores, best first: int64 ``[count]``.

    MiniPLM keeps half of the texts; CutMixPick (Wang et al. 2022, NeurIPS; arXiv 2012.02909) the augmented images on which
    the student's entropy is highest.

    Args:
        scores: ``[N]``.
        count: how many, or
        fraction: which share, above 0 and at most 1, rounded to the nearest whole number and at least one.
    """
    check_floating("scores", scores)
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"scores must have the shape [N] with N > 0, got {tuple(scores.shape)}")
    if (count is None) == (fraction is None):
        raise ValueError(f"one of count and fraction must be given, got {count!r} and {fraction!r}")
    if fraction is not None:
        if not 0 < check_real("fraction", fraction) <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
        count = max(1, round(fraction * len(scores)))
    assert count is not None
    if check_count("count", count) > len(scores):
        raise ValueError(f"count must be at most the {len(scores)} scores, got {count}")
    return scores.detach().topk(count).indices


def margins(probabilities: Tensor) -> Tensor:
    """``[...]``, the largest probability less the second largest of ``[..., C]``."""
    check_floating("probabilities", probabilities)
    first, second = probabilities.detach().topk(2, dim=-1).values.unbind(-1)
    return first - second


def robust_sampling(gains: Tensor, *, wrong: float) -> Tensor:
    """Probabilities ``[N]`` of asking the teacher about each sample, if it may be wrong about some of them.

    With gains ``g_i`` (one less the student's margin) in falling order, ``q_i`` is proportional to ``1 / g_i`` on the first
    ``k`` samples, where k maximises ``(k - wrong) / sum_{i <= k} 1 / g_i``: the expected gain when an adversary chooses the
    ``wrong`` samples that earn nothing.

    Source: Baykal et al. 2023 (ICLR; arXiv 2210.01213). Confidence: general form, from memory.

    Args:
        gains: ``[N]``, positive.
        wrong: how many samples the teacher may label wrongly, at least 0 and below N.
    """
    check_floating("gains", gains)
    if gains.dim() != 1 or not len(gains):
        raise ValueError(f"gains must have the shape [N] with N > 0, got {tuple(gains.shape)}")
    if not 0 <= check_real("wrong", wrong) < len(gains):
        raise ValueError(f"wrong must be at least 0 and below the {len(gains)} samples, got {wrong}")
    ordered, places = gains.detach().double().clamp(min=1e-12).sort(descending=True, stable=True)
    inverse = ordered.reciprocal()
    steps = torch.arange(1, len(gains) + 1, device=gains.device)
    value = (steps - wrong) / inverse.cumsum(0)
    kept = inverse * (steps <= value.argmax() + 1)
    return torch.zeros_like(kept).scatter(0, places, kept / kept.sum()).to(gains.dtype)


def farthest_first(points: Tensor, count: int, *, chosen: Tensor | None = None) -> Tensor:
    """Places int64 ``[count]`` of points that are far from all chosen before, one after another.

    Of class probabilities the selection of PCoreSet (arXiv 2506.00910): diversity where predictions live, not features.
    Confidence: from memory.

    Args:
        points: ``[N, d]``, such as the teacher's probabilities.
        count: how many to choose, at most N.
        chosen: ``[M, d]``, points there are already; None: the first point begins.
    """
    check_floating("points", points)
    if points.dim() != 2:
        raise ValueError(f"points must have the shape [N, d], got {tuple(points.shape)}")
    if check_count("count", count) > len(points):
        raise ValueError(f"count must be at most the {len(points)} points, got {count}")
    points = points.detach()
    # Without any choice yet all are equally far, and the first of equals is taken.
    distance = points.new_full((len(points),), torch.inf)
    if chosen is not None:
        check_floating("chosen", chosen)
        distance = torch.cdist(points, chosen.detach()).amin(-1)
    found = []
    for _ in range(count):
        # As an index of one dimension: picking by a number would wait for the device.
        place = distance.argmax().reshape(1)
        found.append(place)
        distance = torch.minimum(distance, (points - points.index_select(0, place)).norm(dim=-1))
        distance = distance.index_fill(0, place, -torch.inf)
    return torch.cat(found)
