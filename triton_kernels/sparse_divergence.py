# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Divergences of a row of logits from a teacher that names some ids of the vocabulary: value and gradient.

q = softmax(student / tau). K are the ids that the teacher names, with probabilities p; the rest of the vocabulary is one
outcome (r, q_r), or spread evenly, or left out (POLICY). One program handles one row. While it walks the tiles, a pointer
into the ascending ids tells which columns to leave out of the sums: the mass of the rest is a sum of its own, exact also
where it is next to nothing. The named logits are gathered afterwards, and their outcomes computed.

With h_s as in `divergence`, in full, and H_s its sum over all outcomes, the gradient to a logit, times tau, is
h_s - q H_s for an id of K, and q / q_r (h_s(r, q_r) - q_r H_s) for one of the rest.

Logarithms are kept in base 2 inside the kernels and in the statistics, in base e in all else.
"""

import triton
import triton.language as tl

from .divergence import (
    AB,
    FORWARD_KL,
    JEFFREYS,
    RENYI,
    REVERSE_KL,
    SKEW_FORWARD_KL,
    SKEW_REVERSE_KL,
    SOFT_CROSS_ENTROPY,
    divergence_terms,
    zero_row,
)
from .online_softmax import (
    LN_2,
    LOG2_E,
    LOGIT_FLOOR,
    advance_maximum,
    floored,
    lane_sum,
    load_label_logit,
    load_logits,
    merge_maximum,
    round_to,
    row_pointer,
    row_scalar,
    soft_cap,
    tile_columns,
)

# The numbering is shared with kdkernels/backends/sparse_rows.py and csrc/problem.h.
BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)
UNIFORM = tl.constexpr(2)  # the forward KL and the soft cross-entropy alone
DROP = tl.constexpr(3)
SAMPLED = tl.constexpr(4)

NO_ID = tl.constexpr(2**31 - 1)  # where a row has no entry
NOTHING = tl.constexpr(-1.0e30)  # the logarithm of the probability, or the logit, of what is not there

# Columns of the row statistics.
REST_MAX = tl.constexpr(0)  # of the raw logits outside K
REST_LOG_SUM = tl.constexpr(1)  # log sum 2^z over them, z relative to that maximum
REST_FACTOR = tl.constexpr(2)  # h_s(r, q_r) - q_r H_s
ROW_MAX = tl.constexpr(3)  # of all raw logits
ROW_LOG_SUM = tl.constexpr(4)
SUM_TERMS = tl.constexpr(5)  # H_s
EVEN_SHARE = tl.constexpr(6)  # the teacher's probability of each id outside K, if that is what it is
HARD_LOG_SUM = tl.constexpr(7)  # of all logits at temperature 1; 0 without labels
STATISTICS = tl.constexpr(8)


@triton.jit
def outcome_terms(log_p, log_q, a, b, KIND: tl.constexpr, FAST_LOG: tl.constexpr):
    """(h_s, f) of single outcomes, nothing dropped; logarithms in base 2."""
    d = (log_p - log_q) * LN_2
    if KIND == FORWARD_KL:
        p = tl.exp2(log_p)
        h_s = -p
        value = p * d
    elif KIND == REVERSE_KL:
        q = tl.exp2(log_q)
        h_s = q * (1 - d)
        value = -q * d
    elif KIND == JEFFREYS:
        p = tl.exp2(log_p)
        q = tl.exp2(log_q)
        h_s = (1 - a) * q * (1 - d) - a * p
        value = (a * p - (1 - a) * q) * d
    elif KIND == SOFT_CROSS_ENTROPY:
        p = tl.exp2(log_p)
        h_s = -p
        value = -p * log_q * LN_2
    else:
        h_s, h_t, value = divergence_terms(log_p, log_q, a, b, KIND, FAST_LOG)
        if KIND == SKEW_REVERSE_KL:
            h_s += tl.exp2(log_q)
        elif KIND != SKEW_FORWARD_KL:
            value = h_s + h_t
            if KIND == AB:
                value = value / (a + b)
    return h_s, value


@triton.jit
def accumulate(
    state,
    pointer,
    start,
    columns,
    stop,
    vocab_size,
    ids,
    entries,
    scale,
    cap,
    HARD: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile outside K added to the lanes' state, and the place of the next entry.

    state: maximum, total = sum 2^z, hard_total (at temperature 1), gaps = sum (logit - maximum), count, each [LANES];
    place, entry: how many ids lie before the tile, and the one that follows.
    """
    maximum, total, hard_total, gaps, count, place, entry = state
    columns = start + columns
    valid = columns < vocab_size
    logits, _ = load_logits(pointer, columns, valid, cap, HAS_CAP, MASKED, "", COMPUTE)
    if MASKED:
        logits = tl.where(valid, logits, NOTHING)
    while entry < stop:
        logits = tl.where(columns == entry, NOTHING, logits)
        place += 1
        entry = tl.load(ids + place, mask=place < entries, other=NO_ID)
    old = maximum
    maximum, shift, z = advance_maximum(maximum, logits, scale)
    total = total * tl.exp2(shift) + lane_sum(tl.exp2(z))
    if HARD:
        hard = tl.exp2((logits - maximum[None, :, None]) * LOG2_E)
        hard_total = hard_total * tl.exp2((old - maximum) * LOG2_E) + lane_sum(hard)
    if EVEN:
        left = logits >= LOGIT_FLOOR
        gaps += count * (old - maximum) + lane_sum(tl.where(left, logits - maximum[None, :, None], 0.0))
        count += lane_sum(left.to(COMPUTE))
    return maximum, total, hard_total, gaps, count, place, entry


