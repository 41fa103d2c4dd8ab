// The `sorted_l1` family on the CPU: sum_r |q_(r) - p_(r)| of two softmax rows sorted in falling order.
//
// It is the integral of |D(t)| over t, D = N_q - N_p, where N(t) counts the entries above t; and an entry's gradient needs
// only the sign of q_(r) - p_(r) at its rank r. Both rows are counted into buckets, equally wide on the logarithmic scale
// of probability. With D at the edges of a bucket known, most often D cannot change sign within it, and all its entries
// have that sign, whatever their order. Only buckets where it can are sorted: docs/optimal_transport.md has the proofs.
#include <algorithm>
#include <limits>

#include "cpu/arena.h"
#include "cpu/row_blocks.h"
#include "cpu/sorted_entries.h"

namespace kd::KD_ISA {
namespace {

// The places in a block whose buckets have the sign `wanted`; returns how many. `found` has room for block_size + 16.
inline int64_t find_sign(const uint16_t* buckets, int64_t n, const float* signs, float wanted, int32_t* found) {
  int64_t count = 0;
  int32_t i = 0;
#if defined(__AVX512F__)
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buckets + i));
    const __m512i bucket = _mm512_maskz_cvtepu16_epi32(0xFFFF, packed);
    const __m512 sign = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, bucket, signs, 4);
    const __mmask16 hit = _mm512_cmp_ps_mask(sign, _mm512_set1_ps(wanted), _CMP_EQ_OQ);
    const __m512i place = _mm512_add_epi32(places, _mm512_set1_epi32(i));
    _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(hit, place));
    count += __builtin_popcount(hit);
  }
#endif
  for (; i < n; ++i) {
    found[count] = i;
    count += signs[buckets[i]] == wanted;
  }
  return count;
}

// The scale of the buckets: bucket i holds the probabilities whose depth is in [i, i + 1). Depth grows as the logarithm of
// the probability falls, from 0 at the largest of both rows. It is a double, the same function on both sides: depths decide
// on which of two probabilities is larger, too.
struct Scale {
  double top = 0;      // log2 of the probability of depth 0
  double density = 0;  // buckets per log 2
  int buckets = 0;     // and one more for dust: probabilities that a Real holds no more
};

// What stands for the bucket of an entry once its own sign is known.
enum OwnSign { plus = 1, minus = 2, zero = 3, own_signs = 4 };

constexpr float unknown_sign = 2;

// A bucket in which D may change its sign.
struct Crossing {
  int32_t bucket;
  int32_t student_above, teacher_above;  // entries in higher buckets
  int32_t students, teachers;            // entries in this one
};

// Sums run in a Real over this many entries, then in double: what they err by is part of the bound that users are told.
constexpr int64_t run_size = 256;

template <class Body>
KD_INLINE void for_runs(int64_t vocab, Body body) {
  for (int64_t start = 0; start < vocab; start += run_size) body(start, std::min(vocab - start, run_size));
}

// One side of a row.
template <class Real>
struct RankedSide {
  Stream<Real> stream;
  int64_t vocab;
  Real lowest;                   // logit
  double slope = 0, offset = 0;  // depth of a logit relative to the largest
  uint16_t* buckets = nullptr;   // [vocab]
  int32_t* counts = nullptr;     // [buckets + 1]
  Entry<Real>* entries = nullptr;
  double above = 0, below = 0, equal = 0;  // sums of exponentials by sign

  RankedSide(const Matrix& matrix, int64_t vocab, int64_t row, double softcap, double temperature)
      : stream(matrix, row, softcap, temperature), vocab(vocab), lowest(std::numeric_limits<Real>::max()) {}

  void read() {
    alignas(64) Real buffer[run_size], exponentials[run_size];
    for_runs(vocab, [&](int64_t start, int64_t n) {
      Range<Real> range;
      const Real* run = stream.load(start, n, buffer, range);
      lowest = std::min(lowest, range.min);
      stream.raise(range);
      const int64_t ahead = std::min(start + block_size, vocab);
      const int64_t upcoming = std::min(vocab - ahead, n) * dtype_size(stream.matrix.dtype);
      stream.sum +=
          exp2_block(run, n, stream.tempering, exponentials, entry_address(stream.matrix, stream.row, ahead), upcoming);
    });
  }

