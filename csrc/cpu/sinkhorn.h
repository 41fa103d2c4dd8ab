// One transport problem in scaled form: the matrix K_ij = exp((f0_i + g0_j - C_ij) / eps) around base potentials in double
// precision, and what is done with it row by row. While the potentials stay near their base, an iteration is a product
// of K with a vector, and K is read once for both halves: each group of rows goes from its sums straight into the sums of
// the columns.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cpu/kernels.h"
#include "math/elementary.h"

// Vectors wider than the instruction set's are passed between functions of one translation unit only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace kd::KD_ISA {
namespace {

constexpr int64_t row_group = 8;     // rows that go through a sweep together
constexpr int64_t chunk_rows = 256;  // rows whose column sums are added up on their own, whoever does it

template <class Real>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Full __attribute__((vector_size(64)));
  typedef float Eight __attribute__((vector_size(32)));
  static KD_INLINE Eight fold(const Full& x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  }
};
template <>
struct Vectors<double> {
  typedef double Full __attribute__((vector_size(64)));
  typedef Full Eight;
  static KD_INLINE Eight fold(const Full& x) { return x; }
};

template <class Real>
KD_INLINE typename Vectors<Real>::Eight eight_at(const Real* x) {
  return *reinterpret_cast<const typename Vectors<Real>::Eight*>(x);
}

template <class Real>
KD_INLINE void put_eight(Real* into, const typename Vectors<Real>::Eight& x) {
  *reinterpret_cast<typename Vectors<Real>::Eight*>(into) = x;
}

template <class Real>
constexpr int64_t lanes = 64 / static_cast<int64_t>(sizeof(Real));

// The sums of eight vectors.
template <class Real>
KD_INLINE typename Vectors<Real>::Eight sums_of(const typename Vectors<Real>::Full (&x)[8]) {
  using Eight = typename Vectors<Real>::Eight;
  Eight pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Eight one = Vectors<Real>::fold(x[2 * i]), other = Vectors<Real>::fold(x[2 * i + 1]);
    pairs[i] = __builtin_shufflevector(one, other, 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(one, other, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i)
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

KD_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How much of a balanced update a relaxed one makes.
inline double relaxation(double reach, double epsilon) { return std::isinf(reach) ? 1.0 : reach / (reach + epsilon); }

// What the dual objective takes of a potential, and its derivative.
inline double conjugate(double x, double reach) { return std::isinf(reach) ? x : -reach * std::expm1(-x / reach); }
inline double conjugate_slope(double x, double reach) { return std::isinf(reach) ? 1.0 : std::exp(-x / reach); }

inline double epsilon_at(const SinkhornProblem& problem, int64_t iteration) {
  const double annealed = problem.epsilon_start * std::pow(problem.epsilon_decay, static_cast<double>(iteration));
  return std::max(problem.epsilon, annealed);
}

// Memory of one problem: the thread's own if it is small, else returned when the problem is done.
class Arena {
 public:
  explicit Arena(int64_t bytes) {
    constexpr int64_t kept = int64_t{1} << 23;
    if (bytes > kept) owned_.reset(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64))));
    next_ = static_cast<char*>(bytes > kept ? owned_.get() : thread_scratch(bytes));
  }
  explicit operator bool() const { return next_; }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    return taken;
  }
  template <class T>
  static int64_t size(int64_t count) {
    return round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> owned_;
  char* next_ = nullptr;
};

// Calls body(chunk) for every chunk.
template <class Body>
void each_chunk(int64_t chunks, int threads, const Body& body) {
  if (threads > 1 && chunks > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
  }
}

// Vectors over the rows have `rows` entries, over the columns `stride`; beyond n and m marginals and K are 0.
template <class Real>
struct Transport {
  using Full = typename Vectors<Real>::Full;
  using Eight = typename Vectors<Real>::Eight;
  static constexpr bool single = sizeof(Real) == 4;
  static constexpr double log2_e = 1.4426950408889634074;
  // Entries beyond this belong to a row and a column without mass.
  static constexpr double highest_exponent = single ? 100 : 1000;

  int64_t n, m;
  int64_t rows, stride, chunks;
  int threads;
  const Real* cost;
  int64_t cost_stride;
  Real *a, *b;
  Real *empty_rows, *empty_columns;  // 1 without an allowed partner of positive mass (and in the padding), else 0
  Real* kernel;                      // [rows, stride]
  Real* partial;                     // [chunks, stride]
  double *f0, *g0;                   // base potentials
  double *f, *g;                     // potentials
  double sum_a = 0, sum_b = 0;

  static int64_t chunks_of(int64_t n) { return (n + chunk_rows - 1) / chunk_rows; }

  static int64_t bytes(int64_t n, int64_t m) {
    const int64_t rows = round_up(n, row_group), stride = round_up(m, lanes<Real>);
    return 2 * Arena::size<Real>(rows) + 2 * Arena::size<Real>(stride) + Arena::size<Real>(rows * stride) +
           Arena::size<Real>(chunks_of(n) * stride) + 2 * Arena::size<double>(rows) + 2 * Arena::size<double>(stride);
  }

