// The gradients of Sinkhorn's iterations on the CPU.
#include "cpu/sinkhorn_small_gradient.h"

namespace kd::KD_ISA {
namespace {

// The gradient to the costs, K o (outer products), where the products are collected until K changes or there are many.
template <class Real>
class CostGradient {
 public:
  using Full = typename Vectors<Real>::Full;
  static constexpr int64_t capacity = 64;

  static int64_t bytes(int64_t rows, int64_t stride) {
    return Arena::size<Real>(capacity * rows) + Arena::size<Real>(capacity * stride);
  }

  CostGradient(const Transport<Real>& transport, Real* gradient, int64_t row_stride, Arena& arena)
      : transport_(transport), gradient_(gradient), row_stride_(row_stride) {
    left_ = arena.take<Real>(capacity * transport.rows);
    right_ = arena.take<Real>(capacity * transport.stride);
  }

  bool wanted() const { return gradient_; }
  Real* left(int64_t of_last) { return left_ + (rank_ - of_last) * transport_.rows; }
  Real* right(int64_t of_last) { return right_ + (rank_ - of_last) * transport_.stride; }

  // Makes room for so many products more, which `left` and `right` then find counted from the last.
  void add(int64_t products) {
    if (rank_ + products > capacity) flush();
    rank_ += products;
  }

  // Adds what has been collected, which needs the K that it was collected with.
  void flush() {
    const int64_t rank = rank_;
    rank_ = 0;
    if (!gradient_ || rank == 0) return;
    each_chunk(transport_.chunks, transport_.threads, [&](int64_t chunk) {
      for (int64_t i = chunk * chunk_rows; i < std::min(transport_.n, transport_.chunk_end(chunk)); i += 4)
        for (int64_t j = 0; j < transport_.stride; j += 4 * lanes<Real>) {
          if (transport_.stride - j >= 4 * lanes<Real>) {
            add_block<4>(i, j, rank);
          } else {
            for (int64_t k = j; k < transport_.stride; k += lanes<Real>) add_block<1>(i, k, rank);
          }
        }
    });
  }

 private:
  template <int vectors>
  void add_block(int64_t i, int64_t j, int64_t rank) {
    Full sums[4][vectors] = {};
    const Real* left = left_ + i;
    const Real* right = right_ + j;
    for (int64_t r = 0; r < rank; ++r, left += transport_.rows, right += transport_.stride)
      for (int v = 0; v < vectors; ++v) {
        const Full y = *reinterpret_cast<const Full*>(right + v * lanes<Real>);
        for (int k = 0; k < 4; ++k) sums[k][v] += y * left[k];
      }
    const int64_t width = std::min(transport_.m - j, vectors * lanes<Real>);
    for (int k = 0; k < 4 && i + k < transport_.n; ++k) {
      const Real* product = reinterpret_cast<const Real*>(sums[k]);
      const Real* K = transport_.kernel + (i + k) * transport_.stride + j;
      Real* into = gradient_ + (i + k) * row_stride_ + j;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) into[c] += K[c] * product[c];
    }
  }

  const Transport<Real>& transport_;
  Real* gradient_;
  int64_t row_stride_;
  Real *left_, *right_;
  int64_t rank_ = 0;
};

template <class Real>
struct Gradient : Transport<Real> {
  using Base = Transport<Real>;
  using Eight = typename Base::Eight;
  using Base::a, Base::b, Base::n, Base::m, Base::rows, Base::stride, Base::f, Base::g, Base::f0, Base::g0;
  using Base::empty_columns, Base::empty_rows, Base::sum_a, Base::sum_b;

  // How far scalings of the base may grow before it is moved. They may shrink as they like: what then underflows is small.
  static constexpr double trusted = Base::single ? 30 : 300;

  const SinkhornGradientProblem& problem;
  int64_t index;
  CostGradient<Real> to_cost;
  double *f_bar, *g_bar, *a_bar, *b_bar;
  double *r, *s;  // row and column sums of the density
  double *column_vector, *residual, *direction, *solution;
  double* buffer;
  Real *u, *row_u, *x;  // scalings of the rows in the step of the columns and in that of the rows
  Real *v, *column_v, *y, *sums;