  bool valid() const { return std::isfinite(stream.sum) && stream.sum > 0; }
  double log2_of_largest() const {
    return stream.tempering.of(static_cast<double>(stream.max)) - std::log2(stream.sum);
  }
  double log2_slope() const { return stream.inverse_temperature * Stream<Real>::log2_e; }
  double log2_of_lowest() const {
    return log2_of_largest() + (static_cast<double>(lowest) - static_cast<double>(stream.max)) * log2_slope();
  }

  KD_INLINE double depth(Real logit) const {
    return (static_cast<double>(logit) - static_cast<double>(stream.max)) * slope + offset;
  }

  void count(const Scale& scale) {
    slope = -log2_slope() * scale.density;
    offset = (scale.top - log2_of_largest()) * scale.density;
    std::fill(counts, counts + scale.buckets + 1, 0);
    alignas(64) Real buffer[block_size];
    const double largest = static_cast<double>(stream.max), factor = slope, shift = offset;
    const double dust = scale.buckets;
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      const Real* block = stream.load(start, n, buffer);
      uint16_t* __restrict out = buckets + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        double depth = (static_cast<double>(block[i]) - largest) * factor + shift;
        depth = depth > 0 ? depth : 0;
        depth = depth < dust ? depth : dust;
        out[i] = static_cast<uint16_t>(static_cast<int32_t>(depth));
      }
      for (int64_t i = 0; i < n; ++i) ++counts[out[i]];
    });
  }

  // Brings the entries of the crossing buckets together, bucket by bucket, each in the order of their ids.
  void gather(const float* signs, const Crossing* crossings, int64_t count, int32_t Crossing::* size) {
    int32_t* ends = counts;  // of what is gathered of each bucket; how many there are the crossings know
    int32_t before = 0;
    for (int64_t i = 0; i < count; ++i) {
      ends[crossings[i].bucket] = before;
      before += crossings[i].*size;
    }
    alignas(64) Real buffer[block_size];
    int32_t found[block_size + 16];
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      const uint16_t* in = buckets + start;
      const int64_t hits = find_sign(in, n, signs, unknown_sign, found);
      if (hits == 0) return;
      const Real* block = stream.load(start, n, buffer);
      for (int64_t i = 0; i < hits; ++i)
        entries[ends[in[found[i]]]++] = Entry<Real>::of(block[found[i]], start + found[i]);
    });
  }

  // The masses above, below and equal to the other side's.
  void sum_by_sign(const float* signs) {
    alignas(64) Real buffer[run_size], exponentials[run_size];
    for_runs(vocab, [&](int64_t start, int64_t n) {
      const Real* block = stream.load(start, n, buffer);
      exp2_block(block, n, stream.tempering, exponentials);
      const uint16_t* in = buckets + start;
      Real higher = 0, lower = 0, same = 0;
#pragma omp simd reduction(+ : higher, lower, same)
      for (int64_t i = 0; i < n; ++i) {
        const Real sign = static_cast<Real>(signs[in[i]]), e = exponentials[i];
        higher += sign > 0 ? e : Real(0);
        lower += sign < 0 ? e : Real(0);
        same += sign == 0 ? e : Real(0);
      }
      above += static_cast<double>(higher);
      below += static_cast<double>(lower);
      equal += static_cast<double>(same);
    });
  }

  // sum_v probability_v sign_v
  double signed_mass() const { return (above - below) / stream.sum; }

  // factor * probability_v * (sign_v - sum_u probability_u sign_u). Of the difference no digits are lost: for an entry of
  // sign 1 it is the sum of probability_u (1 - sign_u).
  void write_gradient(const float* signs, double factor, const Matrix& gradient) const {
    const double unit = factor / (stream.sum * stream.sum);
    const Real up = static_cast<Real>(unit * (2 * below + equal)),
               down = static_cast<Real>(-unit * (2 * above + equal));
    const Real level = static_cast<Real>(unit * (below - above));
    alignas(64) Real buffer[block_size], result[block_size];
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      const Real* block = stream.load(start, n, buffer);
      exp2_block(block, n, stream.tempering, result);
      const uint16_t* in = buckets + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Real sign = static_cast<Real>(signs[in[i]]);
        result[i] *= sign > 0 ? up : sign < 0 ? down : level;
      }
      through_clamp_and_softcap(stream, n, block, result);
      store_block(result, n, entry_address(gradient, stream.row, start), gradient.dtype);
    });
  }
};

