# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Mean and standard deviation of each row of logits, and what a loss that takes the deviation for its temperature adds to the
gradient.

One program handles one row. The moments take one sweep: each lane merges the mean and the squares about it of one tile after
another (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979), so that
nothing cancels, however far from 0 the logits lie.
"""

import triton
import triton.language as tl

from .online_softmax import lane_sum, round_to, row_pointer, tile_columns


@triton.jit
def load_entries(pointer, columns, valid, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """Entries of a row as they are, 0 outside it."""
    if MASKED:
        entries = tl.load(pointer + columns, mask=valid, other=0.0)
    else:
        entries = tl.load(pointer + columns)
    return entries.to(COMPUTE)


@triton.jit
def about(entries, mean, valid, MASKED: tl.constexpr):
    """Entries less a mean, 0 outside the row."""
    distances = entries - mean
    if MASKED:
        distances = tl.where(valid, distances, 0.0)
    return distances


@triton.jit
def advance_moments(count, mean, squares, entries, share, valid, MASKED: tl.constexpr):
    """(count, mean, sum of squares about it) of each lane over one more tile, of which it holds `share` entries."""
    share_mean = lane_sum(entries) / tl.maximum(share, 1.0)
    distances = about(entries, share_mean[None, :, None], valid, MASKED)
    shift = share_mean - mean
    together = count + share
    part = share / tl.maximum(together, 1.0)
    squares += lane_sum(distances * distances) + shift * shift * (count * part)
    return together, mean + shift * part, squares


@triton.jit(do_not_specialize=["stride", "vocab_size"])
def row_deviation_kernel(
    logits,
    stride: tl.int64,
    vocab_size,
    least: tl.float64,
    means,
    deviations,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its mean and its standard deviation by 1 / (V - 1), `least` at least.

    logits: [N, V], adjacent columns, row stride in vectors of WIDTH logits. means, deviations: [N] in COMPUTE.
    """
    row = tl.program_id(0)
    pointer = row_pointer(logits, row, stride, WIDTH)
    count = tl.zeros((LANES,), COMPUTE)
    mean = tl.zeros((LANES,), COMPUTE)
    squares = tl.zeros((LANES,), COMPUTE)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    share = tl.full((LANES,), UNROLL * WIDTH, COMPUTE)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        entries = load_entries(pointer, start + columns, columns >= 0, False, COMPUTE)
        count, mean, squares = advance_moments(count, mean, squares, entries, share, columns >= 0, False)
    rest_columns = tile_columns(1, LANES, WIDTH)
    for start in range(whole, vocab_size, LANES * WIDTH):
        valid = start + rest_columns < vocab_size
        entries = load_entries(pointer, start + rest_columns, valid, True, COMPUTE)
        count, mean, squares = advance_moments(count, mean, squares, entries, lane_sum(valid.to(COMPUTE)), valid, True)
    size = tl.full((), vocab_size, COMPUTE)
    row_mean = tl.sum(count * mean, axis=0) / size
    distance = mean - row_mean
    total = tl.sum(tl.where(count > 0, squares + count * distance * distance, 0.0), axis=0)
    deviation = tl.sqrt(total / tl.maximum(size - 1.0, 1.0))
    lowest = tl.full((), least, COMPUTE)
    tl.store(means + row, row_mean)
    tl.store(deviations + row, tl.where(deviation < lowest, lowest, deviation))  # NaN stays


@triton.jit(do_not_specialize=["stride", "gradient_stride", "vocab_size"])
def row_deviation_backward_kernel(
    logits,
    gradient,
    stride: tl.int64,
    gradient_stride: tl.int64,
    vocab_size,
    means,
    deviations,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: takes ``<g, s - mean> (s - mean) / ((V - 1) deviation ** 2)`` off the gradient g, in place.

    logits, gradient: [N, V], as above. means, deviations: [N] in COMPUTE.
    """
    row = tl.program_id(0)
    pointer = row_pointer(logits, row, stride, WIDTH)
    gradients = row_pointer(gradient, row, gradient_stride, WIDTH)
    mean = tl.load(means + row)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    rest_columns = tile_columns(1, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    product = tl.zeros((LANES,), COMPUTE)
    for start in range(0, whole, TILE):
        distances = about(
            load_entries(pointer, start + columns, columns >= 0, False, COMPUTE), mean, columns >= 0, False
        )
        product += lane_sum(load_entries(gradients, start + columns, columns >= 0, False, COMPUTE) * distances)
    for start in range(whole, vocab_size, LANES * WIDTH):
        valid = start + rest_columns < vocab_size
        distances = about(load_entries(pointer, start + rest_columns, valid, True, COMPUTE), mean, valid, True)
        product += lane_sum(load_entries(gradients, start + rest_columns, valid, True, COMPUTE) * distances)
    deviation = tl.load(deviations + row)
    size = tl.full((), vocab_size, COMPUTE)
    factor = tl.sum(product, axis=0) / deviation / deviation / tl.maximum(size - 1.0, 1.0)
    for start in range(0, whole, TILE):
        entries = load_entries(pointer, start + columns, columns >= 0, False, COMPUTE)
        old = load_entries(gradients, start + columns, columns >= 0, False, COMPUTE)
        new = old - factor * (entries - mean)
        tl.store(gradients + start + columns, round_to(new, gradient.dtype.element_ty))
    for start in range(whole, vocab_size, LANES * WIDTH):
        valid = start + rest_columns < vocab_size
        entries = load_entries(pointer, start + rest_columns, valid, True, COMPUTE)
        old = load_entries(gradients, start + rest_columns, valid, True, COMPUTE)
        new = old - factor * (entries - mean)
        tl.store(gradients + start + rest_columns, round_to(new, gradient.dtype.element_ty), mask=valid)
