# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The largest logits of a row, and draws from its softmax.

The k-th largest logit is found digit by digit, from the top, by histograms of integers in the order of the logits; one
sweep per digit and a last one, which stores what is named and sums the exponentials of the rest. From the second sweep on
a row comes from the cache.
"""

import triton
import triton.language as tl

from .online_softmax import LOG2_E, LOGIT_FLOOR, floored, row_pointer, soft_cap

DIGIT_BITS = tl.constexpr(8)
DIGITS = tl.constexpr(256)


@triton.jit
def load_raw(row, columns, vocab_size, COMPUTE: tl.constexpr):
    """(logits before the softcap, which of them lie in the row). Outside they are -inf."""
    valid = columns < vocab_size
    return tl.load(row + columns, mask=valid, other=float("-inf")).to(COMPUTE), valid


@triton.jit
def effective(logits, cap, HAS_CAP: tl.constexpr):
    """The logits as the softmax sees them."""
    if HAS_CAP:
        logits, _ = soft_cap(logits, cap)
    return floored(logits)


@triton.jit
def ordered_keys(logits, SHIFT: tl.constexpr):
    """Unsigned integers in the order of the logits, 0 for those that are never named: at the floor, below it, and NaN.

    SHIFT: trailing bits that logits of this dtype do not use.
    """
    logits = tl.where(logits == 0, 0.0, logits)  # -0 equals 0
    if logits.dtype == tl.float64:
        bits = logits.to(tl.uint64, bitcast=True)
        keys = tl.where(bits >> 63 != 0, bits ^ 0xFFFFFFFFFFFFFFFF, bits | 0x8000000000000000)
    else:
        bits = logits.to(tl.uint32, bitcast=True)
        keys = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(logits > LOGIT_FLOOR, keys >> SHIFT, 0)


@triton.jit
def count_digits(
    row, vocab_size, prefix, BELOW: tl.constexpr, COMPUTE: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr
):
    """How often each value of the digit that has BELOW bits after it occurs, among the keys that begin like the prefix."""
    counts = tl.zeros((DIGITS,), tl.int32)
    for start in range(0, vocab_size, TILE):
        logits, _ = load_raw(row, start + tl.arange(0, TILE), vocab_size, COMPUTE)
        keys = ordered_keys(logits, SHIFT)
        # In two steps: no shift may be as wide as the key.
        alike = (keys >> BELOW >> DIGIT_BITS == prefix >> BELOW >> DIGIT_BITS) & (keys != 0)
        counts += tl.histogram(((keys >> BELOW) & (DIGITS - 1)).to(tl.int32), DIGITS, mask=alike)
    return counts


@triton.jit(do_not_specialize=["stride", "vocab_size", "k"])
def topk_kernel(
    source,
    stride: tl.int64,
    vocab_size,
    k,
    logits_out,
    ids_out,
    rest_out,
    temperature: tl.float64,
    softcap: tl.float64,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    SHIFT: tl.constexpr,
    PASSES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row. source: [N, V] logits, adjacent columns, row stride in vectors of WIDTH logits.

    logits_out [N, k] in COMPUTE, before the softcap, and ids_out int64 [N, k]: the k largest by rising id, of equal ones
    those of the lowest ids; what is not written had no entry. rest_out [N, 2]: of all other logits, softcapped, the
    maximum and the sum of exponentials relative to it.
    """
    row = tl.program_id(0).to(tl.int64)
    pointer = row_pointer(source, tl.program_id(0), stride, WIDTH)
    scale = tl.full((), LOG2_E, COMPUTE) / tl.full((), temperature, COMPUTE)
    cap = tl.full((), softcap, COMPUTE)
    columns = tl.arange(0, TILE)
    bins = tl.arange(0, DIGITS)

    # prefix: the digits of the k-th largest key so far; wanted: how many of those that begin with it are still to name.
    wanted = k
    prefix = ordered_keys(tl.full((), 0.0, COMPUTE), SHIFT) & 0
    for digit in tl.static_range(PASSES):
        counts = count_digits(
            pointer, vocab_size, prefix, DIGIT_BITS * (PASSES - 1 - digit), COMPUTE, SHIFT, TILE
        )  # fmt: skip
        if digit == 0:
            wanted = tl.minimum(wanted, tl.sum(counts, axis=0))
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        found = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), axis=0) - 1, 0)
        wanted -= tl.sum(tl.where(bins > found, counts, 0), axis=0)
        prefix |= found.to(prefix.dtype) << (DIGIT_BITS * (PASSES - 1 - digit))

    named_before = 0
    equal_before = 0
    maximum = tl.full((TILE,), LOGIT_FLOOR, COMPUTE)
    total = tl.zeros((TILE,), COMPUTE)
    for start in range(0, vocab_size, TILE):
        logits, valid = load_raw(pointer, start + columns, vocab_size, COMPUTE)
        keys = ordered_keys(logits, SHIFT)
        equal = ((keys == prefix) & (keys != 0)).to(tl.int32)
        named = (keys > prefix) | ((equal != 0) & (equal_before + tl.cumsum(equal, axis=0) <= wanted))
        place = named_before + tl.cumsum(named.to(tl.int32), axis=0) - 1
        tl.store(logits_out + row * k + place, logits, mask=named)
        tl.store(ids_out + row * k + place, (start + columns).to(tl.int64), mask=named)
        named_before += tl.sum(named.to(tl.int32), axis=0)
        equal_before += tl.sum(equal, axis=0)
        rest = valid & ~named
        values = effective(logits, cap, HAS_CAP)
        new = tl.maximum(maximum, tl.where(rest, values, LOGIT_FLOOR))
        total = total * tl.exp2((maximum - new) * scale) + tl.where(rest, tl.exp2((values - new) * scale), 0.0)
        maximum = new
    row_maximum = tl.max(maximum, axis=0)
    tl.store(rest_out + row * 2, row_maximum)
    tl.store(rest_out + row * 2 + 1, tl.sum(total * tl.exp2((maximum - row_maximum) * scale), axis=0))


