"""The arguments of ``topk_logits`` and ``sample_logits``."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.arguments.rows import side
from kdkernels.backends.rows import Side, Tempering
from kdkernels.checks import check_integer, check_real
from kdkernels.sources import (
    MAX_VOCAB_SIZE,
    Source,
)

__all__ = ["Picking", "prepare_sample", "prepare_topk"]


class Picking(NamedTuple):
    """A source that ids are picked from, and what they are picked by."""

    source: Side
    batch_shape: torch.Size
    vocab: int
    entries: int
    """Ids per token."""
    tempering: Tempering


def picking(
    source: Source, name: str, entries: int, temperature: float, proposal: float, vocab_size: int | None
) -> Picking:
    side_rows, shape, vocab = side("source", source, vocab_size)
    if vocab > MAX_VOCAB_SIZE:
        raise ValueError(f"source: the vocabulary must have at most {MAX_VOCAB_SIZE} entries, got {vocab}")
    if check_integer(name, entries) < 1:
        raise ValueError(f"{name} must be at least 1, got {entries}")
    tau = check_real("temperature", temperature, positive=True)
    proposal_tau = tau * check_real("proposal_temperature", proposal, positive=True)
    return Picking(side_rows, shape, vocab, entries, Tempering(tau, side_rows.softcap, proposal_tau))


def prepare_topk(source: Source, k: int, *, top_p: float | None, temperature: float, vocab_size: int | None) -> Picking:
    """Checks the arguments of ``topk_logits``."""
    found = picking(source, "k", k, temperature, 1.0, vocab_size)
    if k > found.vocab:
        raise ValueError(f"k must be at most the source's vocabulary of {found.vocab}, got {k}")
    if top_p is not None and not 0 < check_real("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be None or in (0, 1], got {top_p!r}")
    return found


def prepare_sample(
    source: Source,
    n: int,
    *,
    generator: torch.Generator | None,
    temperature: float,
    proposal_temperature: float,
    vocab_size: int | None,
) -> Picking:
    """Checks the arguments of ``sample_logits``."""
    found = picking(source, "n", n, temperature, proposal_temperature, vocab_size)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be None or a torch.Generator, got {generator!r}")
        if generator.device.type != found.source.tensor.device.type:
            raise ValueError(f"generator is on {generator.device}, the source on {found.source.tensor.device}")
    return found
