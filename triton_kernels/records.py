# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Decoding records of truncated teachers; `csrc/math/records.h` describes their bytes.

One program decodes one record into a row of memory. Bits are loaded by the byte and never beyond the record, entries are
stored never beyond its count: whatever the bytes hold, only the values decoded from them can be wrong.
"""

import triton
import triton.language as tl

from .online_softmax import LN_2, LOG2_E

SHAPES = tl.constexpr(16)
FLATTEST = tl.constexpr(-3)
RANGE_UNIT = tl.constexpr(128.0)
HEAD_UNIT = tl.constexpr(1024.0)
HEAD_MIDDLE = tl.constexpr(32767)
NO_TAIL = tl.constexpr(65535)


@triton.jit
def low_bits(count, vocab_size):
    """floor(log2(vocab_size / count))."""
    bits = 0
    for bit in tl.static_range(1, 25):
        bits += ((vocab_size >> bit) >= count).to(tl.int32)
    return bits


@triton.jit
def load_fields(record, size, bits, width, valid, BYTES: tl.constexpr):
    """Fields of `width` bits that start at `bits` and touch BYTES bytes at most, int32."""
    byte = bits >> 3
    word = tl.zeros_like(bits).to(tl.uint32)
    for place in tl.static_range(BYTES):
        part = tl.load(record + byte + place, mask=valid & (byte + place < size), other=0)
        word |= part.to(tl.uint32) << (8 * place)
    return ((word >> (bits & 7).to(tl.uint32)) & ((1 << width) - 1).to(tl.uint32)).to(tl.int32)


@triton.jit
def distances(record, size, start, slope, curvature, per_unit, entries, count, BITS: tl.constexpr):
    """(distances of log p from the row's largest in log 2, codes) of a tile of entries."""
    BYTES: tl.constexpr = 2 if BITS == 6 or BITS == 16 else 1
    codes = load_fields(record, size, start + entries * BITS, tl.full((), BITS, tl.int32), entries < count, BYTES)
    if BITS == 16:
        nats = (codes << 16).to(tl.float32, bitcast=True)
    else:
        nats = (codes * (slope + curvature * codes)).to(tl.float32) * per_unit
    return nats, codes


@triton.jit
def decode_record(record, count, vocab_size, ids, log_probs, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Decodes the record of `count` > 0 entries into `ids` (int32, ascending) and `log_probs` (fp32).

    record: pointer to its first byte; count, vocab_size: int32 scalars, count <= vocab_size. The rows are visible to the
    whole program afterwards. Returns (log tail mass fp32, whether the record is well formed).
    """
    HEADER: tl.constexpr = 2 if BITS == 16 else 4
    low = low_bits(count, vocab_size)
    codes_start = HEADER * 8
    lows_start = codes_start + count * BITS
    highs_start = lows_start + count * low
    size = (highs_start + count + ((vocab_size - 1) >> low) + 7) >> 3
    columns = tl.arange(0, BLOCK)

    # Entry i of the ids is the one bit at position high + i of the unary part, which runs to the end of the padding.
    found = 0
    for start in range(highs_start, size * 8, BLOCK):
        bits = start + columns
        inside = bits < size * 8
        ones = load_fields(record, size, bits, tl.full((), 1, tl.int32), inside, 1)
        entries = found + tl.cumsum(ones, axis=0) - 1
        stored = (ones == 1) & (entries < count)
        lows = load_fields(record, size, lows_start + entries * low, low, stored, 4)
        tl.store(ids + entries, ((bits - highs_start - entries) << low) | lows, mask=stored)
        found += tl.sum(ones, axis=0)
    valid = found == count

    slope = 0
    curvature = 0
    per_unit = 0.0
    if BITS != 16:
        scale = tl.load(record + 2).to(tl.int32) | (tl.load(record + 3).to(tl.int32) << 8)
        TOP: tl.constexpr = (1 << BITS) - 1
        curvature = (scale & (SHAPES - 1)) + FLATTEST
        slope = (16 - curvature) * TOP
        per_unit = (scale >> 4).to(tl.float32) * (1.0 / (RANGE_UNIT * 16 * TOP * TOP))
    largest = 0
    refused = 0
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        entries = start + columns
        nats, codes = distances(
            record, size, codes_start, slope, curvature, per_unit, entries, count, BITS
        )  # fmt: skip
        sums += tl.where(entries < count, tl.exp2(nats * -LOG2_E), 0.0)
        largest += tl.sum(((entries < count) & (codes == 0)).to(tl.int32), axis=0)
        if BITS == 16:
            refused += tl.sum((codes >= 0x7F80).to(tl.int32), axis=0)
    head = tl.load(record).to(tl.int32) | (tl.load(record + 1).to(tl.int32) << 8)
    valid = valid & (largest > 0) & (refused == 0) & ((head == NO_TAIL) | (count < vocab_size))

    logit = (head - HEAD_MIDDLE).to(tl.float64) / HEAD_UNIT
    rest = tl.log(1.0 + tl.exp(-tl.abs(logit)))
    log_head = tl.where(head == NO_TAIL, 0.0, tl.minimum(logit, 0.0) - rest)
    log_tail_mass = tl.where(head == NO_TAIL, -float("inf"), tl.minimum(-logit, 0.0) - rest)
    log_scale = log_head.to(tl.float32) - tl.log2(tl.sum(sums, axis=0)) * LN_2
    for start in range(0, count, BLOCK):
        entries = start + columns
        nats, codes = distances(
            record, size, codes_start, slope, curvature, per_unit, entries, count, BITS
        )  # fmt: skip
        tl.store(log_probs + entries, log_scale - nats, mask=entries < count)

    tl.debug_barrier()
    unordered = 0
    for start in range(0, count, BLOCK):
        entries = start + columns
        here = tl.load(ids + entries, mask=valid & (entries < count), other=0)
        before = tl.load(ids + entries - 1, mask=valid & (entries < count) & (entries > 0), other=-1)
        wrong = (entries < count) & ((here <= before) | (here >= vocab_size))
        unordered += tl.sum(wrong.to(tl.int32), axis=0)
    return log_tail_mass.to(tl.float32), valid & (unordered == 0)


@triton.jit(do_not_specialize=["vocab_size", "width"])
def unpack_records_kernel(
    data,
    offsets,
    counts,
    vocab_size,
    width,
    ids,
    log_probs,
    log_tail_mass,
    well_formed,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One record into one row.

    data: uint8; offsets: int64 [N]; counts: int32 [N], at most width and vocab_size.
    ids: int32 [N, width]; log_probs: fp32 [N, width]; past the count -1 and -inf. log_tail_mass: fp32 [N].
    well_formed: int32 [N], 0 where a record is malformed; its row is then undefined.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    row_ids = ids + row * width
    row_log_probs = log_probs + row * width
    tail = tl.zeros((), tl.float32)
    valid = count == 0
    if count > 0:
        tail, valid = decode_record(
            data + tl.load(offsets + row), count, vocab_size, row_ids, row_log_probs, BITS, BLOCK
        )  # fmt: skip
    tl.store(log_tail_mass + row, tail)
    tl.store(well_formed + row, valid.to(tl.int32))
    columns = tl.arange(0, BLOCK)
    for start in range(count, width, BLOCK):
        tl.store(row_ids + start + columns, -1, mask=start + columns < width)
        tl.store(row_log_probs + start + columns, -float("inf"), mask=start + columns < width)
