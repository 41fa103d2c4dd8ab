// The `head_mass` family on the CPU: the entries of a row that hold a given mass, from the most probable on, without a sort.
//
// The first entry that is not of the head has at least (1 - mass) / vocabulary of the probability, for all that follows it
// is no more probable and makes up 1 - mass. Of a language model's row few entries have so much: these are gathered with
// their logits, and halving the range of the logits finds where the mass is crossed. Entries with equal logits stay together.
#include <algorithm>
#include <limits>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

// Entries of a row: logit, probability up to a factor, and what the student's probability is away from it.
template <class Real>
struct Entries {
  Real *logits, *masses, *gaps;

  Entries operator+(int64_t n) const { return {logits + n, masses + n, gaps ? gaps + n : nullptr}; }
};

// Appends the entries whose logits are at least `bound` to `found`, which may be the very entries that are read or lie
// before them; returns how many. With `below` those that are less.
template <class Real>
inline int64_t take(Entries<Real> from, int64_t n, Real bound, bool below, Entries<Real> found) {
  constexpr int64_t group = 32;
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += group) {
    const int64_t end = n - start < group ? n : start + group;
    int wanted = 0;
#pragma omp simd reduction(+ : wanted)
    for (int64_t i = start; i < end; ++i) wanted += (from.logits[i] >= bound) != below;
    if (wanted == 0) continue;
    for (int64_t i = start; i < end; ++i) {
      const Real logit = from.logits[i];
      found.logits[count] = logit;
      if (from.masses) found.masses[count] = from.masses[i];
      if (from.gaps) found.gaps[count] = from.gaps[i];
      count += (logit >= bound) != below;
    }
  }
  return count;
}

#if defined(__AVX512F__)
template <>
inline int64_t take<float>(Entries<float> from, int64_t n, float bound, bool below, Entries<float> found) {
  const __m512 limit = _mm512_set1_ps(bound);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1u);
    const __m512 logit = _mm512_maskz_loadu_ps(lanes, from.logits + i);
    const __mmask16 high = _mm512_mask_cmp_ps_mask(lanes, logit, limit, _CMP_GE_OQ);
    const __mmask16 wanted = below ? static_cast<__mmask16>(lanes & ~high) : high;
    if (wanted == 0) continue;
    const int number = __builtin_popcount(wanted);
    const __mmask16 first = static_cast<__mmask16>((1u << number) - 1u);
    const __m512 mass = from.masses ? _mm512_maskz_loadu_ps(lanes, from.masses + i) : _mm512_setzero_ps();
    const __m512 gap = from.gaps ? _mm512_maskz_loadu_ps(lanes, from.gaps + i) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(found.logits + count, first, _mm512_maskz_compress_ps(wanted, logit));
    if (from.masses) _mm512_mask_storeu_ps(found.masses + count, first, _mm512_maskz_compress_ps(wanted, mass));
    if (from.gaps) _mm512_mask_storeu_ps(found.gaps + count, first, _mm512_maskz_compress_ps(wanted, gap));
    count += number;
  }
  return count;
}
#endif

// Of the entries on one side of a bound.
template <class Real>
struct Half {
  double mass = 0, gap = 0;
  Real lowest = std::numeric_limits<Real>::max(), highest = std::numeric_limits<Real>::lowest();
};

template <class Real>
inline void divide(Entries<Real> entries, int64_t n, Real bound, Half<Real>& above, Half<Real>& below) {
  Real above_lowest = above.lowest, above_highest = above.highest;
  Real below_lowest = below.lowest, below_highest = below.highest;
  for_blocks(n, [&](int64_t start, int64_t length) {
    const Entries<Real> part = entries + start;
    Real above_mass = 0, below_mass = 0, above_gap = 0, below_gap = 0;
#pragma omp simd reduction(+ : above_mass, below_mass) reduction(min : above_lowest, below_lowest) \
    reduction(max : above_highest, below_highest)
    for (int64_t i = 0; i < length; ++i) {
      const Real logit = part.logits[i], mass = part.masses[i];
      const Real high = logit >= bound ? logit : above_lowest, low = logit >= bound ? below_highest : logit;
      above_mass += logit >= bound ? mass : Real(0);
      below_mass += logit >= bound ? Real(0) : mass;
      above_lowest = high < above_lowest ? high : above_lowest;
      above_highest = logit > above_highest ? logit : above_highest;
      below_lowest = logit < below_lowest ? logit : below_lowest;
      below_highest = low > below_highest ? low : below_highest;
    }
    if (part.gaps) {
#pragma omp simd reduction(+ : above_gap, below_gap)
      for (int64_t i = 0; i < length; ++i) {
        above_gap += part.logits[i] >= bound ? part.gaps[i] : Real(0);
        below_gap += part.logits[i] >= bound ? Real(0) : part.gaps[i];
      }
    }
    above.mass += static_cast<double>(above_mass);
    below.mass += static_cast<double>(below_mass);
    above.gap += static_cast<double>(above_gap);
    below.gap += static_cast<double>(below_gap);
  });
  above.lowest = above_lowest;
  above.highest = above_highest;
  below.lowest = below_lowest;
  below.highest = below_highest;
}

