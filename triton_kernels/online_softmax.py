# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Pieces that every row kernel shares: tiles of logits, and online softmax statistics.

A tile is [UNROLL, LANES, WIDTH]. Every lane (one GPU thread) holds its own running maximum and sums, [LANES] vectors,
so a sweep needs no exchange between threads; the lanes are merged once per row. Exponentials are taken in base 2, with
log2(e) and the temperature folded into one factor: exp((x - m) / tau) = exp2((x - m) * scale), scale = log2(e) / tau.
The maximum is subtracted first, so large logits lose no accuracy. Maxima start at LOGIT_FLOOR, which no logit is below.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Raw logits below the floor (-inf and finfo.min masks) are lifted to it: their probability is still 0, and every
# difference of logits stays finite.
LOGIT_FLOOR = tl.constexpr(-1.0e5)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_scalar(default, per_row, row, COMPUTE: tl.constexpr):
    """A hyper-parameter of this row in COMPUTE: per_row[row], or `default` where per_row is None."""
    if per_row is None:
        value = tl.full((), default, COMPUTE)
    else:
        value = tl.load(per_row + row).to(COMPUTE)
    return value


@triton.jit
def row_pointer(pointer, row, stride, WIDTH: tl.constexpr):
    """The first logit of a row. `stride` counts vectors of WIDTH logits: so the compiler knows how rows are aligned."""
    return pointer + row.to(tl.int64) * stride * WIDTH


