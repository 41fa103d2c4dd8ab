# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The smooth L1 distance of the cosines that a student's and a teacher's points make, over all triples, from Gram matrices.

With the corner j, <e_i - e_j, e_k - e_j> is G_ik - G_jk + (G_jj - G_ij), and with L_ij the inverse distance of i and j the cosine
is that times L_ij L_jk. Two kernels go through all triples: one owns pairs (i, k) and sums over corners, the other owns
pairs (i, j) of a point and a corner and sums over k. So every thread has sums of its own, the loops hold no exchange
between threads, and nothing larger than the matrices is written. Of the first sums half are made: they are symmetric.

Everything is float64. Matrices are [B, B], contiguous and, but for rounding, symmetric: rows are read in the place of columns,
so that loads are adjacent. Points past the end have lengths of 0 and so no part in any sum.
"""

import triton
import triton.language as tl


@triton.jit
def load_row(matrix, row, columns, valid):
    """Entries of a row, 0 past its end."""
    return tl.load(matrix + row + columns, mask=valid, other=0.0)


@triton.jit
def slope_of(difference):
    """The derivative of the smooth L1 distance; NaN stays NaN."""
    low = tl.where(difference < -1.0, -1.0, difference)
    return tl.where(low > 1.0, 1.0, low)


@triton.jit
def ends_at(gram, lengths, row, corner, ends, i, k, valid_i, valid_k):
    """(cosines [I, K] at a corner, products of inverse lengths) of a side; ends: G_ik, `row`: where the corner's begins."""
    own = tl.load(gram + row + corner)
    at_i = load_row(gram, row, i, valid_i)
    at_k = load_row(gram, row, k, valid_k)
    products = load_row(lengths, row, i, valid_i)[:, None] * load_row(lengths, row, k, valid_k)[None, :]
    return (ends - at_k[None, :] + (own - at_i)[:, None]) * products, products


@triton.jit(do_not_specialize=["points", "corner_count", "split_size"])
def angle_gradient_kernel(
    student_gram,
    student_lengths,
    teacher_gram,
    teacher_lengths,
    points,
    corners,
    corner_count,
    split_size,
    gradient,
    TILE: tl.constexpr,
):
    """The gradient to <e_i - e_j, e_k - e_j>, summed over a part of the corners j; grid (blocks of i, of k, parts).

    corners: int64 [J], of which a part has `split_size`. gradient: [parts, B, B].
    """
    if tl.program_id(1) < tl.program_id(0):
        return
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid_i, valid_k = i < points, k < points
    size = points.to(tl.int64)
    pairs = i[:, None] * size + k[None, :]
    valid = valid_i[:, None] & valid_k[None, :]
    student_ends = tl.load(student_gram + pairs, mask=valid, other=0.0)
    teacher_ends = tl.load(teacher_gram + pairs, mask=valid, other=0.0)
    total = tl.zeros((TILE, TILE), tl.float64)
    first = tl.program_id(2) * split_size
    for place in range(first, tl.minimum(first + split_size, corner_count)):
        corner = tl.load(corners + place)
        row = corner * size
        cosine, products = ends_at(student_gram, student_lengths, row, corner, student_ends, i, k, valid_i, valid_k)
        other, _ = ends_at(teacher_gram, teacher_lengths, row, corner, teacher_ends, i, k, valid_i, valid_k)
        total += slope_of(cosine - other) * products
    part = gradient + tl.program_id(2) * size * size
    tl.store(part + pairs, total, mask=valid)
    # Not on the diagonal, where the rounding of the two halves may differ.
    if tl.program_id(0) != tl.program_id(1):
        tl.store(part + (k[None, :] * size + i[:, None]), total, mask=valid)


@triton.jit
def corners_of(gram, lengths, i, j, size, valid_i, valid_j):
    """(G_jj - G_ij, inverse lengths) [I, J] of a side, the corners j along the columns."""
    valid = valid_i[:, None] & valid_j[None, :]
    pairs = i[:, None] * size + j[None, :]
    own = tl.load(gram + j * size + j, mask=valid_j, other=0.0)
    offsets = own[None, :] - tl.load(gram + pairs, mask=valid, other=0.0)
    return offsets, tl.load(lengths + pairs, mask=valid, other=0.0)


@triton.jit
def corners_at(gram, lengths, row, offsets, own_lengths, i, j, valid_i, valid_j):
    """(cosines [I, J] with the other end k, products of inverse lengths) of a side; `row`: where that of k begins."""
    products = own_lengths * load_row(lengths, row, j, valid_j)[None, :]
    at_i = load_row(gram, row, i, valid_i)
    at_j = load_row(gram, row, j, valid_j)
    return (at_i[:, None] - at_j[None, :] + offsets) * products, products


@triton.jit(do_not_specialize=["points", "corner_count", "split_size"])
def angle_sums_kernel(
    student_gram,
    student_lengths,
    teacher_gram,
    teacher_lengths,
    points,
    corners,
    corner_count,
    split_size,
    sums,
    losses,
    through_lengths,
    TILE: tl.constexpr,
):
    """Sums over a part of the points k; grid (blocks of i, blocks of corners, parts).

    sums: [parts, B, B], of the gradient to <e_i - e_j, e_k - e_j>, less what comes through the distance of i and j; columns that
    are no corners are not written. losses, through_lengths: [parts, blocks of corners, B], summed over the block's corners.
    """
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    valid_i, valid_j = i < points, place < corner_count
    j = tl.load(corners + place, mask=valid_j, other=0)
    size = points.to(tl.int64)
    student_offsets, student_own = corners_of(student_gram, student_lengths, i, j, size, valid_i, valid_j)
    teacher_offsets, teacher_own = corners_of(teacher_gram, teacher_lengths, i, j, size, valid_i, valid_j)
    loss = tl.zeros((TILE, TILE), tl.float64)
    to_products = tl.zeros((TILE, TILE), tl.float64)
    to_lengths = tl.zeros((TILE, TILE), tl.float64)
    first = tl.program_id(2) * split_size
    for k in range(first, tl.minimum(first + split_size, points)):
        row = k * size
        cosine, products = corners_at(
            student_gram, student_lengths, row, student_offsets, student_own, i, j, valid_i, valid_j
        )
        other, _ = corners_at(teacher_gram, teacher_lengths, row, teacher_offsets, teacher_own, i, j, valid_i, valid_j)
        difference = cosine - other
        slope = slope_of(difference)
        loss += slope * (difference - 0.5 * slope)
        to_products += slope * products
        to_lengths += slope * cosine
    # Through the distance of i and j, whose square is a product itself: twice half of it, as (i, k) and as (k, i).
    through = to_lengths * student_own * student_own
    part = tl.program_id(2) * size * size
    valid = valid_i[:, None] & valid_j[None, :]
    tl.store(sums + part + i[:, None] * size + j[None, :], to_products - through, mask=valid)
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * size + i
    tl.store(losses + block, tl.sum(loss, axis=1), mask=valid_i)
    tl.store(through_lengths + block, tl.sum(through, axis=1), mask=valid_i)