  static int64_t bytes(int64_t n, int64_t m) {
    const int64_t rows = round_up(n, row_group), stride = round_up(m, lanes<Real>);
    return Base::bytes(n, m) + CostGradient<Real>::bytes(rows, stride) + 3 * Arena::size<double>(rows) +
           7 * Arena::size<double>(stride) + Arena::size<double>(std::max(rows, stride)) + 3 * Arena::size<Real>(rows) +
           4 * Arena::size<Real>(stride);
  }

  Gradient(const SinkhornGradientProblem& problem, int64_t index, int64_t n, int64_t m, int threads, Arena& arena)
      : Base(problem, index, n, m, threads, arena),
        problem(problem),
        index(index),
        to_cost(*this,
                problem.grad_cost ? static_cast<Real*>(problem.grad_cost) + index * problem.rows * problem.columns
                                  : nullptr,
                problem.columns, arena) {
    f_bar = arena.take<double>(rows);
    a_bar = arena.take<double>(rows);
    r = arena.take<double>(rows);
    g_bar = arena.take<double>(stride);
    b_bar = arena.take<double>(stride);
    s = arena.take<double>(stride);
    column_vector = arena.take<double>(stride);
    residual = arena.take<double>(stride);
    direction = arena.take<double>(stride);
    solution = arena.take<double>(stride);
    buffer = arena.take<double>(std::max(rows, stride));
    u = arena.take<Real>(rows);
    row_u = arena.take<Real>(rows);
    x = arena.take<Real>(rows);
    v = arena.take<Real>(stride);
    column_v = arena.take<Real>(stride);
    y = arena.take<Real>(stride);
    sums = arena.take<Real>(stride);
    std::copy_n(problem.f + index * problem.rows, n, f);
    std::copy_n(problem.g + index * problem.columns, m, g);
    std::fill(f_bar, f_bar + rows, 0.0), std::fill(a_bar, a_bar + rows, 0.0);
    std::fill(g_bar, g_bar + stride, 0.0), std::fill(b_bar, b_bar + stride, 0.0);
  }

  double upstream(const void* values) const {
    return values ? static_cast<double>(static_cast<const Real*>(values)[index]) : 0.0;
  }

  void set_base(const double* rows_from, double rows_by, const double* columns_from, double columns_by,
                double epsilon) {
    for (int64_t i = 0; i < n; ++i) f0[i] = rows_from[i] * rows_by;
    for (int64_t j = 0; j < m; ++j) g0[j] = columns_from[j] * columns_by;
    Base::build(epsilon, buffer);
  }