@triton.jit(do_not_specialize=["student_stride", "vocab_size", "entries"])
def sparse_divergence_forward_kernel(
    student,
    student_stride: tl.int64,
    vocab_size,
    ids,
    values,
    log_tails,
    constants,
    entries,
    divergence,
    cross_entropy,
    statistics,
    gathered,
    terms,
    labels,
    active,
    student_temperatures,
    parameters,
    student_temperature: tl.float64,
    student_softcap: tl.float64,
    a: tl.float64,
    b: tl.float64,
    KIND: tl.constexpr,
    POLICY: tl.constexpr,
    FAST_LOG: tl.constexpr,
    HAS_STUDENT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its divergence, its cross-entropy where `labels` are given, and what backward needs.

    student: [N, V] logits, adjacent columns, row stride in vectors of WIDTH logits; grid (N,).
    ids: int32 [N, entries], ascending, each once, NO_ID behind them; values: log p or weights [N, entries]; log_tails: [N],
    NOTHING where the rest is no outcome; constants: the entropy [N] of a sampled teacher, or None. All in COMPUTE.
    divergence, cross_entropy: [N]; statistics: [N, STATISTICS]; gathered, terms: [N, entries], named logits and h_s.
    labels: int64 [N]; active: bool [N]; student_temperatures: [N]; each may be None.
    """
    row = tl.program_id(0)
    if active is not None:
        if tl.load(active + row) == 0:
            tl.store(divergence + row, 0.0)
            if labels is not None:
                tl.store(cross_entropy + row, 0.0)
            return
    HARD: tl.constexpr = labels is not None
    EVEN: tl.constexpr = POLICY == UNIFORM
    temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    scale = LOG2_E / temperature
    cap = tl.full((), student_softcap, COMPUTE)
    a = row_scalar(a, parameters, row, COMPUTE)
    b = tl.full((), b, COMPUTE)
    student_row = row_pointer(student, row, student_stride, WIDTH)
    first = row.to(tl.int64) * entries
    ids += first
    values += first
    gathered += first
    terms += first

    columns = tile_columns(UNROLL, LANES, WIDTH)
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    whole = vocab_size // TILE * TILE
    rest_columns = tile_columns(1, LANES, WIDTH)
    REST_TILE: tl.constexpr = LANES * WIDTH
    zero = tl.zeros((LANES,), COMPUTE)
    place = row * 0
    entry = tl.load(ids, mask=entries > 0, other=NO_ID)
    state = (tl.full((LANES,), LOGIT_FLOOR, COMPUTE), zero, zero, zero, zero, place, entry)
    for start in range(0, whole, TILE):
        state = accumulate(
            state, student_row, start, columns, start + TILE, vocab_size, ids, entries, scale, cap,
            HARD, EVEN, HAS_STUDENT_CAP, False, COMPUTE,
        )  # fmt: skip
    for start in range(whole, vocab_size, REST_TILE):
        state = accumulate(
            state, student_row, start, rest_columns, start + REST_TILE, vocab_size, ids, entries, scale, cap,
            HARD, EVEN, HAS_STUDENT_CAP, True, COMPUTE,
        )  # fmt: skip
    lane_max, total, hard_total, gaps, count, place, entry = state
    rest_max, shift = merge_maximum(lane_max, scale)
    rest_sum = tl.sum(total * tl.exp2(shift), axis=0)

    # The named logits, gathered, and their share in the normaliser.
    named_max = tl.full((LANES,), LOGIT_FLOOR, COMPUTE)
    named_total = zero
    named_hard = zero
    named_count = zero
    lanes = tl.arange(0, LANES)
    for start in range(0, entries, LANES):
        at = start + lanes
        id = tl.load(ids + at, mask=at < entries, other=NO_ID)
        present = id < vocab_size
        logit = tl.load(student_row + id, mask=present, other=0.0).to(COMPUTE)
        if HAS_STUDENT_CAP:
            logit, _tanh = soft_cap(logit, cap)
        logit = floored(logit)
        tl.store(gathered + at, logit, mask=at < entries)
        logit = tl.where(present, logit, LOGIT_FLOOR)
        new = tl.maximum(named_max, logit)
        power = tl.where(present, tl.exp2((logit - new) * scale), 0.0)
        named_total = named_total * tl.exp2((named_max - new) * scale) + power
        if HARD:
            power = tl.where(present, tl.exp2((logit - new) * LOG2_E), 0.0)
            named_hard = named_hard * tl.exp2((named_max - new) * LOG2_E) + power
        named_max = new
        named_count += present.to(COMPUTE)
    row_max = tl.maximum(rest_max, tl.max(named_max, axis=0))
    row_sum = rest_sum * tl.exp2((rest_max - row_max) * scale)
    row_sum += tl.sum(named_total * tl.exp2((named_max - row_max) * scale), axis=0)
    row_log_sum = tl.log2(row_sum)
    named = tl.sum(named_count, axis=0)
    outside = vocab_size - named
    has_rest = outside > 0
    rest_log_sum = tl.log2(tl.where(has_rest, rest_sum, 1.0))
    log_q_rest = tl.where(has_rest, (rest_max - row_max) * scale + rest_log_sum - row_log_sum, NOTHING)

    # The outcomes of K.
    sum_h = zero
    sum_value = zero
    highest = tl.full((LANES,), NOTHING, COMPUTE)
    for start in range(0, entries, LANES):
        at = start + lanes
        present = tl.load(ids + at, mask=at < entries, other=NO_ID) < vocab_size
        logit = tl.load(gathered + at, mask=at < entries, other=0.0)
        teacher = tl.load(values + at, mask=at < entries, other=0.0)
        log_q = (logit - row_max) * scale - row_log_sum
        if POLICY == SAMPLED:
            h_s = -teacher
            value = -teacher * LN_2 * log_q
        elif KIND == RENYI:
            # Their exponents for now: the weights follow once their sum is known.
            h_s = tl.where(present, a * LOG2_E * teacher + (1 - a) * log_q, NOTHING)
            new = tl.maximum(highest, h_s)
            sum_value = sum_value * tl.exp2(highest - new)
            value = tl.exp2(h_s - new)
            highest = new
        else:
            h_s, value = outcome_terms(teacher * LOG2_E, log_q, a, b, KIND, FAST_LOG)
        tl.store(terms + at, h_s, mask=at < entries)
        sum_h += tl.where(present, h_s, 0.0)
        sum_value += tl.where(present, value, 0.0)

    # The outcome of the rest.
    log_tail = tl.load(log_tails + row) * LOG2_E
    h_rest = sum_h.sum(axis=0) * 0.0
    even = h_rest
    if KIND == RENYI and POLICY != SAMPLED:
        rest = tl.where((log_q_rest > NOTHING) & (POLICY != DROP), a * log_tail + (1 - a) * log_q_rest, NOTHING)
        top = tl.maximum(tl.max(highest, axis=0), rest)
        affinity = tl.sum(sum_value * tl.exp2(highest - top), axis=0)
        rest_power = tl.where(rest > NOTHING, tl.exp2(rest - top), 0.0)
        affinity += rest_power
        row_value = (top + tl.log2(affinity)) * LN_2 / (a - 1)
        row_h = affinity * 0.0 - 1.0
        h_rest = -rest_power / affinity
        for start in range(0, entries, LANES):
            at = start + lanes
            exponent = tl.load(terms + at, mask=at < entries, other=NOTHING)
            tl.store(terms + at, -tl.exp2(exponent - top) / affinity, mask=at < entries)
    else:
        row_value = tl.sum(sum_value, axis=0)
        row_h = tl.sum(sum_h, axis=0)
        if POLICY == SAMPLED:
            if constants is not None:
                row_value -= tl.load(constants + row)
        elif POLICY == UNIFORM:
            mean = tl.sum(gaps + count * (lane_max - rest_max), axis=0) / outside
            mean_log_q = (mean + (rest_max - row_max)) * scale - row_log_sum
            r = tl.exp2(log_tail)
            if KIND == SOFT_CROSS_ENTROPY:
                value = -r * LN_2 * mean_log_q
            else:
                value = r * LN_2 * (log_tail - tl.log2(outside) - mean_log_q)
            row_value += tl.where(has_rest, value, 0.0)
            row_h -= tl.where(has_rest, r, 0.0)
            even = tl.where(has_rest, r / outside, 0.0)
        elif POLICY != DROP:
            h_s, value = outcome_terms(log_tail, log_q_rest, a, b, KIND, FAST_LOG)
            h_rest = tl.where(has_rest, h_s, 0.0)
            row_value += tl.where(has_rest, value, 0.0)
            row_h += h_rest
    if POLICY == RENORMALIZE or POLICY == DROP:
        silent = named == 0
        row_value = tl.where(silent, 0.0, row_value)
        row_h = tl.where(silent, 0.0, row_h)
        h_rest = tl.where(silent, 0.0, h_rest)
    tl.store(divergence + row, row_value)

    row_statistics = statistics + row.to(tl.int64) * STATISTICS
    tl.store(row_statistics + REST_MAX, rest_max)
    tl.store(row_statistics + REST_LOG_SUM, rest_log_sum)
    tl.store(row_statistics + REST_FACTOR, h_rest - tl.exp2(log_q_rest) * row_h)
    tl.store(row_statistics + ROW_MAX, row_max)
    tl.store(row_statistics + ROW_LOG_SUM, row_log_sum)
    tl.store(row_statistics + SUM_TERMS, row_h)
    tl.store(row_statistics + EVEN_SHARE, even)
    if labels is not None:
        hard_sum = tl.sum(hard_total * tl.exp2((lane_max - row_max) * LOG2_E), axis=0)
        hard_sum += tl.sum(named_hard * tl.exp2((named_max - row_max) * LOG2_E), axis=0)
        hard_log_sum = tl.log2(hard_sum)
        logit = load_label_logit(student_row, tl.load(labels + row), vocab_size, cap, HAS_STUDENT_CAP, COMPUTE)
        tl.store(cross_entropy + row, hard_log_sum * LN_2 - (logit - row_max))
        tl.store(row_statistics + HARD_LOG_SUM, hard_log_sum)


@triton.jit
def gradient_tile(
    start,
    columns,
    vocab_size,
    student_row,
    gradient_row,
    rest_max,
    rest_log_sum,
    rest_factor,
    even,
    row_max,
    scale,
    cap,
    label,
    hard_log_sum,
    hard_factor,
    HARD: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of the gradient as if no column were named; those that are get theirs afterwards."""
    columns = start + columns
    valid = columns < vocab_size
    s, tanh = load_logits(student_row, columns, valid, cap, HAS_CAP, MASKED, "evict_first", COMPUTE)
    gradient = rest_factor * tl.exp2((s - rest_max) * scale - rest_log_sum) - even
    if HARD:
        hard = tl.exp2((s - row_max) * LOG2_E - hard_log_sum)
        gradient += hard_factor * (hard - tl.where(columns == label, 1.0, 0.0))
    if HAS_CAP:
        gradient *= 1 - tanh * tanh
    gradient = round_to(tl.where(s == LOGIT_FLOOR, 0.0, gradient), gradient_row.dtype.element_ty)
    if MASKED:
        tl.store(gradient_row + columns, gradient, mask=valid)
    else:
        tl.store(gradient_row + columns, gradient)


@triton.jit(do_not_specialize=["student_stride", "grad_student_stride", "vocab_size", "entries"])
def sparse_divergence_backward_kernel(
    student,
    grad_student,
    student_stride: tl.int64,
    grad_student_stride: tl.int64,
    vocab_size,
    ids,
    entries,
    statistics,
    gathered,
    terms,
    grad_divergence,
    grad_cross_entropy,
    labels,
    active,
    student_temperatures,
    student_temperature: tl.float64,
    student_softcap: tl.float64,
    HAS_STUDENT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
    REST_TILE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the gradient of the divergence and, where `grad_cross_entropy` is given, of the hard-label term.

    grad_student: [N, V] in the logits' dtype; it may be the logits' own storage: each element is read before it is written,
    by the same thread, and named ones were gathered in forward. The rest as there; grid (N,).
    """
    row = tl.program_id(0)
    columns = tl.arange(0, TILE)
    gradient_row = row_pointer(grad_student, row, grad_student_stride, WIDTH)
    if active is not None:
        if tl.load(active + row) == 0:
            zero_row(gradient_row, columns, vocab_size, TILE)
            return
    HARD: tl.constexpr = grad_cross_entropy is not None
    temperature = row_scalar(student_temperature, student_temperatures, row, COMPUTE)
    scale = LOG2_E / temperature
    cap = tl.full((), student_softcap, COMPUTE)
    row_statistics = statistics + row.to(tl.int64) * STATISTICS
    rest_max = tl.load(row_statistics + REST_MAX)
    rest_log_sum = tl.load(row_statistics + REST_LOG_SUM)
    row_max = tl.load(row_statistics + ROW_MAX)
    row_log_sum = tl.load(row_statistics + ROW_LOG_SUM)
    sum_terms = tl.load(row_statistics + SUM_TERMS)
    factor = tl.load(grad_divergence + row) / temperature
    rest_factor = factor * tl.load(row_statistics + REST_FACTOR)
    even = factor * tl.load(row_statistics + EVEN_SHARE)
    label = -1
    hard_log_sum = 0.0
    hard_factor = 0.0
    if HARD:
        label = tl.load(labels + row).to(tl.int32)
        hard_log_sum = tl.load(row_statistics + HARD_LOG_SUM)
        hard_factor = tl.load(grad_cross_entropy + row)
    student_row = row_pointer(student, row, student_stride, WIDTH)
    whole = vocab_size // TILE * TILE
    for start in range(0, whole, TILE):
        gradient_tile(
            start, columns, vocab_size, student_row, gradient_row, rest_max, rest_log_sum, rest_factor, even,
            row_max, scale, cap, label, hard_log_sum, hard_factor, HARD, HAS_STUDENT_CAP, False, COMPUTE,
        )  # fmt: skip
    rest_columns = tl.arange(0, REST_TILE)
    for start in range(whole, vocab_size, REST_TILE):
        gradient_tile(
            start, rest_columns, vocab_size, student_row, gradient_row, rest_max, rest_log_sum, rest_factor, even,
            row_max, scale, cap, label, hard_log_sum, hard_factor, HARD, HAS_STUDENT_CAP, True, COMPUTE,
        )  # fmt: skip
    # Named columns are written once more, by other threads.
    tl.debug_barrier()
    first = row.to(tl.int64) * entries
    lanes = tl.arange(0, LANES)
    for start in range(0, entries, LANES):
        at = start + lanes
        id = tl.load(ids + first + at, mask=at < entries, other=NO_ID)
        logit = tl.load(gathered + first + at, mask=at < entries, other=0.0)
        h_s = tl.load(terms + first + at, mask=at < entries, other=0.0)
        gradient = factor * (h_s - tl.exp2((logit - row_max) * scale - row_log_sum) * sum_terms)
        if HARD:
            hard = tl.exp2((logit - row_max) * LOG2_E - hard_log_sum)
            gradient += hard_factor * (hard - tl.where(id == label, 1.0, 0.0))
        if HAS_STUDENT_CAP:
            ratio = logit / cap
            gradient *= 1 - ratio * ratio
        gradient = round_to(tl.where(logit == LOGIT_FLOOR, 0.0, gradient), gradient_row.dtype.element_ty)
        tl.store(gradient_row + id, gradient, mask=id < vocab_size)
