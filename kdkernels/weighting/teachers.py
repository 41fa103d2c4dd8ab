"""Which of several teachers (mentors, peers, earlier selves) a sample learns from, how much and how sharply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.checks import check_count, check_dense, check_floating, check_real

__all__ = [
    "Mentoring",
    "load_balance",
    "mentoring",
    "most_confident",
    "peer_weights",
    "permuted_others",
    "route",
    "shares",
]


def check_stack(name: str, values: Tensor, like: Tensor | None = None) -> None:
    """Numbers ``[M, ...]`` of at least one teacher."""
    check_floating(name, values)
    if values.dim() < 1 or not len(values):
        raise ValueError(f"{name} must have the shape [M, ...] with M > 0, got {tuple(values.shape)}")
    if like is not None and values.shape[1:] != like.shape:
        raise ValueError(
            f"{name} must have the shape [M, {', '.join(map(str, like.shape))}], got {tuple(values.shape)}"
        )


def most_confident(label_log_probs: Tensor) -> Tensor:
    """int64 ``[...]``: for each sample the teacher that gives the label the most probability, of ``[M, ...]`` (the first of
    equals), as in Roth et al. 2024 (ICLR; arXiv 2310.17653) for several teachers."""
    check_stack("label_log_probs", label_log_probs)
    return label_log_probs.detach().argmax(0)


def route(gates: Tensor, k: int = 1) -> Tensor:
    """The weights ``[M, N]`` of teachers per sample: ``1 / k`` for the k with the highest gate, 0 for the others.

    MST-Distill does not multiply by the gate: the distillation terms of the chosen teachers are averaged. Source: Li et al.
    2025 (ACM MM; arXiv 2507.07015). Confidence: from the authors' code.

    Args:
        gates: logits or probabilities ``[M, N]``.
        k: teachers per sample.
    """
    check_stack("gates", gates)
    if gates.dim() != 2:
        raise ValueError(f"gates must have the shape [M, N], got {tuple(gates.shape)}")
    if check_count("k", k) > len(gates):
        raise ValueError(f"k must be at most the {len(gates)} teachers, got {k}")
    chosen = gates.detach().topk(k, dim=0).indices
    return torch.zeros_like(gates, requires_grad=False).scatter(0, chosen, 1.0 / k)


def load_balance(gates: Tensor, *, form: str = "kl") -> Tensor:
    """What keeps a router from sending every sample to one teacher: a 0-d tensor with a gradient to the gates.

    "kl": ``KL(uniform || mean gate) / M``; "variation": standard deviation over mean of the gate mass per teacher. Source as
    of ``route``, from the authors' code.

    Args:
        gates: logits ``[M, N]``; their softmax over the teachers is meant.
        form: of the two.
    """
    check_stack("gates", gates)
    if gates.dim() != 2:
        raise ValueError(f"gates must have the shape [M, N], got {tuple(gates.shape)}")
    if form not in {"kl", "variation"}:
        raise ValueError(f"form must be one of kl, variation, got {form!r}")
    mean = gates.softmax(0).mean(-1)
    if form == "variation":
        return mean.std() / mean.mean()
    count = len(gates)
    return -(mean.clamp(min=torch.finfo(mean.dtype).tiny) * count).log().mean() / count


class Mentoring(NamedTuple):
    """What each mentor is to each sample; a ``weights`` of 0 means that it is not listened to."""

    weights: Tensor
    """``[M, ...]``."""
    temperatures: Tensor
    """``[M, ...]``, of both sides."""


def mentoring(
    mentor_label_log_probs: Tensor,
    student_label_log_probs: Tensor,
    correct: Tensor,
    *,
    performance: Tensor | None = None,
    temperature: float = 12.0,
    gap_scale: float = 1.0,
) -> Mentoring:
    """Weights and temperatures of mentors per sample, in the manner of Classroom KD (arXiv 2409.20237).

    A mentor is active where it is right and gives the label more probability than the student does. Active mentors share
    the weight in proportion to their performance; a mentor further ahead speaks more softly: its temperature is
    ``temperature (1 + gap_scale (p_m(y) - p_S(y)))``.

    Confidence: the filter and that temperatures grow with the gap from summaries, the exact forms from memory.

    Args:
        mentor_label_log_probs: log-probabilities of the labels under each mentor, ``[M, ...]``.
        student_label_log_probs: ``[...]``.
        correct: bool ``[M, ...]``, whether the mentor's first choice is the label.
        performance: positive ``[M]``, such as accuracies or ranks; None: all alike.
        temperature: of a mentor at the student's level (about 12, not certain).
        gap_scale: at least 0.
    """
    check_floating("student_label_log_probs", student_label_log_probs)
    check_stack("mentor_label_log_probs", mentor_label_log_probs, student_label_log_probs)
    check_dense("correct", correct, (torch.bool,))
    if correct.shape != mentor_label_log_probs.shape:
        raise ValueError(
            f"correct must have the shape {tuple(mentor_label_log_probs.shape)}, got {tuple(correct.shape)}"
        )
    temperature = check_real("temperature", temperature, positive=True)
    if check_real("gap_scale", gap_scale) < 0:
        raise ValueError(f"gap_scale must be at least 0, got {gap_scale}")
    gap = mentor_label_log_probs.detach().exp() - student_label_log_probs.detach().exp()
    active = (correct & (gap > 0)).to(gap.dtype)
    if performance is not None:
        check_floating("performance", performance)
        if performance.shape != gap.shape[:1]:
            raise ValueError(f"performance must have the shape [{len(gap)}], got {tuple(performance.shape)}")
        active = active * performance.detach().to(gap.dtype).reshape(-1, *(1,) * (gap.dim() - 1))
    weights = active / active.sum(0).clamp(min=torch.finfo(gap.dtype).tiny)
    return Mentoring(weights, temperature * (1 + gap_scale * gap.clamp(min=0)))


def shares(scores: Tensor, *, power: float = 1.0) -> Tensor:
    """``score ** power / sum``, weights of teachers from how similar or good they are, ``[M]``.

    In DistillWeighted (arXiv 2304.12314) scores of task similarity; the paper's power was not available.

    Args:
        scores: at least 0, ``[M]``.
        power: a large one chooses the best.
    """
    check_stack("scores", scores)
    power = check_real("power", power)
    return (power * scores.detach().clamp(min=torch.finfo(scores.dtype).tiny).log()).softmax(0)


def peer_weights(divergences: Tensor) -> Tensor:
    """``[M, M]``, how much each of M peers (rows) listens to the others: ``softmax_j(-divergence_ij)``.

    The general form of a fusion by agreement. Args: ``divergences`` ``[M, M]``, such as the KL of peer i's mean prediction
    from that of peer j.
    """
    check_stack("divergences", divergences)
    if divergences.dim() != 2 or divergences.shape[0] != divergences.shape[1]:
        raise ValueError(f"divergences must have the shape [M, M], got {tuple(divergences.shape)}")
    return (-divergences.detach()).softmax(-1)


def permuted_others(logits: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Logits ``[..., C]`` whose largest stays in place, all others change places at random in each row.

    Born-Again Networks' DKPP (Furlanello et al. 2018, ICML; arXiv 1805.04770): what remains of a teacher without its
    knowledge of which wrong classes are near. Confidence: from memory. A tensor of the logits' size is made.
    """
    check_floating("logits", logits)
    logits = logits.detach()
    largest = logits.argmax(-1, keepdim=True)
    # The largest sorts in front of everything, in the source as in the target order.
    keys = torch.rand(logits.shape, generator=generator, dtype=torch.float64, device=logits.device)
    ids = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float64).expand_as(keys)
    sources = keys.scatter(-1, largest, -1.0).argsort(-1)
    targets = ids.scatter(-1, largest, -1.0).argsort(-1)
    return torch.empty_like(logits).scatter(-1, targets, logits.gather(-1, sources))
