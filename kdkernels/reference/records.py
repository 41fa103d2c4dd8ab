"""Records of truncated teachers in plain PyTorch: the definition of their bytes, see ``csrc/math/records.h``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels import arguments
from kdkernels.records import (
    check_entries,
    header_bytes,
    low_bits,
    record_offsets,
    record_sizes,
    refuse_record,
    rows_to_pack,
)
from kdkernels.sources import PackedLogits, TopKLogits

__all__ = ["pack", "pack_records", "unpack", "unpack_records"]

SHAPES = 16
FLATTEST = -3
RANGES = 4095
RANGE_UNIT = 128
HEAD_UNIT = 1024
HEAD_MIDDLE = 32767
NO_TAIL = 65535

CHUNK_BITS = 1 << 22
"""Of the records that are worked on at a time; each bit is an element of a tensor."""


def pack(topk: TopKLogits, codec: str = "q6") -> PackedLogits:
    """See ``kdkernels.pack``."""
    return arguments.pack_rows(topk, codec, pack_records)


def unpack(packed: PackedLogits) -> TopKLogits:
    """See ``kdkernels.unpack``."""
    return arguments.unpack_rows(packed, unpack_records)


def pack_records(
    ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor | None, vocab: int, bits: int
) -> tuple[Tensor, Tensor]:
    """The records of rows of entries.

    Args:
        ids: token ids ``[N, K]``, in any order; -1 where there is no entry.
        log_probs: ``[N, K]``; an entry of -inf is none.
        log_tail_mass: ``[N]``; None: what the entries leave.
        vocab: entries of the vocabulary, at most 2^24.
        bits: per value, 4, 6 or 8, or 16 for bfloat16.

    Returns:
        The records one behind the other, uint8, and the entries of each, int32 ``[N]``.

    Raises:
        ValueError: a row is no truncated distribution.
    """
    ids, log_probs, log_tail_mass, counts = rows_to_pack(ids, log_probs, log_tail_mass)
    check_entries(ids, log_probs, vocab)
    order = ids.masked_fill((ids == -1) | (log_probs == -torch.inf), vocab).sort(-1)
    sizes = record_sizes(counts, vocab, bits)
    offsets = sizes.cumsum(0) - sizes
    data = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=ids.device)
    for rows, count in rows_of_equal_count(counts, sizes):
        entries = order.indices[rows, :count]
        records = encode(
            order.values[rows, :count], log_probs[rows].gather(1, entries), log_tail_mass[rows], vocab, bits
        )
        data[offsets[rows, None] + torch.arange(records.shape[1], device=ids.device)] = records
    return data, counts


def unpack_records(data: Tensor, counts: Tensor, vocab: int, bits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of records, in ascending order of their ids.

    Args:
        data: the records, uint8.
        counts: entries of each, int32 ``[N]``, at most ``width`` and the vocabulary.
        vocab, bits: as in ``pack_records``.
        width: entries per row of the result, K.

    Returns:
        ids int64 ``[N, K]`` and log-probabilities fp32 ``[N, K]``, past the count -1 and -inf; the logarithm of the mass
        that is left, fp32 ``[N]``, which is 0 for a token without entries.

    Raises:
        ValueError: counts and data do not agree, or a record is malformed.
    """
    offsets = record_offsets(data, counts, vocab, bits, width)
    shape = (len(counts), width)
    ids = torch.full(shape, -1, dtype=torch.int64, device=data.device)
    log_probs = torch.full(shape, -torch.inf, device=data.device)
    log_tail_mass = torch.zeros(len(counts), device=data.device)
    malformed = torch.zeros(len(counts), dtype=torch.bool, device=data.device)
    sizes = record_sizes(counts, vocab, bits)
    for rows, count in rows_of_equal_count(counts, sizes):
        size = int(sizes[rows[0]])
        records = data[offsets[rows, None] + torch.arange(size, device=data.device)]
        malformed[rows], ids[rows, :count], log_probs[rows, :count], log_tail_mass[rows] = decode(
            records, count, vocab, bits
        )
    if bool(malformed.any()):
        refuse_record(int(malformed.nonzero()[0, 0]))
    return ids, log_probs, log_tail_mass


