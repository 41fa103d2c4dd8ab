// The `ranking` family on the CPU: the Plackett-Luce likelihood of an order of a row's entries, and the ranks of entries.
//
// With the student's logits x_k in that order, S_k = sum_{l >= k} exp(x_l) and C_k = sum_{l <= k} w_l / S_l, the value is
// sum_k w_k (log S_k - x_k) and its gradient exp(x_k) C_{k-1} - w_k S_{k+1} / S_k: a scan from the back and one from the
// front. Every sum has terms of one sign, so nothing cancels; both are kept in double, relative to an origin that follows
// the largest logit of the suffix. Entries that the order does not name all come behind it, as one sum.
#include <algorithm>
#include <limits>

#include "cpu/arena.h"
#include "cpu/row_blocks.h"
#include "cpu/sorted_entries.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t longest_segment = 512;
// Below this a sum of exponentials may have lost digits to underflow; its origin is then too far above its terms.
constexpr double smallest_sum = 0x1p-60;

// A run of ranks whose exponentials are relative to one origin.
template <class Real>
struct Segment {
  Tempering<Real> tempering;
  double behind;  // the sum of the exponentials after it
  int32_t begin, end;
};

// One row, in pieces of the thread's scratch memory.
template <class Real>
struct Order {
  const RankingProblem& problem;
  int64_t row, vocab, capacity;
  Stream<Real> student;

  Real* logits = nullptr;          // [vocab]: the student's
  Real* gradient = nullptr;        // [vocab]; in the beginning exponentials of what the order does not name
  Entry<Real>* entries = nullptr;  // [vocab], while the teacher is sorted
  Entry<Real>* spare = nullptr;    // [vocab]
  int32_t* ids = nullptr;          // [ranks], and so are the following
  Real* weights = nullptr;
  Real* ranked = nullptr;  // the student's logits
  Real* exponentials = nullptr;
  double* sums = nullptr;  // of them, from here to the end
  Segment<Real>* segments = nullptr;
  int64_t ranks = 0, segment_count = 0;

  Real largest = static_cast<Real>(logit_floor);  // of the suffix
  Tempering<Real> tempering = Tempering<Real>::at_temperature_one(static_cast<Real>(logit_floor));
  double sum = 0;
  Tempering<Real> tail_tempering = tempering;  // of what the order does not name

  Order(const RankingProblem& problem, int64_t row)
      : problem(problem),
        row(row),
        vocab(problem.vocab),
        capacity(problem.ranks),
        student(problem.student, row, problem.student_softcap, 1) {}

  uintptr_t divide(Arena arena) {
    logits = arena.take<Real>(vocab);
    gradient = arena.take<Real>(vocab);
    if (!problem.order) {
      // What is ranked takes the place of what was sorted.
      entries = arena.take<Entry<Real>>(vocab);
      spare = arena.take<Entry<Real>>(vocab);
      sums = reinterpret_cast<double*>(entries);
      ranked = reinterpret_cast<Real*>(spare);
      exponentials = ranked + vocab;
    } else {
      sums = arena.take<double>(capacity);
      ranked = arena.take<Real>(capacity);
      exponentials = arena.take<Real>(capacity);
    }
    ids = arena.take<int32_t>(capacity);
    weights = arena.take<Real>(capacity);
    segments = arena.take<Segment<Real>>(capacity);
    return arena.next;
  }

