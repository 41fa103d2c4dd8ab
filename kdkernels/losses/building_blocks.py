"""Standard forms that other losses are built of: adaptive KL, standardised logits, learned temperature, correlations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.arguments.rows import side
from kdkernels.backends.rows import compute_dtype
from kdkernels.checks import check_choice, check_real
from kdkernels.divergences import ForwardKL, ReverseKL
from kdkernels.functional import distillation_loss, head_tail_gap
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import detached
from kdkernels.reference.rows import effective_logits, side_logits
from kdkernels.sources import Source

__all__ = ["AKL", "CTKD", "DIST", "LogitStd", "MixKDStd"]

BLOCK_BYTES = 2 << 20
"""Of the rows of one tensor that are worked on at a time on the CPU, so that they stay in its caches."""


def blocks(logits: Tensor) -> Iterator[slice]:
    """Runs of rows of logits ``[N, V]``; on the CPU as many as stay in its caches, elsewhere all."""
    rows, vocab = logits.shape
    size = max(1, BLOCK_BYTES // (logits.element_size() * vocab)) if logits.device.type == "cpu" else max(1, rows)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def dense(name: str, source: Source) -> tuple[Tensor, torch.Size]:
    """The logits of a source whole, ``[N, V]``, after softcap and floor, and the shape of its batch."""
    rows, shape, _ = side(name, source, None)
    logits = side_logits(rows)
    if rows.weight is None and rows.softcap == 0:
        return logits, shape
    return effective_logits(logits, rows.softcap, compute_dtype(logits, None)), shape


def weighed_divergences(student: Source, teacher: Source, weight: Tensor, **options: Any) -> Tensor:
    """``mean(weight KL(p||q) + (1 - weight) KL(q||p))`` with a weight per token."""
    forward = distillation_loss(student, teacher, ForwardKL(), weight=None, reduction="none", **options)
    reverse = distillation_loss(student, teacher, ReverseKL(), weight=None, reduction="none", **options)
    return weight * forward + (1 - weight) * reverse


@register("akl")
class AKL(nn.Module):
    """Adaptive Kullback-Leibler divergence: of each token the direction that looks where the student is furthest away.

    ``w KL(p||q) + (1 - w) KL(q||p)`` with ``w = g_head / (g_head + g_tail)``, no gradient through w, and ``g`` the sums of
    ``|p - q|`` over the teacher's head, its most probable ids that hold up to ``mass``, and over all others.

    Source: Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models (COLING 2025,
    arXiv 2404.02657). Confidence: from the authors' code. The copy in DSKD takes as head the ids whose cumulative probability
    from the least probable on exceeds ``mass``, which is the top ``1 - mass`` with the id that crosses it (``head="ascending"``).

    Args:
        mass: mu, of the head.
        head: "descending" as in the authors' code, or "ascending" as in DSKD's.
        temperature: of both sides.
        backend: of the kernels, see ``kd.distillation_loss``.
    """

    def __init__(
        self,
        mass: float = 0.5,
        *,
        head: str = "descending",
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.mass = check_real("mass", mass)
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass must be in [0, 1], got {mass!r}")
        self.head = check_choice("head", head, ("descending", "ascending"))
        self.temperature = check_real("temperature", temperature, positive=True)
        self.backend = backend

    def weights(self, student: Source, teacher: Source, mask: Tensor | None = None) -> Tensor:
        """``[...]``, w of each token: 1/2 where student and teacher agree."""
        head, tail = head_tail_gap(
            student,
            teacher,
            self.mass if self.head == "descending" else 1 - self.mass,
            crossing=self.head == "ascending",
            temperature=self.temperature,
            mask=mask,
            backend=self.backend,
        )
        total = head + tail
        return torch.where(total > 0, head / total.masked_fill(total <= 0, 1), 0.5)

    def forward(self, student: Source, teacher: Source, *, mask: Tensor | None = None) -> Tensor:
        """The mean over the tokens that count, a 0-d tensor; the gradient flows to the student.

        Args:
            student, teacher: logits ``[..., V]`` or ``kd.LMHead``, in any pairing.
            mask: bool ``[...]``, True where a token counts.

        Raises:
            TypeError, ValueError: an argument is refused; the text names it.
        """
        teacher = detached(teacher)
        values = weighed_divergences(
            student,
            teacher,
            self.weights(student, teacher, mask),
            temperature=self.temperature,
            mask=mask,
            backend=self.backend,
        )
        return values.mean() if mask is None else values.sum() / mask.sum().clamp(min=1)