  // The gradients at fixed potentials, and those to the last potentials.
  void direct() {
    Base::transform_rows(g, y);  // finds what is empty
    Base::transform_columns(f0, y);
    const double epsilon = problem.epsilon;
    set_base(f, 1, g, 1, epsilon);
    const bool envelope = problem.gradient == TransportGradient::envelope;
    double of_distance = upstream(problem.grad_distance), of_value = upstream(problem.grad_value);
    if (envelope) of_value += of_distance, of_distance = 0;
    double* spent = buffer;  // by rows
    double* column_spent = column_vector;
    std::fill(s, s + stride, 0.0), std::fill(column_spent, column_spent + stride, 0.0);
    // By chunks, so that the sums of the columns do not depend on the threads.
    const Real of_density = static_cast<Real>(of_distance + of_value);
    const Real of_spending = static_cast<Real>(of_distance / epsilon);
    const auto part = [&](int64_t chunk, Real* column_sums, Real* column_costs) {
      std::fill(column_sums, column_sums + stride, Real(0));
      std::fill(column_costs, column_costs + stride, Real(0));
      for (int64_t i = chunk * chunk_rows; i < std::min(n, this->chunk_end(chunk)); ++i) {
        const Real* K = this->kernel + i * stride;
        const Real* costs = this->cost + i * this->cost_stride;
        const Real mass = a[i];
        Real sum = 0, cost_sum = 0;
#pragma omp simd reduction(+ : sum, cost_sum)
        for (int64_t j = 0; j < m; ++j) {
          const Real cost = K[j] * (costs[j] < std::numeric_limits<Real>::infinity() ? costs[j] : Real(0));
          sum += K[j] * b[j];
          cost_sum += cost * b[j];
          column_sums[j] += mass * K[j];
          column_costs[j] += mass * cost;
        }
        r[i] = static_cast<double>(sum);
        spent[i] = static_cast<double>(cost_sum);
        if (to_cost.wanted()) {
          Real* into = static_cast<Real*>(problem.grad_cost) + (index * problem.rows + i) * problem.columns;
#pragma omp simd
          for (int64_t j = 0; j < m; ++j) {
            const Real cost = costs[j] < std::numeric_limits<Real>::infinity() ? costs[j] : Real(0);
            into[j] = mass * b[j] * K[j] * (of_density - of_spending * cost);
          }
          std::fill(into + m, into + problem.columns, Real(0));
        }
      }
    };
    for (int64_t chunk = 0; chunk < this->chunks; ++chunk) {
      part(chunk, y, sums);
      for (int64_t j = 0; j < m; ++j) {
        s[j] += static_cast<double>(y[j]);
        column_spent[j] += static_cast<double>(sums[j]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double mass = static_cast<double>(a[i]);
      const double upstream_f = problem.grad_f && !envelope ? problem.grad_f[index * problem.rows + i] : 0.0;
      const double slope = conjugate_slope(f[i], problem.row_reach) - r[i];
      f_bar[i] = upstream_f + mass * (of_distance * spent[i] / epsilon + of_value * slope);
      a_bar[i] = of_distance * spent[i] + of_value * (conjugate(f[i], problem.row_reach) - epsilon * (r[i] - sum_b));
      if (empty_rows[i] != Real(0)) f_bar[i] = 0;
    }
    for (int64_t j = 0; j < m; ++j) {
      const double mass = static_cast<double>(b[j]);
      const double upstream_g = problem.grad_g && !envelope ? problem.grad_g[index * problem.columns + j] : 0.0;
      const double slope = conjugate_slope(g[j], problem.column_reach) - s[j];
      g_bar[j] = upstream_g + mass * (of_distance * column_spent[j] / epsilon + of_value * slope);
      b_bar[j] =
          of_distance * column_spent[j] + of_value * (conjugate(g[j], problem.column_reach) - epsilon * (s[j] - sum_a));
      if (empty_columns[j] != Real(0)) g_bar[j] = 0;
    }
  }

  // --- unrolled ---------------------------------------------------------------------------------------------------

  // The scalings of one iteration with respect to the base: of the columns' step u and v, of the rows' row_u and column_v.
  // False: some are too large.
  bool scale(const double* fs, const double* gs, const double* old_gs, double epsilon, double row_relaxation,
             double column_relaxation) {
    constexpr double limit = trusted;
    const double scale = Base::log2_e / epsilon;
    const double by_rows = 1 / row_relaxation, by_columns = 1 / column_relaxation;
    double highest = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < n; ++i) {
      const double one = (fs[i] - f0[i]) * scale, other = (fs[i] * by_rows - f0[i]) * scale;
      highest = one > highest ? one : highest;
      highest = other > highest ? other : highest;
      u[i] = math::exp2(static_cast<Real>(one < limit ? one : limit));
      row_u[i] = math::exp2(static_cast<Real>(other < limit ? other : limit));
    }
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < m; ++j) {
      const double one = (gs[j] * by_columns - g0[j]) * scale, other = (old_gs[j] - g0[j]) * scale;
      highest = one > highest ? one : highest;
      highest = other > highest ? other : highest;
      v[j] = math::exp2(static_cast<Real>(one < limit ? one : limit));
      column_v[j] = math::exp2(static_cast<Real>(other < limit ? other : limit));
    }
    return highest <= trusted;
  }

