"""Weights and coefficients per token or sample, from the statistics of one pass over the vocabulary. All without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.checks import check_dense, check_floating, check_real, check_share
from kdkernels.statistics import TokenStatistics

__all__ = [
    "disagreement_weights",
    "entropy_gap_weights",
    "entropy_weights",
    "more_confident",
    "near_hit_quality",
    "needed",
    "skew_of_hard_tokens",
    "teacher_confidence",
]


def needed(statistics: TokenStatistics, name: str) -> Tensor:
    """A field that must be there."""
    if not isinstance(statistics, TokenStatistics):
        raise TypeError(f"statistics must be what kd.token_statistics returns, got {type(statistics).__name__}")
    found: Tensor | None = getattr(statistics, name)
    if found is None:
        missing = "labels" if name.startswith("label") else "a teacher"
        raise ValueError(f"statistics must hold {name}: give kd.token_statistics {missing}")
    return found.detach()


def entropy_gap_weights(statistics: TokenStatistics, *, emphasis: float = 2.0) -> tuple[Tensor, Tensor]:
    """Weights of the forward and of the reverse KL, by which side is more certain (BD-KD, arXiv 2212.12965).

    Where the teacher's entropy is above the student's, the student is over-confident, and the forward KL gets ``emphasis``;
    elsewhere the reverse KL does. The other gets 1. Confidence: from summaries, the emphasis from memory.

    Args:
        statistics: of student and teacher, at the temperature of the loss.
        emphasis: 2 (not certain).

    Returns:
        Two tensors ``[...]``, weights of the forward and of the reverse KL.
    """
    emphasis = check_real("emphasis", emphasis)
    teacher, student = needed(statistics, "entropy_teacher"), needed(statistics, "entropy_student")
    forward = torch.where(teacher > student, emphasis, 1.0).to(student.dtype)
    return forward, 1.0 + emphasis - forward


def entropy_weights(statistics: TokenStatistics, *, exponent: float = 0.1, teacher_share: float = 0.5) -> Tensor:
    """``(share H(p) + (1 - share) H(q)) ** exponent`` per token: ambiguous tokens count more.

    The general form of a weight by the entropies of both sides; which combination papers take was not available.

    Args:
        statistics: of student and teacher.
        exponent: at least 0; at 0 every token has the weight 1.
        teacher_share: of the teacher's entropy in the sum, from 0 to 1.

    Returns:
        ``[...]``.
    """
    exponent, share = check_real("exponent", exponent), check_share("teacher_share", teacher_share)
    if exponent < 0:
        raise ValueError(f"exponent must be at least 0, got {exponent}")
    entropy = share * needed(statistics, "entropy_teacher") + (1 - share) * needed(statistics, "entropy_student")
    return entropy.clamp(min=0) ** exponent


def teacher_confidence(statistics: TokenStatistics, *, temperature: float | Tensor = 1.0) -> Tensor:
    """``[...]``, the teacher's largest probability: the weights of Born-Again Networks' CWTM (Furlanello et al. 2018).

    Args:
        statistics: of student and teacher.
        temperature: that of the teacher in the statistics.
    """
    largest = needed(statistics, "max_teacher")
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature)
    else:
        check_real("temperature", temperature, positive=True)
    # Of a token whose vocabulary is masked altogether, and of one that the mask dropped, nothing is known.
    return (largest / temperature - needed(statistics, "lse_teacher")).exp().nan_to_num(0.0).clamp(max=1.0)


def more_confident(statistics: TokenStatistics) -> Tensor:
    """bool ``[...]``: where the teacher gives the label more probability than the student.

    The partition of Roth et al. 2024 (ICLR; arXiv 2310.17653): elsewhere the student's own initial state is its teacher. Let
    statistics of that state take the student's place if it is what the teacher is compared with. Without labels the
    comparison is of the largest probabilities (at temperature 1).
    """
    if statistics.label_log_prob_teacher is not None:
        return needed(statistics, "label_log_prob_teacher") > needed(statistics, "label_log_prob_student")
    teacher = needed(statistics, "max_teacher") - needed(statistics, "lse_teacher")
    return teacher > needed(statistics, "max_student") - needed(statistics, "lse_student")


def skew_of_hard_tokens(difficulty: Tensor, *, skew: float = 0.5, threshold: float | None = None) -> Tensor:
    """The coefficient of a skewed divergence: ``skew`` where a token is hard, 0 where it is easy.

    The split of Self-Evolution KD (arXiv 2412.15303): the student of hard tokens is replaced by its mixture with the target
    in the proportion of the coefficient. Confidence: from summaries; threshold and rule of the coefficient are not known.

    Args:
        difficulty: ``[...]``, such as the forward KL of the statistics.
        skew: at least 0 and below 1.
        threshold: hard is above it; None: above the mean of the finite difficulties.

    Returns:
        ``[...]``, in the dtype of the difficulty.
    """
    check_floating("difficulty", difficulty)
    skew = check_real("skew", skew)
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be at least 0 and less than 1, got {skew}")
    difficulty = difficulty.detach()
    if threshold is None:
        finite = difficulty.isfinite()
        limit = difficulty.where(finite, 0.0).sum() / finite.sum().clamp(min=1)
        return skew * (difficulty > limit).to(difficulty.dtype)
    return skew * (difficulty > check_real("threshold", threshold)).to(difficulty.dtype)


def near_hit_quality(
    scores: Tensor, gold: Tensor, *, k: int = 10, window: tuple[int, int] = (-5, 4), reduction: str = "mean"
) -> Tensor:
    """How early a position near the right one is among the best scored: ``1 / rank`` of the first near hit, 0 if there is none.

    The coefficient of mAP@k self-distillation (arXiv 2309.17134) is the mean of this over the teacher's start and end
    positions; the authors' code counts only the first hit, which makes it the mean reciprocal rank.

    Args:
        scores: the teacher's, ``[B, n]``.
        gold: the right positions, integers ``[B]``.
        k: how many of the best positions are looked at.
        window: what counts as a hit, relative to the right position, both ends included; the code's is not symmetric.
        reduction: "mean", a 0-d tensor, or "none", ``[B]``.
    """
    check_floating("scores", scores)
    check_dense("gold", gold, (torch.int64, torch.int32))
    if scores.dim() != 2 or gold.shape != scores.shape[:1]:
        raise ValueError(
            f"scores and gold must have the shapes [B, n] and [B], got {tuple(scores.shape)} and {tuple(gold.shape)}"
        )
    if reduction not in {"mean", "none"}:
        raise ValueError(f"reduction must be one of mean, none, got {reduction!r}")
    found = scores.detach().topk(min(k, scores.shape[1]), dim=-1).indices - gold.unsqueeze(-1)
    hits = (found >= window[0]) & (found <= window[1])
    ranks = torch.arange(1, found.shape[1] + 1, device=scores.device, dtype=torch.float32)
    quality = (hits / ranks).amax(-1)
    return quality.mean() if reduction == "mean" else quality


def disagreement_weights(divergence: Tensor, *, scale: float = 1.0) -> Tensor:
    """``1 - exp(-divergence / scale)`` per sample: those that two teachers agree on count less.

    Against poisoned teachers (Hong et al. 2023, ICML; arXiv 2306.02368) the other is the teacher with the channels of its
    last layers shuffled: what still agrees is the back door. Confidence: general form, the paper's rule was not available.

    Args:
        divergence: ``[...]``, at least 0.
        scale: positive, in the divergence's unit.
    """
    check_floating("divergence", divergence)
    scale = check_real("scale", scale, positive=True)
    return -torch.expm1(-divergence.detach().clamp(min=0) / scale)
