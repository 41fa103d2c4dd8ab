// Small transport problems side by side, one per lane: sums over rows and columns need no shuffling then. Only what most
// problems need: balanced, one epsilon, a start from zero, potentials that stay near their first base. A problem that
// needs more is left for the general code, from the start.
#pragma once

#include <vector>

#include "cpu/sinkhorn.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t small_size = 32;

template <class Real>
class SmallProblems {
 public:
  using Full = typename Vectors<Real>::Full;
  static constexpr int64_t width = lanes<Real>;
  // Logarithm of how large scalings and entries of the kernel may be, and how small scalings.
  static constexpr double trusted = sizeof(Real) == 4 ? 40 : 300;

  static bool suits(const SinkhornProblem& problem, int64_t n, int64_t m) {
    return n > 0 && m > 0 && n <= small_size && m <= small_size && std::isinf(problem.row_reach) &&
           std::isinf(problem.column_reach) && problem.epsilon_start <= problem.epsilon && !problem.start;
  }

  static int64_t bytes() {
    constexpr int64_t pairs = small_size * small_size;
    return 2 * Arena::size<Full>(pairs) + 12 * Arena::size<Full>(small_size);
  }

  // The problems `indices`; sets the status of those that are done to 0.
  SmallProblems(const SinkhornProblem& problem, const int64_t* indices, int64_t count, Arena& arena)
      : problem_(problem), indices_(indices), count_(count) {
    for (int64_t lane = 0; lane < count; ++lane) {
      n_ = std::max(n_, rows_of(lane));
      m_ = std::max(m_, columns_of(lane));
    }
    n_ = round_up(n_, 4), m_ = round_up(m_, 4);  // sums are made four at a time
    cost_ = arena.take<Full>(n_ * m_);
    kernel_ = arena.take<Full>(n_ * m_);
    for (Full** rows : {&a_, &empty_rows_, &f0_, &u_, &new_u_, &row_sums_}) *rows = arena.take<Full>(n_);
    for (Full** columns : {&b_, &empty_columns_, &g0_, &v_, &y_, &column_sums_}) *columns = arena.take<Full>(m_);
  }

  void run() {
    load();
    make_base();
    iterate();
    write_results();
  }

 protected:
  static constexpr Real infinity = std::numeric_limits<Real>::infinity();

  int64_t rows_of(int64_t lane) const {
    return problem_.row_lengths ? problem_.row_lengths[indices_[lane]] : problem_.rows;
  }
  int64_t columns_of(int64_t lane) const {
    return problem_.column_lengths ? problem_.column_lengths[indices_[lane]] : problem_.columns;
  }
  static Real& at(Full* vectors, int64_t i, int64_t lane) { return reinterpret_cast<Real*>(vectors)[i * width + lane]; }