  // Takes f_bar and g_bar back through one iteration, in one sweep.
  void step(double epsilon, double row_relaxation, double column_relaxation) {
    to_cost.add(2);
    Real *left_columns = to_cost.left(2), *left_rows = to_cost.left(1);
    Real *right_columns = to_cost.right(2), *right_rows = to_cost.right(1);
    columns_in(right_columns);
    Base::sweep(right_columns, sums, [&](int64_t i, const Eight& of_group) {
      alignas(64) Real products[8], x[8];
      put_eight<Real>(products, of_group);
#pragma omp simd
      for (int r = 0; r < 8; ++r) {
        rows_through(i + r, products[r], epsilon, column_relaxation, left_columns);
        x[r] = left_rows[i + r] = static_cast<Real>(f_bar[i + r]) * row_u[i + r];
        f_bar[i + r] = 0;
      }
      return eight_at<Real>(x);
    });
    columns_out(epsilon, row_relaxation, right_rows);
  }

  // The same in two sweeps, each with a base of its own.
  void step_apart(const double* fs, const double* gs, const double* old_gs, double epsilon, double row_relaxation,
                  double column_relaxation) {
    to_cost.flush();
    set_base(fs, 1, gs, 1 / column_relaxation, epsilon);
    std::fill(u, u + rows, Real(1)), std::fill(v, v + stride, Real(1));
    to_cost.add(1);
    columns_in(to_cost.right(1));
    Real* left = to_cost.left(1);
    Base::sweep(to_cost.right(1), sums, [&](int64_t i, const Eight& of_group) {
      alignas(64) Real products[8], x[8];
      put_eight<Real>(products, of_group);
      for (int r = 0; r < 8; ++r) {
        rows_through(i + r, products[r], epsilon, column_relaxation, left);
        x[r] = 0;
      }
      return eight_at<Real>(x);
    });
    to_cost.flush();
    set_base(fs, 1 / row_relaxation, old_gs, 1, epsilon);
    std::fill(column_v, column_v + stride, Real(1));
    to_cost.add(1);
    Real* left_rows = to_cost.left(1);
    std::fill(y, y + stride, Real(0));
    Base::sweep(y, sums, [&](int64_t i, const Eight&) {
      alignas(64) Real x[8];
      for (int r = 0; r < 8; ++r) {
        x[r] = left_rows[i + r] = static_cast<Real>(f_bar[i + r]);
        f_bar[i + r] = 0;
      }
      return eight_at<Real>(x);
    });
    columns_out(epsilon, row_relaxation, to_cost.right(1));
    to_cost.flush();
  }

  void columns_in(Real* into) {
    for (int64_t j = 0; j < m; ++j) into[j] = static_cast<Real>(g_bar[j]) * v[j];
    std::fill(into + m, into + stride, Real(0));
  }

  KD_INLINE void rows_through(int64_t i, Real product, double epsilon, double column_relaxation, Real* left) {
    const double of_density = column_relaxation * static_cast<double>(u[i] * product);
    a_bar[i] -= epsilon * of_density;
    f_bar[i] -= static_cast<double>(a[i]) * of_density;
    f_bar[i] = empty_rows[i] != Real(0) ? 0.0 : f_bar[i];
    left[i] = static_cast<Real>(column_relaxation) * a[i] * u[i];
  }

  void columns_out(double epsilon, double row_relaxation, Real* right) {
    for (int64_t j = 0; j < m; ++j) {
      const double of_density = row_relaxation * static_cast<double>(sums[j] * column_v[j]);
      b_bar[j] -= epsilon * of_density;
      g_bar[j] = empty_columns[j] != Real(0) ? 0.0 : -static_cast<double>(b[j]) * of_density;
      right[j] = static_cast<Real>(row_relaxation) * b[j] * column_v[j];
    }
    std::fill(right + m, right + stride, Real(0));
  }