// So many that few entries share one, and few enough that the counts stay in the second-level cache.
int bucket_count(int64_t vocab) {
  constexpr int most_buckets = 16384;
  int buckets = 32;
  while (buckets < most_buckets && buckets * 16 < vocab) buckets *= 2;
  return buckets;
}

// The tables of one row.
struct Tables {
  float* signs;         // [buckets + 1 + own_signs]
  Crossing* crossings;  // [buckets]
  int64_t count = 0;    // of crossings
};

template <class Real>
Scale common_scale(const RankedSide<Real>& student, const RankedSide<Real>& teacher) {
  Scale scale;
  scale.buckets = bucket_count(std::max(student.vocab, teacher.vocab));
  scale.top = std::max(student.log2_of_largest(), teacher.log2_of_largest());
  const double dust = std::numeric_limits<Real>::min_exponent - 1;
  const double bottom = std::max(dust, std::min(student.log2_of_lowest(), teacher.log2_of_lowest()));
  scale.density = (scale.buckets - 1) / std::max(scale.top - bottom, 1e-9);
  return scale;
}

// The sign of D in each bucket where it cannot change.
template <class Real>
void compare_counts(const RankedSide<Real>& student, const RankedSide<Real>& teacher, const Scale& scale,
                    Tables& tables) {
  int32_t student_above = 0, teacher_above = 0;
  for (int bucket = 0; bucket < scale.buckets; ++bucket) {
    const int32_t students = student.counts[bucket], teachers = teacher.counts[bucket];
    const bool up = student_above >= teacher_above + teachers, down = teacher_above >= student_above + students;
    tables.signs[bucket] = up ? (down ? 0.0f : 1.0f) : down ? -1.0f : unknown_sign;
    tables.crossings[tables.count] = {bucket, student_above, teacher_above, students, teachers};
    tables.count += !up && !down;
    student_above += students;
    teacher_above += teachers;
  }
  tables.signs[scale.buckets] = 0;
  float* own = tables.signs + scale.buckets;
  own[plus] = 1;
  own[minus] = -1;
  own[zero] = 0;
}

// Gives the crossing buckets a sign of their own, the least probable first, while what that can cost stays below the bound.
// Returns what has to be added to the value; the bound is what is left.
double leave_unsorted(const Scale& scale, Tables& tables, double& bound) {
  double correction = 0;
  const double ratio = std::exp2(-1 / scale.density);
  int64_t kept = tables.count;
  for (int64_t i = tables.count - 1; i >= 0; --i) {
    const Crossing& crossing = tables.crossings[i];
    const double high = std::exp2(scale.top - crossing.bucket / scale.density), low = high * ratio;
    const int32_t at_high = crossing.student_above - crossing.teacher_above;
    const int32_t at_low = at_high + crossing.students - crossing.teachers;
    const int32_t most = at_high + crossing.students, least = at_high - crossing.teachers;
    const double cost = 2 * (high - low) * std::min(most, -least);
    if (cost > bound) {
      tables.crossings[--kept] = crossing;
      continue;
    }
    bound -= cost;
    const int32_t twice = at_high + at_low;
    const int sign = (twice > 0) - (twice < 0);
    tables.signs[crossing.bucket] = static_cast<float>(sign);
    correction += (sign * at_high - std::abs(at_high)) * high - (sign * at_low - std::abs(at_low)) * low;
  }
  std::copy(tables.crossings + kept, tables.crossings + tables.count, tables.crossings);
  tables.count -= kept;
  return correction;
}

