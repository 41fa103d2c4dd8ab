"""``topk_logits`` and ``sample_logits`` in plain PyTorch: the definition of correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.arguments import Picking
from kdkernels.autocast import autocast_disabled
from kdkernels.backends.rows import compute_dtype
from kdkernels.picking import sampled_logits, top_k_logits, uniform_numbers
from kdkernels.reference.rows import LOGIT_FLOOR, effective_logits, side_logits
from kdkernels.sources import SampledLogits, Source, TopKLogits

__all__ = ["sample_logits", "sample_rows", "topk_logits", "topk_rows"]


def topk_logits(
    source: Source,
    k: int,
    *,
    top_p: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TopKLogits:
    """See ``kdkernels.topk_logits``: same arguments, computed by sorting whole ``[N, V]`` tensors."""
    picking = arguments.prepare_topk(source, k, top_p=top_p, temperature=temperature, vocab_size=vocab_size)
    with torch.no_grad(), autocast_disabled(picking.source.tensor.device.type):
        return top_k_logits(picking, topk_rows(picking), top_p)


def sample_logits(
    source: Source,
    n: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    proposal_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> SampledLogits:
    """See ``kdkernels.sample_logits``: same arguments, computed on whole ``[N, V]`` tensors."""
    picking = arguments.prepare_sample(
        source,
        n,
        generator=generator,
        temperature=temperature,
        proposal_temperature=proposal_temperature,
        vocab_size=vocab_size,
    )
    with torch.no_grad(), autocast_disabled(picking.source.tensor.device.type):
        return sampled_logits(picking, sample_rows(picking, uniform_numbers(picking, generator)))


def compute_logits(picking: Picking) -> Tensor:
    """The logits ``[N, V]`` before the softcap, in the compute type."""
    logits = side_logits(picking.source)
    return logits.to(compute_dtype(logits, None))


def relative_logits(logits: Tensor, picking: Picking) -> Tensor:
    """What the softmax sees, relative to the largest of the row, before the temperature: no digits are lost later."""
    effective = effective_logits(logits, picking.tempering.softcap, logits.dtype)
    return effective - effective.amax(-1, keepdim=True)


def topk_rows(picking: Picking) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids [N, k], log_probs [N, k], log_tail_mass [N])`` of a checked source."""
    logits = compute_logits(picking)
    # The softcap keeps the order, except that it makes large logits equal. Adding 0 turns -0 into 0.
    order = torch.sort(logits + 0, dim=-1, descending=True, stable=True)
    ids, values = order.indices[:, : picking.entries], order.values[:, : picking.entries]
    tempered = relative_logits(logits, picking) / picking.tempering.temperature
    normalizer = torch.logsumexp(tempered, -1)
    log_probs = tempered.gather(-1, ids) - normalizer.unsqueeze(-1)
    named = values > LOGIT_FLOOR
    # Entries that are not named are what is left: ids of a column of its own are ignored.
    left = torch.cat([tempered, tempered[:, :1]], -1).scatter(
        -1, ids.where(named, tempered.shape[-1]), -math.inf
    )[:, :-1]  # fmt: skip
    log_tail_mass = torch.logsumexp(left, -1) - normalizer
    valid = normalizer.isfinite().unsqueeze(-1)
    return (
        ids.where(named & valid, -1),
        log_probs.where(named, -math.inf).where(valid, math.nan),
        log_tail_mass.where(valid.squeeze(-1), math.nan),
    )


def sample_rows(picking: Picking, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(ids [N, n], weights [N, n], entropy [N])`` of a checked source."""
    logits = compute_logits(picking)
    relative = relative_logits(logits, picking)
    masked = effective_logits(logits, picking.tempering.softcap, relative.dtype) <= LOGIT_FLOOR

    def log_softmax(temperature: float) -> Tensor:
        return torch.log_softmax((relative / temperature).masked_fill(masked, -math.inf), -1)

    log_p = log_softmax(picking.tempering.temperature)
    log_q = log_softmax(picking.tempering.proposal_temperature)
    cumulative = log_q.double().exp().cumsum(-1)
    # The first id whose probability up to itself exceeds the number, so one of probability 0 is never drawn.
    ids = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    last = torch.where(masked, -1, torch.arange(masked.shape[-1], device=masked.device)).amax(-1, keepdim=True)
    ids = torch.minimum(ids, last.clamp(min=0))
    weights = (log_p.gather(-1, ids) - log_q.gather(-1, ids)).exp() / picking.entries
    entropy = -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(-1)
    empty = masked.all(-1)
    valid = (relative.isfinite().all(-1) & ~empty).unsqueeze(-1)
    nothing = torch.where(empty, 0.0, math.nan).to(weights.dtype).unsqueeze(-1)
    return (
        ids.where(valid, -1),
        weights.where(valid, nothing),
        entropy.where(valid.squeeze(-1), nothing.squeeze(-1)),
    )
