// The gradients of unrolled iterations for small transport problems, side by side in the lanes. The forward keeps no
// history of these: making the iterations again costs less than writing the potentials of all problems and reading them.
#pragma once

#include "cpu/sinkhorn_small.h"

namespace kd::KD_ISA {
namespace {

// Writes zeros beyond n rows and m columns; the columns of rows that count are left to whoever writes these.
template <class Real>
void zero_padding(const SinkhornGradientProblem& problem, int64_t index, int64_t n, int64_t m) {
  if (problem.grad_cost)
    std::fill_n(static_cast<Real*>(problem.grad_cost) + (index * problem.rows + n) * problem.columns,
                (problem.rows - n) * problem.columns, Real(0));
  if (problem.grad_a)
    std::fill_n(static_cast<Real*>(problem.grad_a) + index * problem.rows + n, problem.rows - n, Real(0));
  if (problem.grad_b)
    std::fill_n(static_cast<Real*>(problem.grad_b) + index * problem.columns + m, problem.columns - m, Real(0));
}

template <class Real>
class SmallGradients : SmallProblems<Real> {
  using Base = SmallProblems<Real>;
  using Full = typename Base::Full;
  using Base::a_, Base::b_, Base::u_, Base::v_, Base::y_, Base::row_sums_, Base::column_sums_, Base::kernel_;
  using Base::at, Base::infinity, Base::rows_of, Base::columns_of, Base::four_sums;
  using Base::indices_, Base::count_, Base::n_, Base::m_, Base::width;

 public:
  static int64_t bytes(const SinkhornGradientProblem& problem, const int64_t* indices, int64_t count) {
    const int64_t most = most_iterations(problem, indices, count);
    const int64_t n = round_up(std::min(problem.rows, small_size), 4);
    const int64_t m = round_up(std::min(problem.columns, small_size), 4);
    return Base::bytes() + Arena::size<Full>(most * n) + Arena::size<Full>((most + 1) * m) +
           Arena::size<Full>(block * n) + Arena::size<Full>(block * m) + 2 * Arena::size<Full>(n) +
           2 * Arena::size<Full>(m) + Arena::size<double>(n * width) + Arena::size<double>(m * width);
  }

  SmallGradients(const SinkhornGradientProblem& problem, const int64_t* indices, int64_t count, Arena& arena)
      : Base(problem, indices, count, arena), problem_(problem), most_(most_iterations(problem, indices, count)) {
    us_ = arena.take<Full>(most_ * n_);
    vs_ = arena.take<Full>((most_ + 1) * m_);
    left_ = arena.take<Full>(block * n_);
    right_ = arena.take<Full>(block * m_);
    for (Full** rows : {&f_bar_, &row_costs_}) *rows = arena.take<Full>(n_);
    for (Full** columns : {&g_bar_, &column_costs_}) *columns = arena.take<Full>(m_);
    a_bar_ = arena.take<double>(n_ * width);
    b_bar_ = arena.take<double>(m_ * width);
  }

  // Sets done[index] for the problems that need the general code no more.
  void run(char* done) {
    for (int64_t lane = 0; lane < width; ++lane)
      this->iterations_[lane] = lane < count_ ? problem_.iterations[indices_[lane]] : 0;
    this->load();
    this->make_base();
    this->iterate(us_, vs_);
    direct();
    for (int64_t k = most_ - 1; k >= 0; --k) {
      step(k);
      if (k % block == 0) add_products(k, std::min(most_, k + block));
    }
    for (int64_t lane = 0; lane < count_; ++lane) {
      // A bit more than in the forward: there is no history of what that was content with, however either was rounded.
      if (!this->within(Base::trusted + 1, lane)) continue;
      write(lane);
      done[indices_[lane]] = 1;
    }
  }

 private:
  static constexpr int64_t block = 8;  // iterations whose products are added to the gradient together; they stay in L1

  static int64_t most_iterations(const SinkhornGradientProblem& problem, const int64_t* indices, int64_t count) {
    int64_t most = 0;
    for (int64_t lane = 0; lane < count; ++lane) most = std::max(most, problem.iterations[indices[lane]]);
    return most;
  }

