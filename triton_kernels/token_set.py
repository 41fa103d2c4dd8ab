# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The log-probability that a token is one of a set, and its gradient.

One program handles one row. Two online softmaxes run side by side, one over the whole row and one over the members of the
set, each with a maximum of its own: so that a set that is unlikely altogether loses no digits. With p the probabilities and r
those within the set alone, the gradient to the tempered logits is r - p.
"""

import triton
import triton.language as tl

from .divergence import store_gradient, zero_row
from .online_softmax import (
    LN_2,
    LOG2_E,
    LOGIT_FLOOR,
    advance_maximum,
    lane_sum,
    load_logits,
    merge_maximum,
    row_pointer,
    row_scalar,
    tile_columns,
)


@triton.jit
def load_members(members, columns, valid, MASKED: tl.constexpr):
    """Which entries are of the set; none outside the row."""
    if MASKED:
        found = tl.load(members + columns, mask=valid, other=0)
    else:
        found = tl.load(members + columns)
    return found != 0


@triton.jit
def advance_sum(maximum, total, logits, scale, counted):
    """The lanes' maxima, and sums of exponentials relative to them, over the entries of one more tile that count."""
    maximum, shift, exponents = advance_maximum(maximum, tl.where(counted, logits, LOGIT_FLOOR), scale)
    return maximum, total * tl.exp2(shift) + lane_sum(tl.where(counted, tl.exp2(exponents), 0.0))


@triton.jit
def advance(
    state, pointer, members, columns, vocab_size, scale, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(maximum, sum) of the row and of the set over one more tile."""
    maximum, total, inner_maximum, inner_total = state
    valid = columns < vocab_size
    logits, _ = load_logits(pointer, columns, valid, cap, HAS_CAP, MASKED, "", COMPUTE)
    maximum, total = advance_sum(maximum, total, logits, scale, valid)
    inside = load_members(members, columns, valid, MASKED)
    inner_maximum, inner_total = advance_sum(inner_maximum, inner_total, logits, scale, inside)
    return maximum, total, inner_maximum, inner_total


@triton.jit
def write_gradient(
    gradient_row, pointer, members, columns, vocab_size, largest, factor, inner_largest, inner_factor, scale, cap,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    valid = columns < vocab_size
    logits, tanh = load_logits(pointer, columns, valid, cap, HAS_CAP, MASKED, "", COMPUTE)
    inside = load_members(members, columns, valid, MASKED)
    # Above the largest of the set lie entries that are none of it.
    inner = tl.exp2(tl.minimum(logits - inner_largest, 0.0) * scale) * inner_factor
    gradient = tl.where(inside, inner, 0.0) - tl.exp2((logits - largest) * scale) * factor
    store_gradient(gradient_row + columns, gradient, logits, tanh, valid, HAS_CAP, MASKED)


@triton.jit(do_not_specialize=["stride", "gradient_stride", "vocab_size"])
def token_set_kernel(
    logits,
    gradient,
    stride: tl.int64,
    gradient_stride: tl.int64,
    vocab_size,
    members,
    values,
    grad_values,
    active,
    temperatures,
    temperature: tl.float64,
    softcap: tl.float64,
    HAS_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the logarithm of the set's probability and, where a buffer is given, the gradient to the logits.

    logits: [N, V], adjacent columns, row strides in vectors of WIDTH logits; gradient: the same, or None; it may be `logits`.
    members: bool [V]. values: [N] in COMPUTE; grad_values: [N], given with `gradient`. active: bool [N]; temperatures: [N];
    each may be None. Rows that are not active are all 0.
    """
    row = tl.program_id(0)
    gradient_row = gradient
    if gradient is not None:
        gradient_row = row_pointer(gradient, row, gradient_stride, WIDTH)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(values + row, 0.0)
            zero_row(gradient_row, tl.arange(0, LANES), vocab_size, LANES)
            return
    tau = row_scalar(temperature, temperatures, row, COMPUTE)
    scale = LOG2_E / tau
    cap = tl.full((), softcap, COMPUTE)
    pointer = row_pointer(logits, row, stride, WIDTH)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    rest_columns = tile_columns(1, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    floor = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    zero = tl.zeros((LANES,), COMPUTE)
    state = (floor, zero, floor, zero)
    for start in range(0, whole, TILE):
        state = advance(state, pointer, members, start + columns, vocab_size, scale, cap, HAS_CAP, False, COMPUTE)
    for start in range(whole, vocab_size, LANES * WIDTH):
        state = advance(state, pointer, members, start + rest_columns, vocab_size, scale, cap, HAS_CAP, True, COMPUTE)
    maximum, total, inner_maximum, inner_total = state
    largest, shift = merge_maximum(maximum, scale)
    total = tl.sum(total * tl.exp2(shift), axis=0)
    inner_largest, shift = merge_maximum(inner_maximum, scale)
    inner_total = tl.sum(inner_total * tl.exp2(shift), axis=0)
    tl.store(values + row, (inner_largest - largest) / tau + tl.log2(inner_total / total) * LN_2)

    if gradient is not None:
        upstream = tl.load(grad_values + row).to(COMPUTE) / tau
        factor = upstream / total
        inner_factor = upstream / inner_total
        for start in range(0, whole, TILE):
            write_gradient(
                gradient_row, pointer, members, start + columns, vocab_size, largest, factor, inner_largest,
                inner_factor, scale, cap, HAS_CAP, False, COMPUTE,
            )  # fmt: skip
        for start in range(whole, vocab_size, LANES * WIDTH):
            write_gradient(
                gradient_row, pointer, members, start + rest_columns, vocab_size, largest, factor, inner_largest,
                inner_factor, scale, cap, HAS_CAP, True, COMPUTE,
            )  # fmt: skip