  Transport(const SinkhornProblem& problem, int64_t index, int64_t n, int64_t m, int threads, Arena& arena)
      : n(n),
        m(m),
        rows(round_up(n, row_group)),
        stride(round_up(m, lanes<Real>)),
        chunks(chunks_of(n)),
        threads(threads),
        cost(static_cast<const Real*>(problem.cost) + index * problem.rows * problem.columns),
        cost_stride(problem.columns) {
    a = arena.take<Real>(rows);
    b = arena.take<Real>(stride);
    empty_rows = arena.take<Real>(rows);
    empty_columns = arena.take<Real>(stride);
    kernel = arena.take<Real>(rows * stride);
    partial = arena.take<Real>(chunks * stride);
    f0 = arena.take<double>(rows);
    g0 = arena.take<double>(stride);
    f = arena.take<double>(rows);
    g = arena.take<double>(stride);
    sum_a = copy_marginal(static_cast<const Real*>(problem.a) + index * problem.rows, n, rows, a);
    sum_b = copy_marginal(static_cast<const Real*>(problem.b) + index * problem.columns, m, stride, b);
    std::fill(f0, f0 + rows, 0.0), std::fill(g0, g0 + stride, 0.0);
    std::fill(f, f + rows, 0.0), std::fill(g, g + stride, 0.0);
  }

  // Masses below the normal numbers count as zero.
  static double copy_marginal(const Real* from, int64_t n, int64_t padded, Real* to) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[i] < std::numeric_limits<Real>::min() ? Real(0) : from[i];
      sum += static_cast<double>(to[i]);
    }
    std::fill(to + n, to + padded, Real(0));
    return sum;
  }

  int64_t chunk_end(int64_t chunk) const { return std::min(rows, (chunk + 1) * chunk_rows); }

  // f0_i = min_j C_ij - g_j over the columns with mass, and which rows are empty. False: a cost is NaN or -inf.
  bool transform_rows(const double* g, Real* buffer) {
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    for (int64_t j = 0; j < m; ++j) buffer[j] = b[j] > Real(0) ? static_cast<Real>(g[j]) : -infinity;
    int wrong = 0;
    each_chunk(chunks, threads, [&](int64_t chunk) {
      int wrong_here = 0;
      for (int64_t i = chunk * chunk_rows; i < std::min(n, chunk_end(chunk)); ++i) {
        const Real* costs = cost + i * cost_stride;
        // By hand: compilers do not vectorise minima where numbers may be NaN.
        Full lowest_of = Full{} + infinity, invalid_of = {};
        int64_t j = 0;
        for (; j + lanes<Real> <= m; j += lanes<Real>) {
          Full c;
          std::memcpy(&c, costs + j, sizeof(c));
          const Full x = c - *reinterpret_cast<const Full*>(buffer + j);
          lowest_of = x < lowest_of ? x : lowest_of;
          invalid_of = c > -infinity ? invalid_of : Full{} + Real(1);
        }
        Real lowest = infinity;
        bool invalid = false;
        for (int64_t lane = 0; lane < lanes<Real>; ++lane) {
          lowest = lowest_of[lane] < lowest ? lowest_of[lane] : lowest;
          invalid = invalid || invalid_of[lane] != Real(0);
        }
        for (; j < m; ++j) {
          const Real x = costs[j] - buffer[j];
          lowest = x < lowest ? x : lowest;
          invalid = invalid || !(costs[j] > -infinity);
        }
        empty_rows[i] = lowest < infinity ? Real(0) : Real(1);
        f0[i] = lowest < infinity ? static_cast<double>(lowest) : 0.0;
        wrong_here |= invalid ? 1 : 0;
      }
      if (wrong_here) {
#pragma omp atomic write
        wrong = 1;
      }
    });
    std::fill(empty_rows + n, empty_rows + rows, Real(1));
    return !wrong;
  }

  // g0_j = min_i C_ij - f_i over the rows with mass, and which columns are empty.
  void transform_columns(const double* f, Real* buffer) {
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    each_chunk(chunks, threads, [&](int64_t chunk) {
      Real* lowest = partial + chunk * stride;
      std::fill(lowest, lowest + stride, infinity);
      for (int64_t i = chunk * chunk_rows; i < std::min(n, chunk_end(chunk)); ++i) {
        if (!(a[i] > Real(0))) continue;
        const Real* costs = cost + i * cost_stride;
        const Real potential = static_cast<Real>(f[i]);
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          const Real x = costs[j] - potential;
          lowest[j] = x < lowest[j] ? x : lowest[j];
        }
      }
    });
    for (int64_t j = 0; j < stride; ++j) {
      buffer[j] = partial[j];
      for (int64_t chunk = 1; chunk < chunks; ++chunk) buffer[j] = std::min(buffer[j], partial[chunk * stride + j]);
      empty_columns[j] = buffer[j] < infinity ? Real(0) : Real(1);
      g0[j] = buffer[j] < infinity ? static_cast<double>(buffer[j]) : 0.0;
    }
  }

  // K from the base potentials; rows and columns that are empty are 0. The exponents are made in double precision: costs
  // of 1e4 at an epsilon of 1e-3 have no digits left in single.
  void build(double epsilon, double* buffer) {
    const double scale = log2_e / epsilon;
    for (int64_t j = 0; j < m; ++j)
      buffer[j] = empty_columns[j] == Real(0) ? g0[j] * scale : -std::numeric_limits<double>::infinity();
    each_chunk(chunks, threads, [&](int64_t chunk) {
      for (int64_t i = chunk * chunk_rows; i < chunk_end(chunk); ++i) {
        Real* row = kernel + i * stride;
        if (empty_rows[i] != Real(0)) {
          std::fill(row, row + stride, Real(0));
          continue;
        }
        const Real* costs = cost + i * cost_stride;
        const double base = f0[i] * scale;
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) {
          const double x = base + buffer[j] - static_cast<double>(costs[j]) * scale;
          row[j] = math::exp2(static_cast<Real>(x < highest_exponent ? x : highest_exponent));
        }
        std::fill(row + m, row + stride, Real(0));
      }
    });
  }

  // For every group of rows, row(first row, its sums K y) returns x of these rows; sums = K' x. What is done with the sums
  // of a group takes its time, so the loop over the columns is two groups behind with x.
  template <class Row>
  void sweep(const Real* y, Real* sums, const Row& row) {
    each_chunk(chunks, threads, [&](int64_t chunk) {
      Real* into = chunks > 1 ? partial + chunk * stride : sums;
      std::fill(into, into + stride, Real(0));
      const int64_t first = chunk * chunk_rows, end = chunk_end(chunk);
      Eight dots = {}, x = {};
      for (int64_t i = first; i < end + 2 * row_group; i += row_group) {
        Eight next_x = {};
        if (i > first && i - row_group < end) next_x = row(i - row_group, dots);
        const Real* K = kernel + i * stride;
        const Real* done = K - 2 * row_group * stride;
        if (i >= end) {
          if (i - 2 * row_group >= first) pass<false, true>(K, y, done, x, into);
        } else if (i - 2 * row_group < first) {
          dots = pass<true, false>(K, y, done, x, into);
        } else {
          dots = pass<true, true>(K, y, done, x, into);
        }
        x = next_x;
      }
    });
    if (chunks > 1) {
      std::copy(partial, partial + stride, sums);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t j = 0; j < stride; ++j) sums[j] += partial[chunk * stride + j];
    }
  }

 private:
  // The products of eight rows with y, and eight rows of an earlier group, times x, added to `into`.
  template <bool multiply, bool add>
  KD_INLINE Eight pass(const Real* K, const Real* y, const Real* done, const Eight& x, Real* into) const {
    Full products[8] = {};
    for (int64_t j = 0; j < stride; j += lanes<Real>) {
      if constexpr (multiply) {
        const Full yj = *reinterpret_cast<const Full*>(y + j);
        for (int r = 0; r < 8; ++r) products[r] += *reinterpret_cast<const Full*>(K + r * stride + j) * yj;
      }
      if constexpr (add) {
        Full even = *reinterpret_cast<Full*>(into + j), odd = {};
        for (int r = 0; r < 8; r += 2) {
          even += *reinterpret_cast<const Full*>(done + r * stride + j) * x[r];
          odd += *reinterpret_cast<const Full*>(done + (r + 1) * stride + j) * x[r + 1];
        }
        *reinterpret_cast<Full*>(into + j) = even + odd;
      }
    }
    return multiply ? sums_of<Real>(products) : Eight{};
  }
};