  void load() {
    const Real nothing = 0;
    std::fill_n(reinterpret_cast<Real*>(cost_), n_ * m_ * width, infinity);
    std::fill_n(reinterpret_cast<Real*>(a_), n_ * width, nothing);
    std::fill_n(reinterpret_cast<Real*>(b_), m_ * width, nothing);
    for (int64_t lane = 0; lane < count_; ++lane) {
      const int64_t index = indices_[lane], n = rows_of(lane), m = columns_of(lane);
      const Real* costs = static_cast<const Real*>(problem_.cost) + index * problem_.rows * problem_.columns;
      Real invalid = 0;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) {
          const Real cost = costs[i * problem_.columns + j];
          at(cost_, i * m_ + j, lane) = cost;
          invalid = cost > -infinity ? invalid : Real(1);
        }
      const Real* a = static_cast<const Real*>(problem_.a) + index * problem_.rows;
      const Real* b = static_cast<const Real*>(problem_.b) + index * problem_.columns;
      for (int64_t i = 0; i < n; ++i) at(a_, i, lane) = a[i] < std::numeric_limits<Real>::min() ? Real(0) : a[i];
      for (int64_t j = 0; j < m; ++j) at(b_, j, lane) = b[j] < std::numeric_limits<Real>::min() ? Real(0) : b[j];
      left_[lane] = invalid != Real(0);
    }
    for (int64_t lane = count_; lane < width; ++lane) left_[lane] = true;
  }

  // As Iterations::rebase does: f0 is the transform of g = 0, g0 that of f0.
  void make_base() {
    const double scale = Transport<Real>::log2_e / problem_.epsilon;
    const Full none = Full{} + infinity;
    Full& highest = *reinterpret_cast<Full*>(highest_);
    highest = Full{} + Real(1);
    for (int64_t i = 0; i < n_; ++i) {
      Full lowest = none;
      for (int64_t j = 0; j < m_; ++j) {
        const Full x = b_[j] > Real(0) ? cost_[i * m_ + j] : none;
        lowest = x < lowest ? x : lowest;
      }
      for (int64_t lane = 0; lane < width; ++lane) {
        const bool empty = !(lowest[lane] < infinity);
        at(empty_rows_, i, lane) = empty ? Real(1) : Real(0);
        at(f0_, i, lane) = empty ? Real(0) : lowest[lane];
        left_[lane] = left_[lane] || (empty && at(a_, i, lane) > Real(0));
      }
    }
    for (int64_t j = 0; j < m_; ++j) {
      Full lowest = none;
      for (int64_t i = 0; i < n_; ++i) {
        const Full x = a_[i] > Real(0) ? cost_[i * m_ + j] - f0_[i] : none;
        lowest = x < lowest ? x : lowest;
      }
      for (int64_t lane = 0; lane < width; ++lane) {
        const bool empty = !(lowest[lane] < infinity);
        at(empty_columns_, j, lane) = empty ? Real(1) : Real(0);
        at(g0_, j, lane) = empty ? Real(0) : lowest[lane];
        left_[lane] = left_[lane] || (empty && at(b_, j, lane) > Real(0));
      }
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane) {
        const double x = -static_cast<double>(at(g0_, j, lane)) * scale;
        at(v_, j, lane) = math::exp2(
            static_cast<Real>(x < Transport<Real>::highest_exponent ? x : Transport<Real>::highest_exponent));
      }
      highest = v_[j] > highest ? v_[j] : highest;  // more than 1 without mass only
      y_[j] = b_[j] * v_[j];
    }
    for (int64_t i = 0; i < n_; ++i) {
      u_[i] = Full{} + Real(1);
      for (int64_t j = 0; j < m_; ++j) {
#pragma omp simd
        for (int64_t lane = 0; lane < width; ++lane) {
          const double base = static_cast<double>(at(f0_, i, lane)) + static_cast<double>(at(g0_, j, lane));
          const double x = (base - static_cast<double>(at(cost_, i * m_ + j, lane))) * scale;
          const Real density = math::exp2(
              static_cast<Real>(x < Transport<Real>::highest_exponent ? x : Transport<Real>::highest_exponent));
          const Real empty = at(empty_rows_, i, lane) + at(empty_columns_, j, lane);
          at(kernel_, i * m_ + j, lane) = empty > Real(0) ? Real(0) : density;
        }
        highest = kernel_[i * m_ + j] > highest ? kernel_[i * m_ + j] : highest;
      }
    }
  }

  // Sums over j of kernel[i * by_i + j * by_j] * x[j] for four i in a row.
  static KD_INLINE void four_sums(const Full* kernel, int64_t by_i, int64_t by_j, const Full* x, int64_t n,
                                  Full* sums) {
    Full even[4] = {}, odd[4] = {};
    for (int64_t j = 0; j < n; j += 2)
      for (int k = 0; k < 4; ++k) {
        even[k] += kernel[k * by_i + j * by_j] * x[j];
        odd[k] += kernel[k * by_i + (j + 1) * by_j] * x[j + 1];
      }
    for (int k = 0; k < 4; ++k) sums[k] = even[k] + odd[k];
  }

  void sum_rows() {
    for (int64_t i = 0; i < n_; i += 4) four_sums(kernel_ + i * m_, m_, 1, y_, m_, row_sums_ + i);
  }

  // Makes the iterations. With `us` [iterations, n] and `vs` [1 + iterations, m]: once more those that iterations_ says,
  // keeping their scalings, the first of which is where v started.
  void iterate(Full* us = nullptr, Full* vs = nullptr) {
    int64_t limit = us ? 0 : problem_.max_iterations;
    for (int64_t lane = 0; lane < width; ++lane) {
      lowest_[lane] = 1;
      running_[lane] = left_[lane] ? Real(0) : Real(1);
      if (left_[lane] || !us) iterations_[lane] = 0;
      limit = std::max(limit, iterations_[lane]);
    }
    const Full& running = *reinterpret_cast<const Full*>(running_);
    Full& lowest = *reinterpret_cast<Full*>(lowest_);
    Full& highest = *reinterpret_cast<Full*>(highest_);
    if (us) std::copy_n(v_, m_, vs);
    for (int64_t k = 0; k < limit; ++k) {
      sum_rows();
      if (us) {
        for (int64_t lane = 0; lane < width; ++lane) running_[lane] = k < iterations_[lane] ? Real(1) : Real(0);
      } else if (problem_.tolerance > 0 && k > 0 && !stop()) {
        break;
      }
      for (int64_t i = 0; i < n_; ++i) {
        const Full scaling = Real(1) / (row_sums_[i] + empty_rows_[i]);
        u_[i] = running != Real(0) ? scaling : u_[i];
        lowest = u_[i] < lowest ? u_[i] : lowest;
        highest = u_[i] > highest ? u_[i] : highest;
        new_u_[i] = a_[i] * u_[i];
      }
      for (int64_t j = 0; j < m_; j += 4) four_sums(kernel_ + j, 1, m_, new_u_, n_, column_sums_ + j);
      for (int64_t j = 0; j < m_; ++j) {
        const Full scaling = Real(1) / (column_sums_[j] + empty_columns_[j]);
        v_[j] = running != Real(0) ? scaling : v_[j];
        lowest = v_[j] < lowest ? v_[j] : lowest;
        highest = v_[j] > highest ? v_[j] : highest;
        y_[j] = b_[j] * v_[j];
      }
      if (us) {
        std::copy_n(u_, n_, us + k * n_);
        std::copy_n(v_, m_, vs + (k + 1) * m_);
      } else {
        for (int64_t lane = 0; lane < width; ++lane)
          if (running_[lane] != Real(0)) iterations_[lane] = k + 1;
      }
    }
  }

  // Whether the results of a lane hold: nothing in it left the range of 2^-range to 2^range.
  bool within(double range, int64_t lane) const {
    return !left_[lane] && static_cast<double>(lowest_[lane]) >= std::exp2(-range) &&
           static_cast<double>(highest_[lane]) <= std::exp2(range);
  }

  // The error of a lane, from the sums of the rows.
  double error(int64_t lane) const {
    double error = 0;
    for (int64_t i = 0; i < n_; ++i)
      error += static_cast<double>(
          at(a_, i, lane) * std::abs(at(u_, i, lane) * at(row_sums_, i, lane) - (Real(1) - at(empty_rows_, i, lane))));
    return error;
  }

  // Takes the problems out that are within the tolerance. False: none is left.
  bool stop() {
    bool any = false;
    for (int64_t lane = 0; lane < width; ++lane) {
      if (running_[lane] != Real(0) && error(lane) <= problem_.tolerance) running_[lane] = 0;
      any = any || running_[lane] != Real(0);
    }
    return any;
  }

  void write_results() {
    sum_rows();
    const double epsilon = problem_.epsilon;
    for (int64_t lane = 0; lane < count_; ++lane) {
      if (!within(trusted, lane)) continue;
      const int64_t index = indices_[lane], n = rows_of(lane), m = columns_of(lane);
      double distance = 0, mass = 0, value = 0, sum_a = 0, sum_b = 0;
      double* f = problem_.f + index * problem_.rows;
      double* g = problem_.g + index * problem_.columns;
      std::fill(f, f + problem_.rows, 0.0), std::fill(g, g + problem_.columns, 0.0);
      for (int64_t i = 0; i < n; ++i) {
        Real spent = 0;
        for (int64_t j = 0; j < m; ++j) {
          const Real cost = at(cost_, i * m_ + j, lane);
          spent += at(kernel_, i * m_ + j, lane) * at(y_, j, lane) * (cost < infinity ? cost : Real(0));
        }
        const double a = static_cast<double>(at(a_, i, lane)), au = a * static_cast<double>(at(u_, i, lane));
        distance += au * static_cast<double>(spent);
        mass += au * static_cast<double>(at(row_sums_, i, lane));
        if (at(empty_rows_, i, lane) == Real(0))
          f[i] = static_cast<double>(at(f0_, i, lane)) + epsilon * math::log(static_cast<double>(at(u_, i, lane)));
        value += a * f[i];
        sum_a += a;
      }
      for (int64_t j = 0; j < m; ++j) {
        if (at(empty_columns_, j, lane) == Real(0))
          g[j] = static_cast<double>(at(g0_, j, lane)) + epsilon * math::log(static_cast<double>(at(v_, j, lane)));
        value += static_cast<double>(at(b_, j, lane)) * g[j];
        sum_b += static_cast<double>(at(b_, j, lane));
      }
      value -= epsilon * (mass - sum_a * sum_b);
      static_cast<Real*>(problem_.distance)[index] = static_cast<Real>(distance);
      static_cast<Real*>(problem_.value)[index] = static_cast<Real>(value);
      static_cast<Real*>(problem_.error)[index] = static_cast<Real>(error(lane));
      problem_.iterations[index] = iterations_[lane];
      problem_.status[index] = 0;
    }
  }

  const SinkhornProblem& problem_;
  const int64_t* indices_;
  int64_t count_, n_ = 0, m_ = 0;
  Full *cost_, *kernel_;  // [n, m]
  Full *a_, *empty_rows_, *f0_, *u_, *new_u_, *row_sums_;
  Full *b_, *empty_columns_, *g0_, *v_, *y_, *column_sums_;
  alignas(64) Real running_[width], lowest_[width], highest_[width];  // running: 1 while a problem goes on
  int64_t iterations_[width];
  bool left_[width];  // for the general code
};

// Calls body(indices, count) for as many problems as there are lanes, of those that suit. False: some call was.
template <class Real, class Body>
bool each_group_of_small(const SinkhornProblem& problem, const Body& body) {
  std::vector<int64_t> small;
  for (int64_t index = 0; index < problem.batch; ++index) {
    const int64_t n = problem.row_lengths ? problem.row_lengths[index] : problem.rows;
    const int64_t m = problem.column_lengths ? problem.column_lengths[index] : problem.columns;
    if (SmallProblems<Real>::suits(problem, n, m)) small.push_back(index);
  }
  const int64_t count = static_cast<int64_t>(small.size());
  bool done = true;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic) reduction(&& : done)
  for (int64_t first = 0; first < count; first += lanes<Real>)
    done = body(small.data() + first, std::min(lanes<Real>, count - first)) && done;
  return done;
}

}  // namespace
}  // namespace kd::KD_ISA
