"""The arguments of ``pack`` and ``unpack``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kdkernels.checks import check_choice
from kdkernels.records import BITS, check_tail
from kdkernels.sources import (
    CODECS,
    PackedLogits,
    TopKLogits,
)

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(topk: TopKLogits, codec: str, pack_records: Callable[..., tuple[Tensor, Tensor]]) -> PackedLogits:
    """``pack`` with the row function of a backend."""
    if not isinstance(topk, TopKLogits):
        raise TypeError(f"topk must be kd.TopKLogits, got {type(topk).__name__}")
    check_choice("codec", codec, CODECS)
    width = topk.ids.shape[-1]
    log_tail_mass = None
    if topk.log_tail_mass is not None:
        log_tail_mass = topk.log_tail_mass.detach().reshape(-1)
        check_tail(log_tail_mass)
    rows = topk.batch_shape.numel()
    data, counts = pack_records(
        topk.ids.reshape(rows, width),
        topk.log_probs.detach().reshape(rows, width),
        log_tail_mass,
        topk.vocab_size,
        BITS[codec],
    )
    return PackedLogits(
        data,
        counts.reshape(topk.batch_shape),
        vocab_size=topk.vocab_size,
        codec=codec,
        tail=topk.tail,
        temperature=topk.temperature,
    )


def unpack_rows(packed: PackedLogits, unpack_records: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> TopKLogits:
    """``unpack`` with the row function of a backend."""
    if not isinstance(packed, PackedLogits):
        raise TypeError(f"packed must be kd.PackedLogits, got {type(packed).__name__}")
    counts = packed.counts.reshape(-1)
    # A hostile count must not decide how much memory is asked for: each entry takes a bit at least.
    width = min(max(0, int(counts.max())) if counts.numel() else 0, 8 * packed.data.numel())
    ids, log_probs, log_tail_mass = unpack_records(packed.data, counts, packed.vocab_size, BITS[packed.codec], width)
    return TopKLogits(
        ids.view(*packed.batch_shape, width),
        log_probs.view(*packed.batch_shape, width),
        vocab_size=packed.vocab_size,
        tail=packed.tail,
        temperature=packed.temperature,
        log_tail_mass=log_tail_mass.view(packed.batch_shape),
    )
