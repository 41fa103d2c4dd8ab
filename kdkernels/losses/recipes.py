"""Recipes that deserve a class: several standard losses that belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels.checks import check_real
from kdkernels.functional import token_log_probs
from kdkernels.losses.registry import register
from kdkernels.losses.sequences import IGNORED, batch_of, check_ids, mean_over
from kdkernels.sources import Source

__all__ = ["MedusaHeads"]


@register("medusa_heads")
class MedusaHeads(nn.Module):
    """Several heads that predict further and further ahead: ``weight sum_k decay^k CE(head_k, y_{t + k + 1})``, k from 1.

    The logits of one head are made and forgotten before those of the next, a chunk of tokens at a time if they are
    ``kd.LMHead``: ``[K, B, T, V]`` is never stored. Medusa-2 adds the cross-entropy of the model's own head; when a model is
    its own teacher, its KL divergence from the model without adapters in its place, at a ``weight`` of 0.01 with a sine ramp.

    Source: Cai et al. 2024 (ICML; arXiv 2401.10774). Confidence: from the authors' code. Its legacy trainer sums without a
    decay (``decay=1``) and its KL is divided by the padding too, which is not copied.

    Args:
        weight: of the sum, if the call does not say otherwise.
        decay: of the heads.
        backend: of the kernels.
    """

    def __init__(self, weight: float = 0.2, *, decay: float = 0.8, backend: str | None = None) -> None:
        super().__init__()
        self.weight = check_real("weight", weight)
        self.decay = check_real("decay", decay, positive=True)
        self.backend = backend

    def forward(self, heads: Sequence[Source], labels: Tensor, *, weight: float | None = None) -> Tensor:
        """The loss, a 0-d tensor; the gradient flows to the heads.

        Args:
            heads: for k = 1, 2, ... logits ``[B, T, V]`` or a ``kd.LMHead`` of the k-th head.
            labels: the tokens themselves, int64 ``[B, T]``, not shifted; -100 where one is not to be predicted.
            weight: in place of that of the constructor.
        """
        if not heads:
            raise ValueError("heads must hold at least one source, got none")
        losses = []
        for ahead, head in enumerate(heads, 1):
            check_ids("labels", labels, batch_of(f"heads[{ahead - 1}]", head), "head")
            shift = min(ahead + 1, labels.shape[1])
            following = torch.cat([labels[:, shift:], labels.new_full((len(labels), shift), IGNORED)], 1)
            nll = -token_log_probs(head, following, backend=self.backend)
            losses.append(self.decay**ahead * mean_over(nll, following != IGNORED))
        return (self.weight if weight is None else check_real("weight", weight)) * torch.stack(losses).sum()