@triton.jit
def tile_columns(UNROLL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Column of each element of the tile that starts at column 0, int32 [UNROLL, LANES, WIDTH]."""
    step = tl.arange(0, UNROLL)[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    return (step * LANES + lane) * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def soft_cap(logits, cap):
    """(cap * tanh(logits / cap), tanh(logits / cap)); the derivative of the first is 1 - tanh ** 2."""
    ratio = logits / cap
    decay = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2_E))
    tanh = (1.0 - decay) / (1.0 + decay)
    tanh = tl.where(ratio < 0, -tanh, tanh)
    if logits.dtype != tl.float64:
        # 1 - decay cancels for small ratios; there the Taylor series is good to 5e-8
        square = ratio * ratio
        series = -17.0 / 315.0 + square * (62.0 / 2835.0)
        series = -1.0 / 3.0 + square * (2.0 / 15.0 + square * series)
        tanh = tl.where(square < 0.09, ratio + ratio * square * series, tanh)
    return tanh * cap, tanh


@triton.jit
def floored(logits):
    """Logits lifted to LOGIT_FLOOR; NaN stays NaN."""
    return tl.maximum(logits, LOGIT_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(
    pointer,
    columns,
    valid,
    cap,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(logits, tanh): soft-capped, floored logits in COMPUTE, and the tanh of the cap (the logits if there is no cap).

    MASKED tiles reach past the row: elements that are not `valid` get the floor and must be left out of every sum.
    """
    if MASKED:
        logits = tl.load(pointer + columns, mask=valid, other=0.0, eviction_policy=EVICTION).to(COMPUTE)
    else:
        logits = tl.load(pointer + columns, eviction_policy=EVICTION).to(COMPUTE)
    return capped_logits(logits, valid, cap, HAS_CAP, MASKED)


@triton.jit
def capped_logits(logits, valid, cap, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """What ``load_logits`` makes of raw logits in the compute type."""
    tanh = logits
    if HAS_CAP:
        logits, tanh = soft_cap(logits, cap)
    logits = floored(logits)
    if MASKED:
        logits = tl.where(valid, logits, LOGIT_FLOOR)
    return logits, tanh


@triton.jit
def load_probabilities(
    pointer, columns, valid, largest, factor, scale, cap, HAS_CAP: tl.constexpr, COMPUTE: tl.constexpr
):
    """(probabilities, 0 where not `valid`; logits; tanh) from the row's largest logit and 1 / sum of exponentials."""
    logits, tanh = load_logits(pointer, columns, valid, cap, HAS_CAP, True, "", COMPUTE)
    return tl.where(valid, tl.exp2((logits - largest) * scale) * factor, 0.0), logits, tanh


@triton.jit
def load_label_logit(pointer, label, vocab_size, cap, HAS_CAP: tl.constexpr, COMPUTE: tl.constexpr):
    """The label's logit; NaN for a label outside [0, vocab_size), which so shows and reads no foreign memory."""
    inside = (label >= 0) & (label < vocab_size)
    logit = tl.load(pointer + label, mask=inside, other=float("nan")).to(COMPUTE)
    if HAS_CAP:
        logit, _ = soft_cap(logit, cap)
    return floored(logit)


@triton.jit
def lane_max(tile):
    """[UNROLL, LANES, WIDTH] -> [LANES]."""
    return tl.max(tl.max(tile, axis=0), axis=1)


@triton.jit
def lane_min(tile):
    """[UNROLL, LANES, WIDTH] -> [LANES]."""
    return tl.min(tl.min(tile, axis=0), axis=1)


@triton.jit
def lane_sum(tile):
    """[UNROLL, LANES, WIDTH] -> [LANES]."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def advance_maximum(maximum, logits, scale):
    """The running maximum over one more tile of logits.

    Returns the new maximum [LANES], the shift (old - new) * scale [LANES] by which the exponents of sums kept so far
    move, and the tile's exponents (logits - new) * scale. The scale is a scalar, or each lane has its own.
    """
    new = tl.maximum(maximum, lane_max(logits))
    return new, (maximum - new) * scale, (logits - new[None, :, None]) * over_lanes(scale)


@triton.jit
def over_lanes(number):
    """A number of each lane, [LANES], in a form that goes with tiles; a scalar remains one."""
    if len(number.shape) == 1:
        number = number[None, :, None]
    return number


@triton.jit
def powers_of_two(exponents, valid, MASKED: tl.constexpr):
    """2 ** exponents, and 0 outside the row."""
    powers = tl.exp2(exponents)
    if MASKED:
        powers = tl.where(valid, powers, 0.0)
    return powers


@triton.jit
def advance_sum(maximum, total, logits, valid, scale):
    """The running maximum and the sum of exponentials, both [LANES], over one more tile of logits."""
    maximum, shift, exponents = advance_maximum(maximum, logits, scale)
    return maximum, total * tl.exp2(shift) + lane_sum(powers_of_two(exponents, valid, True))


@triton.jit
def merge_maximum(maximum, scale):
    """The row's maximum from its lanes', and by how much the exponents of each lane's sums move: scalar, [LANES]."""
    row_maximum = tl.max(maximum, axis=0)
    return row_maximum, (maximum - row_maximum) * scale


@triton.jit
def log2_of(x, FAST_LOG: tl.constexpr):
    """log2; FAST_LOG takes the hardware's instruction (NVIDIA, fp32; absolute error near 1 below 2 ** -22)."""
    if FAST_LOG:
        logarithm = libdevice.fast_log2f(x)
    else:
        logarithm = tl.log2(x)
    return logarithm


@triton.jit
def quotient_of(x, y, FAST: tl.constexpr):
    """x / y for y in [2 ** -126, 2 ** 126]; FAST leaves out what other divisors need (NVIDIA, fp32; both within 2 ulp)."""
    if FAST:
        quotient = libdevice.fast_dividef(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def round_to(values, DTYPE: tl.constexpr):
    """Values in DTYPE, rounded to nearest. Triton's interpreter truncates fp32 to bf16, so it gets them rounded."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        values = values.to(tl.float32)
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(DTYPE)


# Whether TRITON_INTERPRET=1 was set when the kernels were made: they then run on CPU tensors.
INTERPRETED = tl.constexpr(not isinstance(round_to, triton.JITFunction))
