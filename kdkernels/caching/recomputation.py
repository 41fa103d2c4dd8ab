"""Stored sequences beside the teacher they are said to come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.caching.errors import CachingError
from kdkernels.caching.teacher import Teacher
from kdkernels.sources import TopKLogits
from kdkernels.store import StoreDataset

__all__ = ["Deviation", "recompute"]


@dataclass(frozen=True)
class Deviation:
    """How far the stored distributions of a sequence are from the teacher's, as cut for the store."""

    sequence_id: int
    tokens: int
    kl: float
    """Mean KL(teacher || stored) in nats, over the ids that both name and all others as one outcome."""
    same_ids: float
    """Which share of the stored ids the teacher names too."""


def recompute(teacher: Teacher, ds: StoreDataset, position: int) -> Deviation:
    """Runs the teacher over one stored sequence.

    Raises:
        CachingError: the store has no input ids, or the teacher another vocabulary.
    """
    description = ds.description
    item = ds[position]
    if item["input_ids"] is None:
        raise CachingError("the store holds no input ids, so nothing can be recomputed")
    if teacher.vocab_size < ds.vocab_size:
        raise CachingError(
            f"the store's vocabulary has {ds.vocab_size} entries, the teacher's head {teacher.vocab_size}"
        )
    stored = item["topk"]
    again = kd.topk_logits(
        teacher.head(item["input_ids"][None]),
        description.k or stored.ids.shape[-1],
        top_p=description.top_p,
        temperature=description.temperature,
        vocab_size=ds.vocab_size,
    ).changed(lambda tensor: tensor[0].cpu())
    kl, same = compare(again, stored)
    return Deviation(item["sequence_id"], len(kl), float(kl.mean()), same)


def compare(teacher: TopKLogits, stored: TopKLogits) -> tuple[Tensor, float]:
    """KL(teacher || stored) ``[tokens]``, float64, and the share of stored ids that the teacher names."""
    ids, order = teacher.ids.sort(-1)
    log_p, log_q = teacher.log_probs.double().gather(-1, order), stored.log_probs.double()
    place = torch.searchsorted(ids, stored.ids.contiguous()).clamp(max=ids.shape[-1] - 1)
    shared = (ids.gather(-1, place) == stored.ids) & (stored.ids >= 0)
    shared_by_teacher = torch.zeros_like(ids).scatter_add(-1, place, shared.long()) > 0
    log_p_shared = log_p.gather(-1, place)
    kl = torch.where(shared, log_p_shared.exp() * (log_p_shared - log_q), 0.0).sum(-1)
    log_p_rest, log_q_rest = remainder(teacher, log_p, shared_by_teacher), remainder(stored, log_q, shared)
    kl += torch.where(log_p_rest > -torch.inf, log_p_rest.exp() * (log_p_rest - log_q_rest), 0.0)
    return kl, float(shared.sum() / (stored.ids >= 0).sum().clamp(min=1))


def remainder(source: TopKLogits, log_probs: Tensor, shared: Tensor) -> Tensor:
    """The logarithm of the mass outside the shared entries ``[tokens]``."""
    assert source.log_tail_mass is not None
    others = log_probs.masked_fill(shared, -torch.inf).logsumexp(-1)
    return torch.logaddexp(source.log_tail_mass.double(), others)