def rows_of_equal_count(counts: Tensor, sizes: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The rows with entries, some at a time, all of one count: (their numbers, the count)."""
    for count in torch.unique(counts[counts > 0]).tolist():
        rows = (counts == count).nonzero().squeeze(1)
        for chunk in rows.split(max(1, CHUNK_BITS // (8 * int(sizes[rows[0]])))):
            yield chunk, count


def encode(ids: Tensor, log_probs: Tensor, log_tail_mass: Tensor, vocab: int, bits: int) -> Tensor:
    """The records ``[n, bytes]`` of rows of ``count`` entries, ids ascending.

    Every step in float32 is one operation as the kernels have it, so that codes come out the same.
    """
    rows, count = ids.shape
    largest = log_probs.amax(-1, keepdim=True)
    distances = largest - log_probs
    log_head = largest.double() + (log_probs.double() - largest.double()).exp().sum(-1, keepdim=True).log()
    header = [head_codes(log_head.squeeze(1), log_tail_mass.double(), count == vocab)]
    if bits == 16:
        codes = distances.bfloat16().view(torch.int16).long()
    else:
        ranges = (distances.amax(-1, keepdim=True) * RANGE_UNIT).clamp(max=RANGES).ceil().clamp(min=1)
        reach = ranges / RANGE_UNIT
        shapes, codes = quantise(torch.minimum(distances, reach), reach, bits)
        header.append(ranges.long().squeeze(1) << 4 | shapes)
    low = int(low_bits(torch.tensor(count), vocab))
    unary = torch.zeros(rows, count + ((vocab - 1) >> low), dtype=torch.bool, device=ids.device)
    unary.scatter_(1, (ids >> low) + torch.arange(count, device=ids.device), True)
    fields = torch.cat([to_bits(torch.stack(header, 1), 16), to_bits(codes, bits), to_bits(ids, low), unary], 1)
    padded = torch.nn.functional.pad(fields, (0, -fields.shape[1] % 8))
    return from_bits(padded, 8).to(torch.uint8)


def decode(records: Tensor, count: int, vocab: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(malformed ``[n]``, ids ``[n, count]``, log-probabilities ``[n, count]``, log tail mass ``[n]``)."""
    low = int(low_bits(torch.tensor(count), vocab))
    lengths = [header_bytes(bits) * 8, count * bits, count * low, count + ((vocab - 1) >> low)]
    all_bits = to_bits(records.long(), 8)
    header, codes, lows, unary = torch.split(all_bits[:, : sum(lengths)], lengths, 1)
    malformed = (unary.sum(1, dtype=torch.int64) != count) | all_bits[:, sum(lengths) :].any(1)
    # To go on, a malformed row gets the first high bits there are.
    unary = torch.where(malformed[:, None], torch.arange(lengths[3], device=records.device) < count, unary)
    high = unary.nonzero()[:, 1].view(-1, count) - torch.arange(count, device=records.device)
    ids = high << low | from_bits(lows, low)
    malformed |= (ids[:, -1] >= vocab) | (ids.diff(dim=1) <= 0).any(1)

    fields = from_bits(header, 16)
    values = from_bits(codes, bits)
    malformed |= (values != 0).all(1)
    if bits == 16:
        malformed |= (values >= 0x7F80).any(1)
        distances = values.to(torch.int32).bitwise_left_shift(16).view(torch.float32).double()
    else:
        curvature = ((fields[:, 1:] & (SHAPES - 1)) + FLATTEST).double()
        ranges = (fields[:, 1:] >> 4).double() / RANGE_UNIT
        distances = ranges / whole_range(bits) * units(values.double(), curvature, bits)
    head = fields[:, 0]
    malformed |= (head != NO_TAIL) & (count == vocab)
    logit = (head - HEAD_MIDDLE).double() / HEAD_UNIT
    log_head = torch.nn.functional.logsigmoid(logit).masked_fill(head == NO_TAIL, 0)
    log_tail_mass = torch.nn.functional.logsigmoid(-logit).masked_fill(head == NO_TAIL, -torch.inf)
    log_probs = log_head[:, None] - torch.logsumexp(-distances, -1, keepdim=True) - distances
    return malformed, ids, log_probs.float(), log_tail_mass.float()


def head_codes(log_head: Tensor, log_tail: Tensor, whole: bool) -> Tensor:
    """The logit of the head mass in fixed point, int64 ``[n]``; ``whole``: the entries are the whole vocabulary."""
    codes = ((log_head - log_tail) * HEAD_UNIT + 0.5).floor().clamp(-HEAD_MIDDLE, HEAD_MIDDLE) + HEAD_MIDDLE
    return codes.masked_fill((log_tail == -torch.inf) | whole, NO_TAIL).long()


def whole_range(bits: int) -> int:
    """R in units: units are R / (16 N^2), with N the highest code."""
    return 16 * ((1 << bits) - 1) * ((1 << bits) - 1)


def units(codes: Tensor, curvature: int | Tensor, bits: int) -> Tensor:
    """The distances of codes: whole numbers, from 0 to ``whole_range``."""
    return codes * ((16 - curvature) * ((1 << bits) - 1) + curvature * codes)


def nearest(distances: Tensor, curvature: int, bits: int) -> Tensor:
    """The codes of distances in units, int64."""
    slope = (16 - curvature) * ((1 << bits) - 1)
    root = (slope**2 + 4 * curvature * distances).float().sqrt()
    return ((2 * distances).float() / (root + slope) + 0.5).long()


def quantise(distances: Tensor, reach: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The shape of each row with the smallest weighted squared error, int64 ``[n]``, and the codes ``[n, count]``."""
    half_units = distances * (torch.full_like(reach, 2 * whole_range(bits)) / reach)
    in_units = ((half_units.long() + 1) >> 1).clamp(max=whole_range(bits))
    weight_unit = {4: 512, 6: 32, 8: 2}[bits]
    weights = (0x3F800000 - (distances * 12102203).int()).view(torch.float32) * weight_unit
    errors, candidates = [], []
    for shape in range(SHAPES):
        codes = nearest(in_units, shape + FLATTEST, bits)
        error = (in_units - units(codes, shape + FLATTEST, bits)).float()
        errors.append((error * error * weights).long().sum(-1))
        candidates.append(codes)
    best = torch.stack(errors).argmin(0)
    return best, torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]


def to_bits(values: Tensor, width: int) -> Tensor:
    """The lowest ``width`` bits of integers ``[n, m]``, each from the least significant on: bool ``[n, m * width]``."""
    places = torch.arange(width, device=values.device)
    return (values.unsqueeze(-1) >> places & 1).bool().flatten(1)


def from_bits(bits: Tensor, width: int) -> Tensor:
    """What ``to_bits`` undoes, int64 ``[n, m]``."""
    if width == 0:
        return torch.zeros((), dtype=torch.int64, device=bits.device)
    places = torch.arange(width, device=bits.device)
    return (bits.view(len(bits), -1, width).long() << places).sum(-1)