  // The gradients at fixed potentials, and those to the last potentials. The costs give way to the gradient to them,
  // which is yet to be multiplied by K.
  void direct() {
    const double epsilon = problem_.epsilon;
    alignas(64) Real of_density[width] = {}, of_spending[width] = {};
    double of_distance[width] = {}, of_value[width] = {}, sum_a[width] = {}, sum_b[width] = {};
    for (int64_t lane = 0; lane < count_; ++lane) {
      if (problem_.grad_distance)
        of_distance[lane] = static_cast<double>(static_cast<const Real*>(problem_.grad_distance)[indices_[lane]]);
      if (problem_.grad_value)
        of_value[lane] = static_cast<double>(static_cast<const Real*>(problem_.grad_value)[indices_[lane]]);
      of_density[lane] = static_cast<Real>(of_distance[lane] + of_value[lane]);
      of_spending[lane] = static_cast<Real>(of_distance[lane] / epsilon);
    }
    const Full density = *reinterpret_cast<const Full*>(of_density);
    const Full spending = *reinterpret_cast<const Full*>(of_spending);
    std::fill_n(column_sums_, m_, Full{}), std::fill_n(column_costs_, m_, Full{});
    for (int64_t i = 0; i < n_; ++i) {
      const Full x = a_[i] * u_[i];
      Full sum = {}, spent = {};
      for (int64_t j = 0; j < m_; ++j) {
        Full& entry = this->cost_[i * m_ + j];
        const Full cost = entry < infinity ? entry : Full{};
        const Full K = kernel_[i * m_ + j], costs = K * cost;
        sum += K * y_[j];
        spent += costs * y_[j];
        column_sums_[j] += K * x;
        column_costs_[j] += costs * x;
        entry = x * y_[j] * (density - spending * cost);
      }
      row_sums_[i] = sum * u_[i];
      row_costs_[i] = spent * u_[i];
    }
    for (int64_t j = 0; j < m_; ++j) column_sums_[j] *= v_[j], column_costs_[j] *= v_[j];
    add_up(a_, n_, sum_a);
    add_up(b_, m_, sum_b);
    const auto bars = [&](Full* masses, Full* empty, Full* sums, Full* costs, int64_t size, const double* other_mass,
                          double* mass_bar, Full* potential_bar) {
      for (int64_t i = 0; i < size; ++i)
#pragma omp simd
        for (int64_t lane = 0; lane < width; ++lane) {
          const double mass = static_cast<double>(at(masses, i, lane)), sum = static_cast<double>(at(sums, i, lane));
          const double spent = of_distance[lane] * static_cast<double>(at(costs, i, lane));
          const double to_potential = mass * (spent / epsilon + of_value[lane] * (1 - sum));
          at(potential_bar, i, lane) = at(empty, i, lane) != Real(0) ? Real(0) : static_cast<Real>(to_potential);
          mass_bar[i * width + lane] = spent - of_value[lane] * epsilon * (sum - other_mass[lane]);
        }
    };
    bars(a_, this->empty_rows_, row_sums_, row_costs_, n_, sum_b, a_bar_, f_bar_);
    bars(b_, this->empty_columns_, column_sums_, column_costs_, m_, sum_a, b_bar_, g_bar_);
    for (int64_t lane = 0; lane < count_; ++lane) {
      const int64_t rows = indices_[lane] * problem_.rows, columns = indices_[lane] * problem_.columns;
      for (int64_t i = 0; i < rows_of(lane); ++i) {
        a_bar_[i * width + lane] += of_value[lane] * problem_.f[rows + i];
        if (problem_.grad_f && at(this->empty_rows_, i, lane) == Real(0))
          at(f_bar_, i, lane) += static_cast<Real>(problem_.grad_f[rows + i]);
      }
      for (int64_t j = 0; j < columns_of(lane); ++j) {
        b_bar_[j * width + lane] += of_value[lane] * problem_.g[columns + j];
        if (problem_.grad_g && at(this->empty_columns_, j, lane) == Real(0))
          at(g_bar_, j, lane) += static_cast<Real>(problem_.grad_g[columns + j]);
      }
    }
  }

  static void add_up(Full* masses, int64_t size, double* sums) {
    for (int64_t i = 0; i < size; ++i)
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane) sums[lane] += static_cast<double>(at(masses, i, lane));
  }