  void unrolled() {
    std::fill(u, u + rows, Real(0)), std::fill(row_u, row_u + rows, Real(0));
    double base_epsilon = problem.epsilon;
    bool based = true;
    std::fill(column_vector, column_vector + stride, 0.0);
    if (problem.start) std::copy_n(problem.start + index * problem.columns, m, column_vector);
    for (int64_t k = problem.iterations[index] - 1; k >= 0; --k) {
      const int64_t place = index * problem.max_iterations + k;
      const double* fs = problem.f_history + place * problem.rows;
      const double* gs = problem.g_history + place * problem.columns;
      const double* old_gs = k > 0 ? gs - problem.columns : column_vector;
      const double epsilon = epsilon_at(problem, k);
      const double row_relaxation = relaxation(problem.row_reach, epsilon);
      const double column_relaxation = relaxation(problem.column_reach, epsilon);
      const auto fits = [&] { return scale(fs, gs, old_gs, epsilon, row_relaxation, column_relaxation); };
      bool ready = based && epsilon == base_epsilon && fits();
      if (!ready) {
        to_cost.flush();
        set_base(fs, 1, gs, 1 / column_relaxation, epsilon);
        base_epsilon = epsilon;
        based = ready = fits();
      }
      if (ready) {
        step(epsilon, row_relaxation, column_relaxation);
      } else {
        step_apart(fs, gs, old_gs, epsilon, row_relaxation, column_relaxation);
      }
    }
    to_cost.flush();
  }

  // --- implicit ---------------------------------------------------------------------------------------------------

  // sum_j over the columns of one * other * b / s
  double product(const double* one, const double* other) const {
    double sum = 0;
    for (int64_t j = 0; j < m; ++j) sum += one[j] * other[j] * static_cast<double>(b[j]) / s[j];
    return sum;
  }

  // residual = operator(h), through sums of K (b / s h).
  void apply(const double* h, double relaxations, double* result) {
    for (int64_t j = 0; j < m; ++j) y[j] = static_cast<Real>(static_cast<double>(b[j]) / s[j] * h[j]);
    Base::sweep(y, sums, [&](int64_t i, const Eight& of_group) {
      alignas(64) Real products[8], x[8];
      put_eight<Real>(products, of_group);
      for (int k = 0; k < 8; ++k)
        x[k] = i + k < n ? static_cast<Real>(static_cast<double>(a[i + k]) / r[i + k]) * products[k] : Real(0);
      return eight_at<Real>(x);
    });
    for (int64_t j = 0; j < m; ++j) result[j] = h[j] - relaxations * static_cast<double>(sums[j]);
  }

  void implicit() {
    const double epsilon = problem.epsilon;
    const double row_relaxation = relaxation(problem.row_reach, epsilon);
    const double column_relaxation = relaxation(problem.column_reach, epsilon);
    const bool balanced = std::isinf(problem.row_reach) && std::isinf(problem.column_reach);
    for (int64_t i = 0; i < n; ++i) r[i] = r[i] > 0 ? r[i] : 1.0;
    for (int64_t j = 0; j < m; ++j) s[j] = s[j] > 0 ? s[j] : 1.0;
    std::fill(y, y + stride, Real(0));
    // The right-hand side.
    for (int64_t j = 0; j < m; ++j) y[j] = static_cast<Real>(g_bar[j] / s[j]);
    Base::sweep(y, sums, [&](int64_t i, const Eight& of_group) {
      alignas(64) Real products[8], x[8];
      put_eight<Real>(products, of_group);
      for (int k = 0; k < 8; ++k) {
        const double of_mass = column_relaxation * static_cast<double>(a[i + k] * products[k]);
        x[k] = i + k < n ? static_cast<Real>((f_bar[i + k] - of_mass) / r[i + k]) : Real(0);
      }
      return eight_at<Real>(x);
    });
    for (int64_t j = 0; j < m; ++j) residual[j] = -row_relaxation * static_cast<double>(sums[j]);
    double shift = 0, along = 0;
    for (int64_t j = 0; j < m; ++j) shift += static_cast<double>(b[j]) * s[j];
    const auto remove_shift = [&](double* h) {
      if (!balanced || shift == 0) return;
      along = 0;
      for (int64_t j = 0; j < m; ++j) along += static_cast<double>(b[j]) * h[j];
      for (int64_t j = 0; j < m; ++j) h[j] -= s[j] * along / shift;
    };
    remove_shift(residual);
    std::copy(residual, residual + m, direction);
    std::fill(solution, solution + stride, 0.0);
    double size = product(residual, residual);
    const double enough = size * problem.solver_tolerance * problem.solver_tolerance;
    for (int64_t step = 0; step < 2 * std::min(n, m) + 10 && size > enough; ++step) {
      apply(direction, row_relaxation * column_relaxation, column_vector);
      const double curvature = product(direction, column_vector);
      if (!(curvature > 0)) break;
      const double length = size / curvature;
      for (int64_t j = 0; j < m; ++j) {
        solution[j] += length * direction[j];
        residual[j] -= length * column_vector[j];
      }
      remove_shift(residual);
      const double new_size = product(residual, residual);
      for (int64_t j = 0; j < m; ++j) direction[j] = residual[j] + new_size / size * direction[j];
      size = new_size;
    }
    remove_shift(solution);
    // From y = g_bar + b h to the gradients.
    to_cost.add(2);
    Real *left_rows = to_cost.left(2), *left_columns = to_cost.left(1);
    Real *right_rows = to_cost.right(2), *right_columns = to_cost.right(1);
    std::fill(right_columns, right_columns + stride, Real(0)), std::fill(right_rows, right_rows + stride, Real(0));
    for (int64_t j = 0; j < m; ++j) {
      right_columns[j] = static_cast<Real>((g_bar[j] + static_cast<double>(b[j]) * solution[j]) / s[j]);
      right_rows[j] = static_cast<Real>(row_relaxation) * b[j];
    }
    Base::sweep(right_columns, sums, [&](int64_t i, const Eight& of_group) {
      alignas(64) Real products[8], x[8];
      put_eight<Real>(products, of_group);
      for (int k = 0; k < 8; ++k) {
        const double of_density = column_relaxation * static_cast<double>(products[k]);
        const double mass = static_cast<double>(a[i + k]);
        a_bar[i + k] -= epsilon * of_density;
        x[k] = i + k < n ? static_cast<Real>((f_bar[i + k] - mass * of_density) / r[i + k]) : Real(0);
        left_rows[i + k] = x[k];
        left_columns[i + k] = static_cast<Real>(column_relaxation * mass);
      }
      return eight_at<Real>(x);
    });
    for (int64_t j = 0; j < m; ++j) b_bar[j] -= epsilon * row_relaxation * static_cast<double>(sums[j]);
    to_cost.flush();
  }

