"""What ``topk_logits`` and ``sample_logits`` do before and after the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kdkernels.arguments import Picking
from kdkernels.sources import SampledLogits, TopKLogits

__all__ = ["sampled_logits", "top_k_logits", "uniform_numbers"]


def uniform_numbers(picking: Picking, generator: torch.Generator | None) -> Tensor:
    """A number in [0, 1) for every draw ``[N, n]``: all at once, so that they do not depend on how the work is cut.

    Float32 has too few digits to draw what is improbable.
    """
    source = picking.source.tensor
    return torch.rand(
        source.shape[0], picking.entries, generator=generator, dtype=torch.float64, device=source.device
    )  # fmt: skip


def top_k_logits(picking: Picking, rows: tuple[Tensor, Tensor, Tensor], top_p: float | None) -> TopKLogits:
    """The rows of a kernel, cut to the probability ``top_p``, as what the user gets."""
    ids, log_probs, log_tail_mass = rows if top_p is None or top_p == 1 else cut(*rows, top_p)
    return TopKLogits(
        ids.reshape(*picking.batch_shape, picking.entries),
        log_probs.reshape(*picking.batch_shape, picking.entries),
        vocab_size=picking.vocab,
        temperature=picking.tempering.temperature,
        log_tail_mass=log_tail_mass.reshape(picking.batch_shape),
    )


def cut(ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the shortest prefix of each row whose probability reaches ``top_p``; the others' goes to the tail."""
    mass = log_probs.double().exp().cumsum(-1)
    # To rounding: the log-probabilities are.
    reached = functional.pad(mass[:, :-1], (1, 0)) >= top_p * (1 - 4 * torch.finfo(log_probs.dtype).eps)
    left = log_probs.masked_fill(~reached, -math.inf)
    log_tail_mass = torch.logsumexp(torch.cat([left, log_tail_mass.unsqueeze(-1)], -1), -1)
    return ids.masked_fill(reached, -1), log_probs.masked_fill(reached, -math.inf), log_tail_mass


def sampled_logits(picking: Picking, rows: tuple[Tensor, Tensor, Tensor]) -> SampledLogits:
    """The rows of a kernel as what the user gets."""
    ids, weights, entropy = rows
    return SampledLogits(
        ids.reshape(*picking.batch_shape, picking.entries),
        weights.reshape(*picking.batch_shape, picking.entries),
        vocab_size=picking.vocab,
        entropy=entropy.reshape(picking.batch_shape),
        temperature=picking.tempering.temperature,
    )