template <class Real>
struct Head {
  Real threshold;
  double head_gap, tail_gap;
};

// The head of entries whose largest logit is that of the row; `target` in the unit of their masses. With `crossing` it has
// the entries that cross the target, too. The gaps of the entries are added to `tail_gap`, or make up that of the head.
template <class Real>
Head<Real> find_head(Entries<Real> entries, int64_t n, double target, bool crossing, double tail_gap) {
  Head<Real> result{0, 0, tail_gap};
  double above_mass = 0;
  Real above_lowest = 0;
  bool some_above = false;
  const Range<Real> range = range_of(entries.logits, n);
  Real lowest = range.min, highest = range.max;
  while (true) {
    // Above the lowest and at most the highest, so that there are entries on both sides.
    Real bound = lowest + (highest - lowest) / 2;
    if (!(bound > lowest)) bound = highest;
    Half<Real> above, below;
    divide(entries, n, bound, above, below);
    if (lowest == highest) {  // all in `above`
      if (above_mass + above.mass <= target || !some_above || (crossing && above_mass < target)) {
        result.threshold = lowest;
        result.head_gap += above.gap;
      } else {
        result.threshold = above_lowest;
        result.tail_gap += above.gap;
      }
      return result;
    }
    const bool crossed_above = above_mass + above.mass > target;
    n = take(entries, n, bound, !crossed_above, entries);
    if (crossed_above) {
      result.tail_gap += below.gap;
      lowest = above.lowest;
    } else {
      result.head_gap += above.gap;
      above_mass += above.mass;
      above_lowest = above.lowest;
      some_above = true;
      highest = below.highest;
    }
  }
}

// The memory of a thread: exponentials of both rows and their origins, where a gap is wanted, and the entries gathered.
template <class Real>
struct Scratch {
  Real *student, *teacher, *student_origin, *teacher_origin;
  Entries<Real> entries;

  static constexpr int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }
  static int64_t bytes(int64_t vocab, bool gaps) {
    const int64_t blocks = (vocab + block_size - 1) / block_size;
    return static_cast<int64_t>(sizeof(Real)) * (gaps ? 5 * padded(vocab) + 2 * padded(blocks) : 2 * padded(vocab));
  }

  Scratch(void* memory, int64_t vocab, bool gaps) {
    const int64_t row = padded(vocab), blocks = padded((vocab + block_size - 1) / block_size);
    Real* next = static_cast<Real*>(memory);
    entries = {next, next + row, gaps ? next + 2 * row : nullptr};
    student = next + 3 * row;
    teacher = student + row;
    student_origin = teacher + row;
    teacher_origin = student_origin + blocks;
  }
};

// The logit below which no entry can be the first of the tail. Half of the bound makes up for rounding.
template <class Real>
Real gathering_bound(const Stream<Real>& teacher, double mass, int64_t vocab) {
  const double share = 0.5 * (1 - mass) / static_cast<double>(vocab);
  const double distance = std::log(share) + teacher.log_sum() - teacher.tempering.of(teacher.max) * Stream<Real>::log_2;
  return static_cast<Real>(static_cast<double>(teacher.max) + std::min(0.0, distance) / teacher.inverse_temperature);
}

// What turns the exponentials kept for a block into probabilities.
template <class Real>
Real probability_scale(const Stream<Real>& stream, Real block_origin) {
  const double shift = stream.tempering.distance(block_origin, stream.tempering.origin);
  return static_cast<Real>((shift == 0 ? 1.0 : std::exp2(shift)) / stream.sum);
}