  void read_student() {
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      Range<Real> range;
      const Real* block = student.load(start, n, logits + start, range);
      if (block != logits + start) std::copy(block, block + n, logits + start);
      student.raise(range);
    });
  }

  void take_order() {
    const int64_t* order = problem.order + row * capacity;
    while (ranks < capacity && order[ranks] >= 0) {
      ids[ranks] = static_cast<int32_t>(order[ranks]);
      ++ranks;
    }
    take_weights(ranks);
  }

  void take_weights(int64_t count) {
    const Real* given = static_cast<const Real*>(problem.weights) + row * problem.weight_stride;
    std::copy(given, given + count, weights);
    std::fill(weights + count, weights + ranks, Real(0));
  }

  // The teacher's order: the label, then by falling logit, NaN as if it were infinite, equal ones by rising id.
  void sort_teacher() {
    const Stream<Real> teacher(problem.teacher, row, 0, 1);  // a softcap keeps the order, but makes large logits equal
    bool valid = true;
    alignas(64) Real buffer[block_size];
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      const Real* block = teacher.load(start, n, buffer);
      Entry<Real>* out = entries + start;
      int nans = 0;
      for (int64_t i = 0; i < n; ++i) {
        const bool nan = block[i] != block[i];
        nans += nan;
        out[i] = Entry<Real>::of(nan ? std::numeric_limits<Real>::infinity() : block[i], start + i);
      }
      valid = valid && nans == 0;
    });
    sort_entries(entries, spare, vocab);
    valid = valid && (problem.teacher_softcap != 0 || std::isfinite(entries[0].logit()));
    if (problem.labels) {
      int64_t place = 0;
      while (entries[place].id() != problem.labels[row]) ++place;
      std::rotate(entries, entries + place, entries + place + 1);
    }
    ranks = vocab;
    for (int64_t k = 0; k < vocab; ++k) ids[k] = static_cast<int32_t>(entries[k].id());
    // What the teacher masks has no rank to win, except for a label with a weight of its own.
    const int64_t leading = problem.labels && problem.weights;
    int64_t named = vocab;
    while (named > leading && entries[named - 1].logit() <= static_cast<Real>(logit_floor)) --named;
    if (problem.weights) {
      take_weights(named);
    } else {
      for (int64_t k = 0; k < vocab; ++k) weights[k] = entries[k].logit();
      take_probabilities(named);
    }
    if (!valid) weights[0] = std::numeric_limits<Real>::quiet_NaN();
  }

  // The softmax of the teacher's sorted logits, which `weights` holds.
  void take_probabilities(int64_t named) {
    const Matrix sorted{weights, 0, sizeof(Real) == 4 ? DType::float32 : DType::float64};
    const double temperature = per_row<Real>(problem.teacher_temperature, row);
    Stream<Real> teacher(sorted, 0, problem.teacher_softcap, temperature);
    Range<Real> range;
    Real first[2];
    const int64_t upmost = std::min<int64_t>(vocab, 2);  // a label comes first, whatever its logit
    teacher.load(0, upmost, first, range);
    teacher.raise(range);
    alignas(64) Real buffer[block_size], powers[block_size];
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      teacher.sum += exp2_block(teacher.load(start, n, buffer), n, teacher.tempering, powers);
      std::copy(powers, powers + n, weights + start);
    });
    const Real inverse = static_cast<Real>(1 / teacher.sum);
#pragma omp simd
    for (int64_t k = 0; k < named; ++k) weights[k] *= inverse;
    std::fill(weights + named, weights + vocab, Real(0));
  }

  // Sums what the order does not name.
  void sum_tail() {
    if (ranks == vocab) return;
    raise(student.max);
    for (int attempt = 0; attempt < 2; ++attempt) {
      double total = 0;
      for_blocks(vocab, [&](int64_t start, int64_t n) { exp2_block(logits + start, n, tempering, gradient + start); });
      for (int64_t k = 0; k < ranks; ++k) gradient[ids[k]] = 0;
      for_blocks(vocab, [&](int64_t start, int64_t n) {
        Real part = 0;
        const Real* block = gradient + start;
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < n; ++i) part += block[i];
        total += static_cast<double>(part);
      });
      sum = total;
      tail_tempering = tempering;
      if (!(total < smallest_sum) || attempt) return;
      // All of it lies far below what is named: its own largest is the origin. The exponentials of what is named may
      // overflow then, but do not stay.
      std::fill(gradient, gradient + vocab, Real(1));
      for (int64_t k = 0; k < ranks; ++k) gradient[ids[k]] = 0;
      largest = static_cast<Real>(logit_floor);
      for (int64_t i = 0; i < vocab; ++i)
        if (gradient[i] > 0 && logits[i] > largest) largest = logits[i];
      tempering = Tempering<Real>::at_temperature_one(largest);
    }
  }

  void raise(Real logit) {
    if (!(logit > largest)) return;
    largest = logit;
    tempering = Tempering<Real>::at_temperature_one(largest);
  }

  // The scan from the back: exponentials, their sums, and the value.
  double sum_suffixes() {
    for (int64_t k = 0; k < ranks; ++k) ranked[k] = logits[ids[k]];
    double value = 0;
    for (int64_t end = ranks; end > 0;) {
      const Tempering<Real> before = tempering;
      Segment<Real> segment;
      int64_t n = std::min(end, longest_segment);
      while (true) {
        const Real* part = ranked + end - n;
        const Real high = range_of(part, n).max;
        segment.tempering = high > largest ? Tempering<Real>::at_temperature_one(high) : before;
        segment.behind = sum * std::exp2(before.distance(before.origin, segment.tempering.origin));
        exp2_block(part, n, segment.tempering, exponentials + end - n);
        // NaN is taken as it comes.
        if (n == 1 || !(segment.behind + static_cast<double>(exponentials[end - 1]) < smallest_sum)) {
          raise(high);
          break;
        }
        n /= 2;
      }
      segment.end = static_cast<int32_t>(end);
      segment.begin = static_cast<int32_t>(end - n);
      tempering = segment.tempering;
      sum = segment.behind;
      for (int64_t k = end - 1; k >= end - n; --k) {
        sum += static_cast<double>(exponentials[k]);
        sums[k] = sum;
      }
      value += segment_value(segment);
      segments[segment_count++] = segment;
      end -= n;
    }
    return value;
  }

  double segment_value(const Segment<Real>& segment) const {
    const Tempering<Real> temper = segment.tempering;
    const int64_t n = segment.end - segment.begin;
    const Real* weight = weights + segment.begin;
    const Real* logit = ranked + segment.begin;
    const double* total = sums + segment.begin;
    Real value = 0;
#pragma omp simd reduction(+ : value)
    for (int64_t i = 0; i < n; ++i)
      value += weight[i] * (math::log(static_cast<Real>(total[i])) - temper(logit[i]) * Real(Stream<Real>::log_2));
    return static_cast<double>(value);
  }

  // The scan from the front: turns exponentials into the gradients of what is named. Returns C, relative to the tail's origin.
  double scan_prefixes(double factor) {
    double shares = 0;  // C
    Tempering<Real> before = tempering;
    alignas(64) double added[longest_segment], shared[longest_segment], left[longest_segment];
    for (int64_t s = segment_count - 1; s >= 0; --s) {
      const Segment<Real>& segment = segments[s];
      shares *= std::exp2(-before.distance(before.origin, segment.tempering.origin));
      before = segment.tempering;
      const int64_t n = segment.end - segment.begin;
      const Real* weight = weights + segment.begin;
      Real* power = exponentials + segment.begin;
      const double* total = sums + segment.begin;
#pragma omp simd
      for (int64_t i = 0; i < n - 1; ++i) left[i] = total[i + 1];
      left[n - 1] = segment.behind;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        added[i] = factor * static_cast<double>(weight[i]) / total[i];
        left[i] *= added[i];
      }
      for (int64_t i = 0; i < n; ++i) {
        shared[i] = shares;
        shares += added[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) power[i] = static_cast<Real>(static_cast<double>(power[i]) * shared[i] - left[i]);
    }
    return shares * std::exp2(-before.distance(before.origin, tail_tempering.origin));
  }

  void write_gradient(double factor) {
    const double tail_share = scan_prefixes(factor);
    if (ranks < vocab) {
      const Real share = static_cast<Real>(tail_share);
#pragma omp simd
      for (int64_t i = 0; i < vocab; ++i) gradient[i] *= share;
    }
    for (int64_t k = 0; k < ranks; ++k) gradient[ids[k]] = exponentials[k];
    for_blocks(vocab, [&](int64_t start, int64_t n) {
      through_clamp_and_softcap(student, n, logits + start, gradient + start);
      store_block(gradient + start, n, entry_address(problem.grad_student, row, start), problem.grad_student.dtype);
    });
  }
};

