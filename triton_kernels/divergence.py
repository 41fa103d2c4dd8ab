# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Divergences between two rows of logits: value, cross-entropy and row statistics; gradients to the logits.

p = softmax(teacher / tau_t), q = softmax(student / tau_s), d = log p - log q. One program handles one row. A divergence
is a pair of functions (h_s, h_t) of p and q at each vocabulary entry, h_s = q dD/dq and h_t = p dD/dp up to a multiple
of q and p, with sums H_s and H_t:

    dD/d student logit = (h_s - q H_s) / tau_s        dD/d teacher logit = (h_t - p H_t) / tau_t

Forward reads each logit once where the value follows from sums that survive a change of the running maximum (the KL
divergences and Renyi's), and twice where both normalisers must be known first. Backward reads each logit once.
Logarithms are kept in base 2 inside the kernels and in base e in the statistics.
"""

import triton
import triton.language as tl

from .compositions import load_side, load_side_label, row_source
from .online_softmax import (
    LN_2,
    LOG2_E,
    LOGIT_FLOOR,
    advance_maximum,
    lane_sum,
    log2_of,
    merge_maximum,
    over_lanes,
    powers_of_two,
    quotient_of,
    round_to,
    row_pointer,
    row_scalar,
    tile_columns,
)

# The numbering is shared with kdkernels/divergences.py and csrc/math/divergence.h.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JEFFREYS = tl.constexpr(2)  # a: weight of the forward KL
JSD = tl.constexpr(3)  # a: beta, m = a p + (1 - a) q
SKEW_FORWARD_KL = tl.constexpr(4)  # a: alpha, m = a p + (1 - a) q
SKEW_REVERSE_KL = tl.constexpr(5)  # a: alpha, m = (1 - a) p + a q
TVD = tl.constexpr(6)
ALPHA = tl.constexpr(7)  # a: alpha, b: factor in front
RENYI = tl.constexpr(8)  # a: order
AB = tl.constexpr(9)  # a, b: both exponents
SOFT_CROSS_ENTROPY = tl.constexpr(10)

# Columns of the row statistics. Maxima are of the raw (capped, floored, untempered) logits; log l = log sum exp(x - m).
STUDENT_MAX = tl.constexpr(0)
STUDENT_LOG_SUM = tl.constexpr(1)
TEACHER_MAX = tl.constexpr(2)
TEACHER_LOG_SUM = tl.constexpr(3)
STUDENT_CONSTANT = tl.constexpr(4)  # H_s; Renyi: log sum p^a q^(1-a)
TEACHER_CONSTANT = tl.constexpr(5)  # H_t; Renyi: the same as H_s
STUDENT_HARD_LOG_SUM = tl.constexpr(6)  # of the student at temperature 1, for the cross-entropy; 0 without labels
STUDENT_TARGET = tl.constexpr(7)  # derivatives of the target's own term, with its weight; 0 without targets
TEACHER_TARGET = tl.constexpr(8)
STATISTICS = tl.constexpr(9)

TINY = tl.constexpr(1.2e-38)  # below every probability that counts; keeps mixtures of two underflowed ones off 0
SATURATION = tl.constexpr(60.0 * 1.4426950408889634)  # largest exponent of a power form, base 2: it must not overflow
LOWEST = tl.constexpr(-1.0e30)  # start of the running maximum of Renyi's exponents, which no floor bounds


@triton.jit
def divergence_terms(log_p, log_q, a, b, KIND: tl.constexpr, FAST_LOG: tl.constexpr):
    """(h_s, h_t, value) at each vocabulary entry for the forms that take two sweeps; logarithms in base 2.

    `value` adds up to the divergence; it is h_s where the divergence is a multiple of H_s + H_t instead.
    """
    p = tl.exp2(log_p)
    q = tl.exp2(log_q)
    if KIND == JSD:
        log_m = log2_of(above_zero(a * p + (1 - a) * q), FAST_LOG)
        h_s = (1 - a) * LN_2 * q * (log_q - log_m)
        h_t = a * LN_2 * p * (log_p - log_m)
        value = h_s
    elif KIND == SKEW_FORWARD_KL:
        # Without skew, which a row of its own may have, the mixture is q also where that underflows.
        m = above_zero(a * p + (1 - a) * q)
        ratio = quotient_of(p, m, FAST_LOG)
        value = p * LN_2 * (log_p - tl.where(a == 0, log_q, log2_of(m, FAST_LOG)))
        h_s = tl.where(a == 0, -p, (a - 1) * q * ratio)
        h_t = value - a * p * ratio
    elif KIND == SKEW_REVERSE_KL:
        m = above_zero((1 - a) * p + a * q)
        ratio = quotient_of(q, m, FAST_LOG)
        value = q * LN_2 * (log_q - tl.where(a == 0, log_p, log2_of(m, FAST_LOG)))
        h_s = value - a * q * ratio
        h_t = tl.where(a == 0, -q, (a - 1) * p * ratio)
    elif KIND == TVD:
        half_sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, q - p))  # q - p: NaN stays NaN
        h_s = q * half_sign
        h_t = -p * half_sign
        value = h_s
    elif KIND == ALPHA:
        exponent = a * log_p + (1 - a) * log_q
        power = tl.exp2(tl.where(exponent > SATURATION, SATURATION, exponent))
        h_s = b * (1 - a) * (q - power)
        h_t = b * a * (p - power)
        value = h_s
    else:
        tl.static_assert(KIND == AB)
        power = tl.exp2(a * log_p + b * log_q)
        # The exponents are rounded alike, so that nothing remains where p = q.
        h_s = (tl.exp2(a * log_q + b * log_q) - power) / a
        h_t = (tl.exp2(a * log_p + b * log_p) - power) / b
        value = h_s
    return h_s, h_t, value


@triton.jit
def log2_logistic(z):
    """log2 of 1 / (1 + 2^-z)."""
    small = tl.exp2(-tl.abs(z))
    # log2(1 + small), whose series is exact where the sum is not
    log_sum = tl.where(small < 1e-4, small * (1 - small * (0.5 - small * (1.0 / 3.0))) * LOG2_E, tl.log2(1 + small))
    return tl.minimum(z, 0.0) - log_sum


@triton.jit
def above_zero(m):
    """Mixtures lifted to TINY; NaN stays NaN."""
    return tl.where(m < TINY, TINY, m)


@triton.jit
def student_terms(log_p, log_q, constant, a, b, KIND: tl.constexpr, FAST_LOG: tl.constexpr):
    """tau_s times the gradient to the student's logits at each entry; logarithms in base 2, `constant` = H_s."""
    q = tl.exp2(log_q)
    if KIND == FORWARD_KL or KIND == SOFT_CROSS_ENTROPY:
        gradient = q - tl.exp2(log_p)
    elif KIND == REVERSE_KL:
        gradient = q * ((log_q - log_p) * LN_2 - constant)
    elif KIND == JEFFREYS:
        # constant = (1 - a) RKL - a
        gradient = q * ((1 - a) * LN_2 * (log_q - log_p) - constant) - a * tl.exp2(log_p)
    elif KIND == RENYI:
        gradient = q - tl.exp2(a * log_p + (1 - a) * log_q - constant * LOG2_E)
    else:
        h_s, _, _ = divergence_terms(log_p, log_q, a, b, KIND, FAST_LOG)
        gradient = h_s - q * constant
    return gradient


@triton.jit
def teacher_terms(log_p, log_q, constant, a, b, KIND: tl.constexpr, FAST_LOG: tl.constexpr):
    """tau_t times the gradient to the teacher's logits at each entry; `constant` = H_t."""
    p = tl.exp2(log_p)
    if KIND == FORWARD_KL:
        gradient = p * ((log_p - log_q) * LN_2 - constant)
    elif KIND == REVERSE_KL:
        gradient = p - tl.exp2(log_q)
    elif KIND == SOFT_CROSS_ENTROPY:
        gradient = p * (-log_q * LN_2 - constant)
    elif KIND == JEFFREYS:
        # constant = a FKL - (1 - a)
        gradient = p * (a * LN_2 * (log_p - log_q) - constant) - (1 - a) * tl.exp2(log_q)
    elif KIND == RENYI:
        gradient = (tl.exp2(a * log_p + (1 - a) * log_q - constant * LOG2_E) - p) * (a / (a - 1))
    else:
        _, h_t, _ = divergence_terms(log_p, log_q, a, b, KIND, FAST_LOG)
        gradient = h_t - p * constant
    return gradient


@triton.jit
def accumulate(
    state,
    student_pointer,
    teacher_pointer,
    columns,
    vocab_size,
    student_scale,
    teacher_scale,
    student_cap,
    teacher_cap,
    a,
    target,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """First sweep, one tile: the lanes' state with this tile added to it, without the `target` (None: no row has one).

    state, each [LANES]: max_s, sum_s, max_t, sum_t, cross_s = sum 2^z_s (z_s - z_t), cross_t = sum 2^z_t (z_t - z_s) or,
    for the soft cross-entropy, sum 2^z_t (-z_s), hard_sum (student at temperature 1), max_x, sum_x (Renyi:
    x = a z_t + (1 - a) z_s), where z = (x - max) * scale are the tempered exponents relative to the running maxima.
    """
    valid = columns < vocab_size
    s, _ = load_side(student_pointer, columns, valid, student_cap, HAS_STUDENT_CAP, MASKED, EVICTION, COMPUTE)
    t, _ = load_side(teacher_pointer, columns, valid, teacher_cap, HAS_TEACHER_CAP, MASKED, EVICTION, COMPUTE)
    if target is not None:
        valid = valid & (columns != target)
        s = tl.where(valid, s, LOGIT_FLOOR)
        t = tl.where(valid, t, LOGIT_FLOOR)
    LEAVES_OUT: tl.constexpr = MASKED or target is not None
    return accumulate_logits(state, s, t, valid, student_scale, teacher_scale, a, KIND, HARD, LEAVES_OUT)


@triton.jit
def accumulate_logits(
    state,
    s,
    t,
    valid,
    student_scale,
    teacher_scale,
    a,
    KIND: tl.constexpr,
    HARD: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
):
    """The lanes' state, see ``accumulate``, with a tile of logits added; what is not `valid` must be on the floor.

    The scales and `a` are one number for all lanes or, where each lane has a row of its own, one for each.
    """
    max_s, sum_s, max_t, sum_t, cross_s, cross_t, hard_sum, max_x, sum_x = state
    old_max_s = max_s
    max_s, shift_s, z_s = advance_maximum(max_s, s, student_scale)
    max_t, shift_t, z_t = advance_maximum(max_t, t, teacher_scale)
    power_s = powers_of_two(z_s, valid, LEAVES_OUT)
    power_t = powers_of_two(z_t, valid, LEAVES_OUT)
    rescale_s = tl.exp2(shift_s)
    rescale_t = tl.exp2(shift_t)
    if HARD:
        hard = powers_of_two((s - max_s[None, :, None]) * LOG2_E, valid, LEAVES_OUT)
        hard_sum = hard_sum * tl.exp2((old_max_s - max_s) * LOG2_E) + lane_sum(hard)
    if KIND == FORWARD_KL or KIND == JEFFREYS:
        cross_t = rescale_t * (cross_t + sum_t * (shift_t - shift_s)) + lane_sum(power_t * (z_t - z_s))
    if KIND == SOFT_CROSS_ENTROPY:
        cross_t = rescale_t * (cross_t - sum_t * shift_s) - lane_sum(power_t * z_s)
    if KIND == REVERSE_KL or KIND == JEFFREYS:
        cross_s = rescale_s * (cross_s + sum_s * (shift_s - shift_t)) + lane_sum(power_s * (z_s - z_t))
    if KIND == RENYI:
        x = over_lanes(a) * z_t + (1 - over_lanes(a)) * z_s
        if LEAVES_OUT:
            x = tl.where(valid, x, LOWEST)
        max_x += a * shift_t + (1 - a) * shift_s
        max_x, shift_x, z_x = advance_maximum(max_x, x, tl.full((), 1.0, x.dtype))
        sum_x = sum_x * tl.exp2(shift_x) + lane_sum(powers_of_two(z_x, valid, LEAVES_OUT))
    sum_s = sum_s * rescale_s + lane_sum(power_s)
    sum_t = sum_t * rescale_t + lane_sum(power_t)
    return max_s, sum_s, max_t, sum_t, cross_s, cross_t, hard_sum, max_x, sum_x


@triton.jit
def accumulate_terms(
    state,
    student_pointer,
    teacher_pointer,
    columns,
    vocab_size,
    max_s,
    log_sum_s,
    student_scale,
    student_cap,
    max_t,
    log_sum_t,
    teacher_scale,
    teacher_cap,
    a,
    b,
    target,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Second sweep, one tile: the lanes' sums (H_s, H_t, value), each [LANES], with this tile added to them."""
    sum_h_s, sum_h_t, sum_value = state
    valid = columns < vocab_size
    s, _ = load_side(student_pointer, columns, valid, student_cap, HAS_STUDENT_CAP, MASKED, EVICTION, COMPUTE)
    t, _ = load_side(teacher_pointer, columns, valid, teacher_cap, HAS_TEACHER_CAP, MASKED, EVICTION, COMPUTE)
    log_q = (s - max_s) * student_scale - log_sum_s
    log_p = (t - max_t) * teacher_scale - log_sum_t
    h_s, h_t, value = divergence_terms(log_p, log_q, a, b, KIND, FAST_LOG)
    if target is not None:
        valid = valid & (columns != target)
    if MASKED or target is not None:
        h_s = tl.where(valid, h_s, 0.0)
        h_t = tl.where(valid, h_t, 0.0)
        value = tl.where(valid, value, 0.0)
    return sum_h_s + lane_sum(h_s), sum_h_t + lane_sum(h_t), sum_value + lane_sum(value)


@triton.constexpr_function
def takes_two_sweeps(kind):
    """Whether both normalisers must be known before the value is."""
    one_sweep = (FORWARD_KL, REVERSE_KL, JEFFREYS, RENYI, SOFT_CROSS_ENTROPY)
    return kind not in [each.value for each in one_sweep]


@triton.jit
def merge_lanes(state, student_scale, teacher_scale, a, KIND: tl.constexpr, HARD: tl.constexpr):
    """(max_s, log_sum_s, max_t, log_sum_t, hard_log_sum, value, H_s, H_t) of a row from its lanes' state, see ``accumulate``.

    Sums of the tempered exponents in base 2, that at temperature 1 in base e, 0 unless HARD. The last three are for the
    forms that take one sweep, else 0.
    """
    lane_max_s, sum_s, lane_max_t, sum_t, cross_s, cross_t, hard_sum, max_x, sum_x = state
    max_s, shift_s = merge_maximum(lane_max_s, student_scale)
    max_t, shift_t = merge_maximum(lane_max_t, teacher_scale)
    rescale_s = tl.exp2(shift_s)
    rescale_t = tl.exp2(shift_t)
    row_sum_s = tl.sum(sum_s * rescale_s, axis=0)
    row_sum_t = tl.sum(sum_t * rescale_t, axis=0)
    log_sum_s = tl.log2(row_sum_s)
    log_sum_t = tl.log2(row_sum_t)
    hard_log_sum = 0.0
    if HARD:
        hard_log_sum = tl.log(tl.sum(hard_sum * tl.exp2((lane_max_s - max_s) * LOG2_E), axis=0))
    value = 0.0
    constant_s = 0.0
    constant_t = 0.0
    if KIND == FORWARD_KL or KIND == JEFFREYS:
        cross = tl.sum(rescale_t * (cross_t + sum_t * (shift_t - shift_s)), axis=0)
        forward_kl = (cross / row_sum_t - (log_sum_t - log_sum_s)) * LN_2
    if KIND == REVERSE_KL or KIND == JEFFREYS:
        cross = tl.sum(rescale_s * (cross_s + sum_s * (shift_s - shift_t)), axis=0)
        reverse_kl = (cross / row_sum_s - (log_sum_s - log_sum_t)) * LN_2
    if KIND == FORWARD_KL:
        value = forward_kl
        constant_s = -1.0
        constant_t = forward_kl
    elif KIND == REVERSE_KL:
        value = reverse_kl
        constant_s = reverse_kl
        constant_t = -1.0
    elif KIND == SOFT_CROSS_ENTROPY:
        value = (tl.sum(rescale_t * (cross_t - sum_t * shift_s), axis=0) / row_sum_t + log_sum_s) * LN_2
        constant_s = -1.0
        constant_t = value
    elif KIND == JEFFREYS:
        value = a * forward_kl + (1 - a) * reverse_kl
        constant_s = (1 - a) * reverse_kl - a
        constant_t = a * forward_kl - (1 - a)
    elif KIND == RENYI:
        max_x += a * shift_t + (1 - a) * shift_s
        row_max_x, shift_x = merge_maximum(max_x, 1.0)
        log_sum_x = tl.log2(tl.sum(sum_x * tl.exp2(shift_x), axis=0))
        constant_s = (row_max_x + (log_sum_x - (a * log_sum_t + (1 - a) * log_sum_s))) * LN_2
        constant_t = constant_s
        value = constant_s / (a - 1)
    return max_s, log_sum_s, max_t, log_sum_t, hard_log_sum, value, constant_s, constant_t


@triton.jit
def value_from_sums(sum_h_s, sum_h_t, sum_value, a, b, KIND: tl.constexpr):
    """The divergence from the sums of ``divergence_terms``."""
    value = sum_h_s + sum_h_t
    if KIND == SKEW_FORWARD_KL or KIND == SKEW_REVERSE_KL:
        value = sum_value
    if KIND == AB:
        value = value / (a + b)
    return value


@triton.jit(do_not_specialize=["student_stride", "teacher_stride", "vocab_size"])
def divergence_forward_kernel(
    student,
    teacher,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    vocab_size,
    divergence,
    cross_entropy,
    statistics,
    labels,
    active,
    student_composition,
    teacher_composition,
    student_temperatures,
    teacher_temperatures,
    parameters,
    targets,
    target_weights,
    rest_weights,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    target_weight: tl.float64,
    rest_weight: tl.float64,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its divergence, its cross-entropy where `labels` are given, and the statistics that backward needs.

    student, teacher: [N, V] logits, adjacent columns, row strides in vectors of WIDTH logits; grid (N,).
    divergence, cross_entropy: [N] in COMPUTE; statistics: [N, STATISTICS] in COMPUTE.
    labels: int64 [N]; active: bool [N]; temperatures: [N]; parameters: [N], instead of a; targets: int64 [N], the column
    that stands apart, -1: none; weights: [N]; compositions; each may be None. Scalars are fp64 for fp64 logits' sake.

    Whole tiles go without a mask, so that their loads are vectors at any vocabulary size; smaller masked ones follow.
    """
    row = tl.program_id(0)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(divergence + row, 0.0)
            if labels is not None:
                tl.store(cross_entropy + row, 0.0)
            return
    HARD: tl.constexpr = labels is not None
    student_temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    teacher_temperature = row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    student_scale = LOG2_E / student_temperature
    teacher_scale = LOG2_E / teacher_temperature
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    a = row_scalar(a, parameters, row, COMPUTE)
    b = tl.full((), b, COMPUTE)
    target = targets
    if targets is not None:
        target = tl.load(targets + row).to(tl.int32)
    student_row = row_source(student, row, student_stride, student_composition, WIDTH)
    teacher_row = row_source(teacher, row, teacher_stride, teacher_composition, WIDTH)
    columns = tile_columns(UNROLL, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    rest_columns = tile_columns(1, LANES, WIDTH)
    REST_TILE: tl.constexpr = LANES * WIDTH

    lowest = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    zero = tl.zeros((LANES,), COMPUTE)
    state = (lowest, zero, lowest, zero, zero, zero, zero, tl.full((LANES,), LOWEST, COMPUTE), zero)
    for start in range(0, whole, TILE):
        state = accumulate(
            state, student_row, teacher_row, start + columns, vocab_size, student_scale, teacher_scale,
            student_cap, teacher_cap, a, target, KIND, HARD, HAS_STUDENT_CAP, HAS_TEACHER_CAP, False, "", COMPUTE,
        )  # fmt: skip
    for start in range(whole, vocab_size, REST_TILE):
        state = accumulate(
            state, student_row, teacher_row, start + rest_columns, vocab_size, student_scale, teacher_scale,
            student_cap, teacher_cap, a, target, KIND, HARD, HAS_STUDENT_CAP, HAS_TEACHER_CAP, True, "", COMPUTE,
        )  # fmt: skip

    max_s, log_sum_s, max_t, log_sum_t, hard_log_sum, value, constant_s, constant_t = merge_lanes(
        state, student_scale, teacher_scale, a, KIND, HARD
    )
    if takes_two_sweeps(KIND):
        # From the row's end to its start: the logits read last are the likeliest still in cache.
        sums = (zero, zero, zero)
        for start in range(whole, vocab_size, REST_TILE):
            sums = accumulate_terms(
                sums, student_row, teacher_row, start + rest_columns, vocab_size, max_s, log_sum_s, student_scale,
                student_cap, max_t, log_sum_t, teacher_scale, teacher_cap, a, b, target, KIND, FAST_LOG, HAS_STUDENT_CAP,
                HAS_TEACHER_CAP, True, "evict_first", COMPUTE,
            )  # fmt: skip
        for done in range(0, whole, TILE):
            sums = accumulate_terms(
                sums, student_row, teacher_row, (whole - TILE - done) + columns, vocab_size, max_s, log_sum_s,
                student_scale, student_cap, max_t, log_sum_t, teacher_scale, teacher_cap, a, b, target, KIND, FAST_LOG,
                HAS_STUDENT_CAP, HAS_TEACHER_CAP, False, "evict_first", COMPUTE,
            )  # fmt: skip
        constant_s = tl.sum(sums[0], axis=0)
        constant_t = tl.sum(sums[1], axis=0)
        value = value_from_sums(constant_s, constant_t, tl.sum(sums[2], axis=0), a, b, KIND)
    student_target = 0.0
    teacher_target = 0.0
    if targets is not None:
        # The log-odds of the target, from sums without it: nothing cancels where it has nearly all of the mass.
        has_target = target >= 0
        place = tl.where(has_target, target, 0)
        target_logit = load_side_label(student_row, place, vocab_size, student_cap, HAS_STUDENT_CAP, COMPUTE)
        teacher_logit = load_side_label(teacher_row, place, vocab_size, teacher_cap, HAS_TEACHER_CAP, COMPUTE)
        y = (target_logit - max_s) * student_scale - log_sum_s
        x = (teacher_logit - max_t) * teacher_scale - log_sum_t
        log_q, log_not_q = log2_logistic(y), log2_logistic(-y)
        log_p, log_not_p = log2_logistic(x), log2_logistic(-x)
        p = tl.exp2(log_p)
        not_p = tl.exp2(log_not_p)
        weight = tl.where(has_target, row_scalar(target_weight, target_weights, row, COMPUTE), 0.0)
        value = row_scalar(rest_weight, rest_weights, row, COMPUTE) * value
        value += weight * LN_2 * (p * (log_p - log_q) + not_p * (log_not_p - log_not_q))
        student_target = weight * tl.where(x > 0, not_p - tl.exp2(log_not_q), tl.exp2(log_q) - p)
        teacher_target = weight * LN_2 * p * not_p * (x - y)
    tl.store(divergence + row, value)

    row_statistics = statistics + row.to(tl.int64) * STATISTICS
    tl.store(row_statistics + STUDENT_MAX, max_s)
    tl.store(row_statistics + STUDENT_LOG_SUM, log_sum_s * LN_2)
    tl.store(row_statistics + TEACHER_MAX, max_t)
    tl.store(row_statistics + TEACHER_LOG_SUM, log_sum_t * LN_2)
    tl.store(row_statistics + STUDENT_CONSTANT, constant_s)
    tl.store(row_statistics + TEACHER_CONSTANT, constant_t)
    tl.store(row_statistics + STUDENT_TARGET, student_target)
    tl.store(row_statistics + TEACHER_TARGET, teacher_target)
    if labels is not None:
        if targets is not None:
            gap = target_logit - max_s
            high = tl.maximum(hard_log_sum, gap)
            both = high + tl.log(tl.exp(hard_log_sum - high) + tl.exp(gap - high))
            hard_log_sum = tl.where(has_target, both, hard_log_sum)
        label = tl.load(labels + row)
        logit = load_side_label(student_row, label, vocab_size, student_cap, HAS_STUDENT_CAP, COMPUTE)
        tl.store(cross_entropy + row, hard_log_sum - (logit - max_s))
        tl.store(row_statistics + STUDENT_HARD_LOG_SUM, hard_log_sum)


@triton.jit
def gradient_tile(
    start,
    columns,
    vocab_size,
    student_row,
    teacher_row,
    grad_student_row,
    grad_teacher_row,
    max_s,
    log_sum_s,
    constant_s,
    student_scale,
    student_cap,
    student_factor,
    max_t,
    log_sum_t,
    constant_t,
    teacher_scale,
    teacher_cap,
    teacher_factor,
    label,
    hard_log_sum,
    hard_factor,
    a,
    b,
    target,
    rest_weight,
    student_target,
    teacher_target,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HARD: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Backward, one tile: reads the logits of columns start + `columns` and writes the wanted gradients there."""
    columns = start + columns
    valid = columns < vocab_size
    s, tanh_s = load_side(student_row, columns, valid, student_cap, HAS_STUDENT_CAP, MASKED, "evict_first", COMPUTE)
    t, tanh_t = load_side(teacher_row, columns, valid, teacher_cap, HAS_TEACHER_CAP, MASKED, "evict_first", COMPUTE)
    log_q = (s - max_s) * student_scale - log_sum_s
    log_p = (t - max_t) * teacher_scale - log_sum_t
    if grad_student_row is not None:
        gradient = student_terms(log_p, log_q, constant_s, a, b, KIND, FAST_LOG)
        if target is not None:
            gradient = rest_weight * gradient - student_target * tl.exp2(log_q)
            gradient = tl.where(columns == target, student_target, gradient)
        gradient *= student_factor
        if HARD:
            gradient += hard_factor * hard_terms(s, max_s, hard_log_sum, columns == label)
        store_gradient(grad_student_row + columns, gradient, s, tanh_s, valid, HAS_STUDENT_CAP, MASKED)
    if grad_teacher_row is not None:
        gradient = teacher_terms(log_p, log_q, constant_t, a, b, KIND, FAST_LOG)
        if target is not None:
            gradient = rest_weight * gradient - teacher_target * tl.exp2(log_p)
            gradient = tl.where(columns == target, teacher_target, gradient)
        gradient *= teacher_factor
        store_gradient(grad_teacher_row + columns, gradient, t, tanh_t, valid, HAS_TEACHER_CAP, MASKED)


@triton.jit
def hard_terms(s, max_s, hard_log_sum, is_label):
    """The gradient of the cross-entropy to the student's logits at each entry; `hard_log_sum` in base 2."""
    return tl.exp2((s - max_s) * LOG2_E - hard_log_sum) - tl.where(is_label, 1.0, 0.0)


@triton.jit
def before_cap(gradient, logits, tanh, HAS_CAP: tl.constexpr):
    """The gradient to a logit before the cap, and exactly 0 where the floor has replaced it."""
    if HAS_CAP:
        gradient *= 1 - tanh * tanh
    return tl.where(logits == LOGIT_FLOOR, 0.0, gradient)


@triton.jit
def store_gradient(pointers, gradient, logits, tanh, valid, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """Writes d/d logit, see ``before_cap``."""
    gradient = round_to(before_cap(gradient, logits, tanh, HAS_CAP), pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, gradient, mask=valid)
    else:
        tl.store(pointers, gradient)


@triton.jit
def zero_row(pointer, columns, vocab_size, TILE: tl.constexpr):
    """Writes 0 over a row of gradients; does nothing where there is none."""
    if pointer is not None:
        zero = tl.zeros(columns.shape, pointer.dtype.element_ty)
        for start in range(0, vocab_size, TILE):
            tl.store(pointer + (start + columns), zero, mask=start + columns < vocab_size)


@triton.jit(
    do_not_specialize=[
        "student_stride",
        "teacher_stride",
        "grad_student_stride",
        "grad_teacher_stride",
        "vocab_size",
    ]
)
def divergence_backward_kernel(
    student,
    teacher,
    grad_student,
    grad_teacher,
    student_stride: tl.int64,
    teacher_stride: tl.int64,
    grad_student_stride: tl.int64,
    grad_teacher_stride: tl.int64,
    vocab_size,
    statistics,
    grad_divergence,
    grad_cross_entropy,
    labels,
    active,
    student_composition,
    teacher_composition,
    student_temperatures,
    teacher_temperatures,
    parameters,
    targets,
    rest_weights,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    student_softcap: tl.float64,
    teacher_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    rest_weight: tl.float64,
    KIND: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the gradients of the divergence and, where `grad_cross_entropy` is given, of the hard-label term.

    student, teacher: [N, V] logits as in forward; grad_student, grad_teacher: [N, V] in the logits' dtypes or None, and
    they may be the logits' own storage (each element is read before it is written, by the same thread); strides in
    vectors of WIDTH logits; grid (N,).
    statistics: [N, STATISTICS] of forward; grad_divergence, grad_cross_entropy: [N] in COMPUTE.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, TILE)
    grad_student_row = grad_student
    if grad_student is not None:
        grad_student_row = row_pointer(grad_student, row, grad_student_stride, WIDTH)
    grad_teacher_row = grad_teacher
    if grad_teacher is not None:
        grad_teacher_row = row_pointer(grad_teacher, row, grad_teacher_stride, WIDTH)
    if active is not None:
        if tl.load(active + row) == 0:
            zero_row(grad_student_row, columns, vocab_size, TILE)
            zero_row(grad_teacher_row, columns, vocab_size, TILE)
            return
    HARD: tl.constexpr = grad_cross_entropy is not None
    student_temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    teacher_temperature = row_scalar(teacher_temperature, teacher_temperatures, row, COMPUTE)
    student_scale = LOG2_E / student_temperature
    teacher_scale = LOG2_E / teacher_temperature
    student_cap = tl.full((), student_softcap, COMPUTE)
    teacher_cap = tl.full((), teacher_softcap, COMPUTE)
    a = row_scalar(a, parameters, row, COMPUTE)
    b = tl.full((), b, COMPUTE)
    row_statistics = statistics + row.to(tl.int64) * STATISTICS
    max_s = tl.load(row_statistics + STUDENT_MAX)
    log_sum_s = tl.load(row_statistics + STUDENT_LOG_SUM) * LOG2_E
    max_t = tl.load(row_statistics + TEACHER_MAX)
    log_sum_t = tl.load(row_statistics + TEACHER_LOG_SUM) * LOG2_E
    constant_s = tl.load(row_statistics + STUDENT_CONSTANT)
    constant_t = tl.load(row_statistics + TEACHER_CONSTANT)
    factor = tl.load(grad_divergence + row)
    student_factor = factor / student_temperature
    teacher_factor = factor / teacher_temperature
    label = -1
    hard_log_sum = 0.0
    hard_factor = 0.0
    if HARD:
        label = tl.load(labels + row).to(tl.int32)
        hard_log_sum = tl.load(row_statistics + STUDENT_HARD_LOG_SUM) * LOG2_E
        hard_factor = tl.load(grad_cross_entropy + row)
    target = targets
    student_target = 0.0
    teacher_target = 0.0
    if targets is not None:
        target = tl.load(targets + row).to(tl.int32)
        student_target = tl.load(row_statistics + STUDENT_TARGET)
        teacher_target = tl.load(row_statistics + TEACHER_TARGET)
        rest_weight = row_scalar(rest_weight, rest_weights, row, COMPUTE)
    student_row = row_source(student, row, student_stride, student_composition, WIDTH)
    teacher_row = row_source(teacher, row, teacher_stride, teacher_composition, WIDTH)
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        gradient_tile(
            start, columns, vocab_size, student_row, teacher_row, grad_student_row, grad_teacher_row,
            max_s, log_sum_s, constant_s, student_scale, student_cap, student_factor,
            max_t, log_sum_t, constant_t, teacher_scale, teacher_cap, teacher_factor,
            label, hard_log_sum, hard_factor, a, b, target, rest_weight, student_target, teacher_target,
            KIND, FAST_LOG, HARD, HAS_STUDENT_CAP, HAS_TEACHER_CAP, False, COMPUTE,
        )  # fmt: skip
    rest_columns = tl.arange(0, REST_TILE)
    for start in range(whole, vocab_size, REST_TILE):
        gradient_tile(
            start, rest_columns, vocab_size, student_row, teacher_row, grad_student_row, grad_teacher_row,
            max_s, log_sum_s, constant_s, student_scale, student_cap, student_factor,
            max_t, log_sum_t, constant_t, teacher_scale, teacher_cap, teacher_factor,
            label, hard_log_sum, hard_factor, a, b, target, rest_weight, student_target, teacher_target,
            KIND, FAST_LOG, HARD, HAS_STUDENT_CAP, HAS_TEACHER_CAP, True, COMPUTE,
        )  # fmt: skip