template <class Real>
Head<Real> head_of(const HeadMassProblem& problem, const Scratch<Real>& scratch, int64_t row) {
  const bool gaps = problem.gaps;
  const double mass = static_cast<double>(per_row<Real>(problem.mass, row));
  Stream<Real> teacher(problem.teacher, row, problem.teacher_softcap, per_row<Real>(problem.teacher_temperature, row));
  Stream<Real> student(gaps ? problem.student : problem.teacher, row, problem.student_softcap,
                       gaps ? per_row<Real>(problem.student_temperature, row) : Real(1));
  alignas(64) Real student_buffer[block_size], teacher_buffer[block_size], exponentials[block_size];
  Real lowest = std::numeric_limits<Real>::max();
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    Range<Real> range;
    const Real* t = teacher.load(start, n, teacher_buffer, range);
    lowest = std::min(lowest, std::max(range.min, static_cast<Real>(logit_floor)));
    teacher.raise(range);
    teacher.exponentiate(t, start, n, problem.vocab, gaps ? scratch.teacher + start : exponentials);
    if (!gaps) return;
    const Real* s = student.load(start, n, student_buffer, range);
    student.raise(range);
    student.exponentiate(s, start, n, problem.vocab, scratch.student + start);
    scratch.student_origin[start / block_size] = student.tempering.origin;
    scratch.teacher_origin[start / block_size] = teacher.tempering.origin;
  });
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  if (!std::isfinite(teacher.sum) || (gaps && !std::isfinite(student.sum))) return {static_cast<Real>(nan), nan, nan};

  const bool everything = mass >= 1;
  const Real bound = everything ? std::numeric_limits<Real>::max() : gathering_bound(teacher, mass, problem.vocab);
  double other_gap = 0;  // of entries that are not gathered
  int64_t count = 0;
  if (gaps || !everything) {
    for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
      Real *gap = nullptr, *masses = nullptr;
      Range<Real> range;
      const Real* t = teacher.load(start, n, teacher_buffer, range);
      if (gaps) {
        const Real student_scale = probability_scale(student, scratch.student_origin[start / block_size]);
        const Real teacher_scale = probability_scale(teacher, scratch.teacher_origin[start / block_size]);
        gap = student_buffer;
        masses = exponentials;
        const Real *q = scratch.student + start, *p = scratch.teacher + start;
        const Real least = bound;  // a copy that the stores below cannot change
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
          const Real mine = q[i] * student_scale, theirs = p[i] * teacher_scale;
          const Real difference = theirs - mine;
          const Real size = difference < Real(0) ? -difference : difference;
          gap[i] = size;
          masses[i] = theirs;
          sum += t[i] >= least ? Real(0) : size;
        }
        other_gap += static_cast<double>(sum);
      }
      if (range.max >= bound)
        count += take<Real>({const_cast<Real*>(t), masses, gap}, n, bound, false, scratch.entries + count);
    });
  }
  if (everything) return {lowest, other_gap, 0};
  double target = mass;
  if (!gaps) {
    exp2_block(scratch.entries.logits, count, teacher.tempering, scratch.entries.masses);
    target *= teacher.sum;
  }
  return find_head(scratch.entries, count, target, problem.crossing, other_gap);
}

template <class Real>
bool run(const HeadMassProblem& problem) {
  const int64_t bytes = Scratch<Real>::bytes(problem.vocab, problem.gaps);
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  bool done = true;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, group) \
    reduction(&& : done)
  for (int64_t row = 0; row < problem.rows; ++row) {
    void* memory = thread_scratch(bytes);
    done = done && memory;
    if (!memory) continue;
    Head<Real> head{0, 0, 0};
    if (!problem.active || problem.active[row])
      head = head_of(problem, Scratch<Real>(memory, problem.vocab, problem.gaps), row);
    if (problem.thresholds) static_cast<Real*>(problem.thresholds)[row] = head.threshold;
    if (problem.gaps) {
      static_cast<Real*>(problem.gaps)[2 * row] = static_cast<Real>(head.head_gap);
      static_cast<Real*>(problem.gaps)[2 * row + 1] = static_cast<Real>(head.tail_gap);
    }
  }
  return done;
}

}  // namespace

bool head_mass(const HeadMassProblem& problem) {
  return problem.compute_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace kd::KD_ISA