template <class Real>
bool run_row(const RankingProblem& problem, int64_t row) {
  Real& value = static_cast<Real*>(problem.values)[row];
  if (problem.active && !problem.active[row]) {
    value = 0;
    if (problem.grad_student.data) fill_row(problem.grad_student, problem.vocab, row, Real(0));
    return true;
  }
  Order<Real> order(problem, row);
  void* memory = thread_scratch(static_cast<int64_t>(order.divide({0})));
  if (!memory) return false;
  order.divide({reinterpret_cast<uintptr_t>(memory)});
  order.read_student();
  if (problem.order) {
    order.take_order();
  } else {
    order.sort_teacher();
  }
  order.sum_tail();
  value = static_cast<Real>(order.sum_suffixes());
  if (problem.grad_student.data) order.write_gradient(static_cast<double>(per_row<Real>(problem.grad_values, row)));
  return true;
}

template <class Real>
void count_row(const RankProblem& problem, int64_t row) {
  const Matrix& source = problem.source;
  const int64_t* ids = problem.ids + row * problem.count;
  int64_t* ranks = problem.ranks + row * problem.count;
  const auto logit = [&](int64_t id) {
    Real value = 0;
    convert_block(entry_address(source, row, id), source.dtype, 1, &value);
    return value;
  };
  std::fill(ranks, ranks + problem.count, 0);
  const bool direct = source.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64);
  alignas(64) Real buffer[block_size];
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    const void* at = entry_address(source, row, start);
    if (!direct) convert_block(at, source.dtype, n, buffer);
    const Real* block = direct ? static_cast<const Real*>(at) : buffer;
    for (int64_t i = 0; i < problem.count; ++i)
      if (ids[i] >= 0) ranks[i] += count_above(block, n, logit(ids[i]));
  });
  for (int64_t i = 0; i < problem.count; ++i) {
    if (ids[i] < 0) {
      ranks[i] = -1;
    } else if (std::isnan(logit(ids[i]))) {
      ranks[i] = problem.vocab;
    }
  }
}

template <class Problem, class Row>
bool each_row(const Problem& problem, Row run) {
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  bool done = true;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, group) \
    reduction(&& : done)
  for (int64_t row = 0; row < problem.rows; ++row) done = run(problem, row) && done;
  return done;
}

template <class Real>
bool count_ranks(const RankProblem& problem) {
  return each_row(problem, [](const RankProblem& each, int64_t row) {
    count_row<Real>(each, row);
    return true;
  });
}

}  // namespace

bool plackett_luce(const RankingProblem& problem) {
  return each_row(problem, problem.compute_double ? run_row<double> : run_row<float>);
}

bool token_ranks(const RankProblem& problem) {
  return problem.compute_double ? count_ranks<double>(problem) : count_ranks<float>(problem);
}

}  // namespace kd::KD_ISA