  void run() {
    direct();
    if (problem.gradient == TransportGradient::unrolled) unrolled();
    if (problem.gradient == TransportGradient::implicit) implicit();
    if (problem.grad_a) {
      Real* grad_a = static_cast<Real*>(problem.grad_a) + index * problem.rows;
      for (int64_t i = 0; i < n; ++i) grad_a[i] = static_cast<Real>(a_bar[i]);
    }
    if (problem.grad_b) {
      Real* grad_b = static_cast<Real*>(problem.grad_b) + index * problem.columns;
      for (int64_t j = 0; j < m; ++j) grad_b[j] = static_cast<Real>(b_bar[j]);
    }
  }
};

template <class Real>
bool run_problem(const SinkhornGradientProblem& problem, int64_t index, int threads) {
  int64_t n = problem.row_lengths ? problem.row_lengths[index] : problem.rows;
  int64_t m = problem.column_lengths ? problem.column_lengths[index] : problem.columns;
  if (n == 0 || m == 0) n = m = 0;
  zero_padding<Real>(problem, index, n, m);
  if (n == 0) return true;
  Arena arena(Gradient<Real>::bytes(n, m));
  if (!arena) return false;
  Gradient<Real>(problem, index, n, m, threads, arena).run();
  return true;
}

template <class Real>
bool run(const SinkhornGradientProblem& problem) {
  std::vector<char> done(static_cast<size_t>(problem.batch), 0);
  if (problem.gradient == TransportGradient::unrolled) {
    const auto small = [&](const int64_t* indices, int64_t count) {
      Arena arena(SmallGradients<Real>::bytes(problem, indices, count));
      if (arena) SmallGradients<Real>(problem, indices, count, arena).run(done.data());
      return static_cast<bool>(arena);
    };
    if (!each_group_of_small<Real>(problem, small)) return false;
  }
  return each_problem(problem, [&](const SinkhornGradientProblem& problem, int64_t index, int threads) {
    return done[static_cast<size_t>(index)] || run_problem<Real>(problem, index, threads);
  });
}

}  // namespace

bool sinkhorn_gradient(const SinkhornGradientProblem& problem) {
  return problem.compute_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace kd::KD_ISA