@triton.jit(do_not_specialize=["stride", "vocab_size"])
def block_sums_kernel(
    source,
    stride: tl.int64,
    vocab_size,
    maxima,
    sums,
    temperature: tl.float64,
    softcap: tl.float64,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """sums: float64 [N, blocks]: of the exponentials in each block of a row, relative to maxima [N]; without masked ones."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    pointer = row_pointer(source, row, stride, WIDTH)
    scale = tl.full((), LOG2_E, COMPUTE) / tl.full((), temperature, COMPUTE)
    logits, valid = load_raw(pointer, block * BLOCK + tl.arange(0, BLOCK), vocab_size, COMPUTE)
    values = effective(logits, tl.full((), softcap, COMPUTE), HAS_CAP)
    powers = tl.exp2((values - tl.load(maxima + row)) * scale)
    powers = tl.where(valid & ~(values <= LOGIT_FLOOR), powers, 0.0)
    tl.store(sums + row.to(tl.int64) * tl.num_programs(1) + block, tl.sum(powers.to(tl.float64), axis=0))


@triton.jit(do_not_specialize=["stride", "vocab_size"])
def draw_kernel(
    source,
    stride: tl.int64,
    vocab_size,
    blocks,
    fractions,
    ids,
    logits_out,
    temperature: tl.float64,
    softcap: tl.float64,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One draw: the id at a fraction (float64 [N, n]) of the probability of a block (int64 [N, n]), and its logit.

    ids: int64 [N, n]; logits_out: [N, n] in COMPUTE, softcapped.
    """
    row = tl.program_id(0)
    draw = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    pointer = row_pointer(source, row, stride, WIDTH)
    scale = tl.full((), LOG2_E, COMPUTE) / tl.full((), temperature, COMPUTE)
    start = tl.load(blocks + draw) * BLOCK
    places = tl.arange(0, BLOCK)
    logits, valid = load_raw(pointer, start + places, vocab_size, COMPUTE)
    values = effective(logits, tl.full((), softcap, COMPUTE), HAS_CAP)
    # Relative to the block's own maximum, so that something of it is left however small it is.
    powers = tl.exp2((values - tl.max(values, axis=0)) * scale)
    powers = tl.where(valid & ~(values <= LOGIT_FLOOR), powers, 0.0).to(tl.float64)
    upto = tl.cumsum(powers, axis=0)
    target = tl.load(fractions + draw) * tl.sum(powers, axis=0)
    last = tl.max(tl.where(powers > 0, places, 0), axis=0)
    place = tl.minimum(tl.sum((upto <= target).to(tl.int32), axis=0), last)
    tl.store(ids + draw, start + place)
    tl.store(logits_out + draw, tl.sum(tl.where(places == place, values, 0.0), axis=0))