  // Takes f_bar and g_bar back through iteration k, in the lanes that made it.
  void step(int64_t k) {
    alignas(64) Real made_by[width];
    for (int64_t lane = 0; lane < width; ++lane) made_by[lane] = k < this->iterations_[lane] ? Real(1) : Real(0);
    const Full made = *reinterpret_cast<const Full*>(made_by);
    const Full *u = us_ + k * n_, *old_v = vs_ + k * m_, *v = old_v + m_;
    Full *left = left_ + k % block * n_, *right = right_ + k % block * m_;
    for (int64_t j = 0; j < m_; ++j) right[j] = made != Real(0) ? g_bar_[j] * v[j] : Full{};
    for (int64_t i = 0; i < n_; i += 4) four_sums(kernel_ + i * m_, m_, 1, right, m_, row_sums_ + i);
    for (int64_t i = 0; i < n_; ++i) {
      left[i] = made != Real(0) ? (f_bar_[i] - a_[i] * u[i] * row_sums_[i]) * u[i] : Full{};
      f_bar_[i] = made != Real(0) ? Full{} : f_bar_[i];
    }
    for (int64_t j = 0; j < m_; j += 4) four_sums(kernel_ + j, 1, m_, left, n_, column_sums_ + j);
    for (int64_t j = 0; j < m_; ++j) g_bar_[j] = made != Real(0) ? -(b_[j] * old_v[j] * column_sums_[j]) : g_bar_[j];
    if (problem_.grad_a) add_to_mass(u, row_sums_, n_, a_bar_);
    if (problem_.grad_b) add_to_mass(old_v, column_sums_, m_, b_bar_);
  }

  void add_to_mass(const Full* scalings, Full* sums, int64_t size, double* mass_bar) const {
    const double epsilon = problem_.epsilon;
    const Real* scaling = reinterpret_cast<const Real*>(scalings);
    const Real* sum = reinterpret_cast<const Real*>(sums);
#pragma omp simd
    for (int64_t i = 0; i < size * width; ++i)
      mass_bar[i] -= epsilon * (static_cast<double>(scaling[i]) * static_cast<double>(sum[i]));
  }

  // Adds the outer products of iterations first .. end - 1 to the gradient to the costs.
  void add_products(int64_t first, int64_t end) {
    for (int64_t i = 0; i < n_; i += 4)
      for (int64_t j = 0; j < m_; j += 2) {
        Full by_columns[4][2] = {}, by_rows[4][2] = {};
        for (int64_t k = first; k < end; ++k) {
          const Full *u = us_ + k * n_ + i, *old_v = vs_ + k * m_ + j;
          const Full *left = left_ + k % block * n_ + i, *right = right_ + k % block * m_ + j;
          for (int r = 0; r < 4; ++r)
            for (int c = 0; c < 2; ++c) {
              by_columns[r][c] += u[r] * right[c];
              by_rows[r][c] += left[r] * old_v[c];
            }
        }
        for (int r = 0; r < 4; ++r)
          for (int c = 0; c < 2; ++c)
            this->cost_[(i + r) * m_ + j + c] += a_[i + r] * by_columns[r][c] + b_[j + c] * by_rows[r][c];
      }
  }

  void write(int64_t lane) const {
    const int64_t index = indices_[lane], n = rows_of(lane), m = columns_of(lane);
    zero_padding<Real>(problem_, index, n, m);
    if (problem_.grad_cost)
      for (int64_t i = 0; i < n; ++i) {
        Real* into = static_cast<Real*>(problem_.grad_cost) + (index * problem_.rows + i) * problem_.columns;
        for (int64_t j = 0; j < m; ++j) into[j] = at(kernel_, i * m_ + j, lane) * at(this->cost_, i * m_ + j, lane);
        std::fill(into + m, into + problem_.columns, Real(0));
      }
    if (problem_.grad_a)
      for (int64_t i = 0; i < n; ++i)
        static_cast<Real*>(problem_.grad_a)[index * problem_.rows + i] = static_cast<Real>(a_bar_[i * width + lane]);
    if (problem_.grad_b)
      for (int64_t j = 0; j < m; ++j)
        static_cast<Real*>(problem_.grad_b)[index * problem_.columns + j] = static_cast<Real>(b_bar_[j * width + lane]);
  }

  const SinkhornGradientProblem& problem_;
  int64_t most_;
  Full *us_, *vs_;       // [most, n] and [1 + most, m]: scalings after every iteration; the first of v is the start
  Full *left_, *right_;  // [block, n] and [block, m]: gradients to the potentials, times scalings
  Full *f_bar_, *row_costs_, *g_bar_, *column_costs_;
  double *a_bar_, *b_bar_;  // [n, width] and [m, width]
};

}  // namespace
}  // namespace kd::KD_ISA
