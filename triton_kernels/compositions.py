# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Logits made of those of several sources, tile by tile as they are read.

What a composition is stands in ``kdkernels/backends/rows.py``. It comes to a kernel as a tuple (others, strides, caps,
coefficients, offsets, class_bias, bounds, columns, values), or None. A kernel makes a source of each side, a pointer to
the row with that tuple brought to the row, and reads logits from it as from a row.
"""

import triton
import triton.language as tl

from .online_softmax import LN_2, LOG2_E, LOGIT_FLOOR, floored, load_label_logit, load_logits, row_pointer

MASKED_ENTRY = tl.constexpr(-1.0e30)  # stands for a masked entry: nothing that is added brings it back
MASKED_BELOW = tl.constexpr(-1.0e20)


@triton.jit
def row_source(pointer, row, stride, composition, WIDTH: tl.constexpr):
    """What `load_side` reads: (pointer to the row, the composition or None, the row's number)."""
    return row_pointer(pointer, row, stride, WIDTH), composition, row.to(tl.int64)


@triton.jit
def row_number(numbers, row, index: tl.constexpr, count: tl.constexpr):
    """Entry [row, index] of numbers [N, count]."""
    return tl.load(numbers + row * count + index)


@triton.jit
def read_source(
    pointer,
    columns,
    valid,
    wanted,
    cap,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(logits, tanh) as `load_logits` gives them; the floor, and nothing read, where the row's source is not `wanted`."""
    readable = wanted
    if MASKED:
        readable = wanted & valid
    return load_logits(pointer, columns, readable, cap, HAS_CAP, True, EVICTION, COMPUTE)


@triton.jit
def read_other(
    others,
    strides,
    caps,
    index: tl.constexpr,
    row,
    columns,
    valid,
    wanted,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Logits of a source that is not the side's own."""
    pointer = others[index] + row * strides[index]
    if caps[index] is None:
        logits, _ = read_source(pointer, columns, valid, wanted, 0.0, False, MASKED, EVICTION, COMPUTE)
    else:
        cap = tl.full((), caps[index], COMPUTE)
        logits, _ = read_source(pointer, columns, valid, wanted, cap, True, MASKED, EVICTION, COMPUTE)
    return logits


@triton.jit
def scaled(logits, factor):
    """factor * logits, where masked entries of a positive factor are masked for good."""
    threshold = tl.where(factor > 0, LOGIT_FLOOR, 2 * LOGIT_FLOOR)  # which nothing lies below
    return tl.where(logits <= threshold, MASKED_ENTRY, factor * logits)


@triton.jit
def finite(offset):
    """An offset, which is -inf where a source is not read; NaN stays NaN."""
    return tl.maximum(offset, MASKED_ENTRY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def unlike(columns, number, excluded):
    """Whether a number of the row is another than `excluded`, as a tile: one mask for all of it."""
    return tl.full(columns.shape, number, number.dtype) != excluded


@triton.jit
def load_side(
    source,
    columns,
    valid,
    cap,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """(logits, tanh) of a source as `load_logits` gives them of a row; the tanh is that of the side's own logits."""
    pointer, composition, row = source
    if composition is None:
        logits, tanh = load_logits(pointer, columns, valid, cap, HAS_CAP, MASKED, EVICTION, COMPUTE)
    else:
        logits, tanh = load_composed(pointer, composition, row, columns, valid, cap, HAS_CAP, MASKED, EVICTION, COMPUTE)
    return logits, tanh


@triton.jit
def load_composed(
    pointer,
    composition,
    row,
    columns,
    valid,
    cap,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """What a composition makes of the tile."""
    others, strides, caps, coefficients, offsets, class_bias, bounds, replaced, values = composition
    COUNT: tl.constexpr = len(others) + 1
    if coefficients is None:
        logits, tanh = load_logits(pointer, columns, valid, cap, HAS_CAP, MASKED, EVICTION, COMPUTE)
        found = tl.where(logits <= LOGIT_FLOOR, MASKED_ENTRY, logits)
    elif offsets is None:
        factor = row_number(coefficients, row, 0, COUNT)
        logits, tanh = read_source(
            pointer, columns, valid, unlike(columns, factor, 0.0), cap, HAS_CAP, MASKED, EVICTION, COMPUTE
        )
        found = scaled(logits, factor)
        for index in tl.static_range(COUNT - 1):
            factor = row_number(coefficients, row, index + 1, COUNT)
            logits = read_other(
                others,
                strides,
                caps,
                index,
                row,
                columns,
                valid,
                unlike(columns, factor, 0.0),
                MASKED,
                EVICTION,
                COMPUTE,
            )
            found += scaled(logits, factor)
    else:
        offset = row_number(offsets, row, 0, COUNT)
        wanted = unlike(columns, offset, float("-inf"))
        logits, tanh = read_source(pointer, columns, valid, wanted, cap, HAS_CAP, MASKED, EVICTION, COMPUTE)
        # The largest exponent so far, and the sum of the exponentials relative to it.
        top = scaled(logits, row_number(coefficients, row, 0, COUNT)) + finite(offset)
        total = tl.full(top.shape, 1.0, COMPUTE)
        for index in tl.static_range(COUNT - 1):
            offset = row_number(offsets, row, index + 1, COUNT)
            wanted = unlike(columns, offset, float("-inf"))
            logits = read_other(others, strides, caps, index, row, columns, valid, wanted, MASKED, EVICTION, COMPUTE)
            exponent = scaled(logits, row_number(coefficients, row, index + 1, COUNT))
            exponent += finite(offset)
            higher = tl.maximum(top, exponent, propagate_nan=tl.PropagateNan.ALL)
            total = total * tl.exp2((top - higher) * LOG2_E) + tl.exp2((exponent - higher) * LOG2_E)
            top = higher
        found = top + tl.log2(total) * LN_2
    if class_bias is not None:
        if MASKED:
            found += tl.load(class_bias + columns, mask=valid, other=0.0)
        else:
            found += tl.load(class_bias + columns)
    if bounds is not None:
        lowest = row_number(bounds, row, 0, 2)
        highest = row_number(bounds, row, 1, 2)
        found = tl.where(found > highest, highest, found)
        found = tl.where((found < lowest) & (found > MASKED_BELOW), lowest, found)
    if replaced is not None:
        REPLACED: tl.constexpr = len(values)
        for index in tl.static_range(REPLACED):
            place = tl.load(replaced[index] + row * REPLACED)
            found = tl.where(columns == place, tl.load(values[index] + row * REPLACED), found)
    found = floored(found)
    if MASKED:
        found = tl.where(valid, found, LOGIT_FLOOR)
    return found, tanh


@triton.jit
def load_side_label(source, label, vocab_size, cap, HAS_CAP: tl.constexpr, COMPUTE: tl.constexpr):
    """The label's logit as `load_label_logit` gives it of a row."""
    pointer, composition, row = source
    if composition is None:
        logit = load_label_logit(pointer, label, vocab_size, cap, HAS_CAP, COMPUTE)
    else:
        inside = (label >= 0) & (label < vocab_size)
        logit, _ = load_composed(pointer, composition, row, label, inside, cap, HAS_CAP, True, "", COMPUTE)
        logit = tl.where(inside, logit, float("nan"))
    return logit