// The least and the largest of numbers and 1; their count is a multiple of 8.
template <class Real>
struct Range {
  double lowest, highest;

  Range(const Real* x, int64_t n) {
    using Eight = typename Vectors<Real>::Eight;
    Eight low = Eight{} + Real(1), high = low;
    for (int64_t i = 0; i < n; i += 8) {
      const Eight eight = eight_at<Real>(x + i);
      low = eight < low ? eight : low;
      high = eight > high ? eight : high;
    }
    lowest = highest = 1;
    for (int lane = 0; lane < 8; ++lane) {
      lowest = std::min(lowest, static_cast<double>(low[lane]));
      highest = std::max(highest, static_cast<double>(high[lane]));
    }
  }

  // Whether every number lies within 2^-range and 2^range.
  bool within(double range) const { return lowest >= std::exp2(-range) && highest <= std::exp2(range); }
};

// Runs every problem: a thread each, or with all threads in each if there are fewer problems than threads.
template <class Problem, class Run>
bool each_problem(const Problem& problem, const Run& run) {
  bool done = true;
  if (problem.threads > 1 && problem.batch >= problem.threads) {
#pragma omp parallel for num_threads(problem.threads) schedule(dynamic) reduction(&& : done)
    for (int64_t index = 0; index < problem.batch; ++index) done = run(problem, index, 1) && done;
  } else {
    for (int64_t index = 0; index < problem.batch; ++index) done = run(problem, index, problem.threads) && done;
  }
  return done;
}

}  // namespace
}  // namespace kd::KD_ISA