// Gives each entry of the crossing buckets its own sign.
template <class Real>
void sort_crossings(RankedSide<Real>& student, RankedSide<Real>& teacher, Entry<Real>* spare, const Scale& scale,
                    const Tables& tables) {
  student.gather(tables.signs, tables.crossings, tables.count, &Crossing::students);
  teacher.gather(tables.signs, tables.crossings, tables.count, &Crossing::teachers);
  const uint16_t first = static_cast<uint16_t>(scale.buckets);
  const auto all = [&](RankedSide<Real>& side, const Entry<Real>* entries, int64_t from, int64_t to, OwnSign sign) {
    for (int64_t i = from; i < to; ++i) side.buckets[entries[i].id()] = static_cast<uint16_t>(first + sign);
  };
  Entry<Real>*q = student.entries, *p = teacher.entries;
  for (int64_t i = 0; i < tables.count; ++i) {
    const Crossing& crossing = tables.crossings[i];
    const int64_t students = crossing.students, teachers = crossing.teachers;
    sort_entries(q, spare, students);
    sort_entries(p, spare, teachers);
    // The student's entry j and the teacher's j + shift have the same rank.
    const int64_t shift = static_cast<int64_t>(crossing.student_above) - crossing.teacher_above;
    const int64_t begin = std::clamp(-shift, int64_t(0), students), end = std::clamp(teachers - shift, begin, students);
    all(student, q, 0, begin, minus);
    all(student, q, end, students, plus);
    all(teacher, p, 0, std::clamp(shift, int64_t(0), teachers), plus);
    all(teacher, p, std::clamp(students + shift, int64_t(0), teachers), teachers, minus);
    for (int64_t j = begin; j < end; ++j) {
      const Entry<Real> one = q[j], other = p[j + shift];
      const double depth = student.depth(one.logit()), other_depth = teacher.depth(other.logit());
      const int sign = depth == other_depth ? zero : depth < other_depth ? plus : minus;
      student.buckets[one.id()] = teacher.buckets[other.id()] = static_cast<uint16_t>(first + sign);
    }
    q += students;
    p += teachers;
  }
}

template <class Real>
bool run_row(const SortedL1Problem& problem, int64_t row) {
  Real& value = static_cast<Real*>(problem.values)[row];
  Real& omitted = static_cast<Real*>(problem.omitted)[row];
  const auto finish = [&](Real result, Real gradient) {
    value = result;
    omitted = result;
    fill_row(problem.grad_student, problem.student_vocab, row, gradient);
    fill_row(problem.grad_teacher, problem.teacher_vocab, row, gradient);
    return true;
  };
  if (problem.active && !problem.active[row]) return finish(0, 0);
  const double student_temperature = per_row<Real>(problem.student_temperature, row);
  const double teacher_temperature = per_row<Real>(problem.teacher_temperature, row);
  RankedSide<Real> student(problem.student, problem.student_vocab, row, problem.student_softcap, student_temperature);
  RankedSide<Real> teacher(problem.teacher, problem.teacher_vocab, row, problem.teacher_softcap, teacher_temperature);
  student.read();
  teacher.read();
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  if (!student.valid() || !teacher.valid()) return finish(nan, nan);

  const Scale scale = common_scale(student, teacher);
  Tables tables;
  Entry<Real>* spare = nullptr;
  const auto divide = [&](Arena arena) {
    for (RankedSide<Real>* side : {&student, &teacher}) {
      side->buckets = arena.take<uint16_t>(side->vocab);
      side->counts = arena.take<int32_t>(scale.buckets + 1);
      side->entries = arena.take<Entry<Real>>(side->vocab);
    }
    tables.signs = arena.take<float>(scale.buckets + 1 + own_signs);
    tables.crossings = arena.take<Crossing>(scale.buckets);
    spare = arena.take<Entry<Real>>(std::max(student.vocab, teacher.vocab));
    return arena.next;
  };
  void* memory = thread_scratch(static_cast<int64_t>(divide({0})));
  if (!memory) return false;
  divide({reinterpret_cast<uintptr_t>(memory)});

  student.count(scale);
  teacher.count(scale);
  compare_counts(student, teacher, scale, tables);
  double left = problem.error_bound, correction = 0;
  if (left > 0) correction = leave_unsorted(scale, tables, left);
  if (tables.count) sort_crossings(student, teacher, spare, scale, tables);
  student.sum_by_sign(tables.signs);
  teacher.sum_by_sign(tables.signs);
  value = static_cast<Real>(student.signed_mass() - teacher.signed_mass() + correction);
  omitted = static_cast<Real>(problem.error_bound - left);
  const double factor = static_cast<double>(per_row<Real>(problem.grad_values, row));
  if (problem.grad_student.data)
    student.write_gradient(tables.signs, factor / student_temperature, problem.grad_student);
  if (problem.grad_teacher.data)
    teacher.write_gradient(tables.signs, -factor / teacher_temperature, problem.grad_teacher);
  return true;
}

template <class Real>
bool run(const SortedL1Problem& problem) {
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  bool done = true;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, group) \
    reduction(&& : done)
  for (int64_t row = 0; row < problem.rows; ++row) done = run_row<Real>(problem, row) && done;
  return done;
}

}  // namespace

bool sorted_l1(const SortedL1Problem& problem) {
  return problem.compute_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace kd::KD_ISA
