// The gradients of Sinkhorn's iterations on NVIDIA GPUs: one block per problem, the scheme of csrc/cpu/sinkhorn_gradient.cpp.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sinkhorn.cuh"

namespace kd::cuda {
namespace {

template <class Real>
struct Gradient : Transport<Real> {
  using Base = Transport<Real>;
  using Base::a, Base::b, Base::n, Base::m, Base::index, Base::f0, Base::g0, Base::sum_a, Base::sum_b;
  using Base::empty_columns, Base::empty_rows, Base::K;

  // How far scalings of the base may grow (log2) before it is moved. They may shrink as they like: what then underflows is
  // small.
  static constexpr double trusted = Base::single ? 30 : 300;

  const SinkhornGradientProblem& problem;
  const double *f, *g;
  Real* to_cost;  // null: not wanted
  double *f_bar, *a_bar, *r, *row_spent;
  double *g_bar, *b_bar, *s, *column_spent, *residual, *direction, *solution;
  Real *u, *row_u, *x, *left;  // scalings of the rows in the step of the columns and in that of the rows
  Real *v, *column_v, *y, *right;

  __device__ __forceinline__ Gradient(const SinkhornGradientProblem& problem, const TransportMemory<Real>& memory,
                                      bool kept)
      : Base(problem, memory, kept, sinkhorn_gradient_vectors),
        problem(problem),
        f(problem.f + index * problem.rows),
        g(problem.g + index * problem.columns),
        to_cost(problem.grad_cost ? static_cast<Real*>(problem.grad_cost) + index * problem.rows * problem.columns
                                  : nullptr) {
    for (double** each : {&f_bar, &a_bar, &r, &row_spent}) *each = Base::scratch.template take<double>(n);
    for (double** each : {&g_bar, &b_bar, &s, &column_spent, &residual, &direction, &solution})
      *each = Base::scratch.template take<double>(m);
    for (Real** each : {&u, &row_u, &x, &left}) *each = Base::scratch.template take<Real>(n);
    for (Real** each : {&v, &column_v, &y, &right}) *each = Base::scratch.template take<Real>(m);
  }

  __device__ __forceinline__ double upstream(const void* values) const {
    return values ? static_cast<double>(static_cast<const Real*>(values)[index]) : 0.0;
  }

  // `columns_from` may be null, for zeros.
  __device__ __forceinline__ void set_base(const double* rows_from, double rows_by, const double* columns_from,
                                           double columns_by, double epsilon) {
    for_each(n, [&](int i) { f0[i] = rows_from[i] * rows_by; });
    for_each(m, [&](int j) { g0[j] = columns_from ? columns_from[j] * columns_by : 0.0; });
    Base::build(epsilon);
  }

  template <class Term, class Out>
  __device__ __forceinline__ void sums_of_rows(Term term, Out out) const {
    Base::over_rows(Real(0), Add<Real>{}, term, out);
  }
  template <class Term, class Out>
  __device__ __forceinline__ void sums_of_columns(Term term, Out out) const {
    Base::over_columns(Real(0), Add<Real>{}, term, out);
  }

  // The gradients at fixed potentials, and those to the last potentials.
  __device__ __forceinline__ void direct() {
    Base::transform_rows(g);  // finds what is empty
    Base::transform_columns(f0);
    const double epsilon = problem.epsilon;
    set_base(f, 1, g, 1, epsilon);
    Base::add_up_masses();
    const bool envelope = problem.gradient == TransportGradient::envelope;
    double of_distance = upstream(problem.grad_distance), of_value = upstream(problem.grad_value);
    if (envelope) of_value += of_distance, of_distance = 0;
    if (to_cost) {
      const Real of_density = static_cast<Real>(of_distance + of_value);
      const Real of_spending = static_cast<Real>(of_distance / epsilon);
      Base::for_pairs(static_cast<int>(problem.rows), static_cast<int>(problem.columns), [&](int i, int j) {
        const bool inside = i < n && j < m;
        to_cost[i * problem.columns + j] =
            inside ? a(i) * b(j) * K(i, j) * (of_density - of_spending * Base::finite_cost(i, j)) : Real(0);
      });
    }
    sums_of_rows([&](int i, int j) { return K(i, j) * b(j); },
                 [&](int i, Real sum) { r[i] = static_cast<double>(sum); });
    sums_of_rows([&](int i, int j) { return K(i, j) * Base::finite_cost(i, j) * b(j); },
                 [&](int i, Real sum) { row_spent[i] = static_cast<double>(sum); });
    sums_of_columns([&](int i, int j) { return K(i, j) * a(i); },
                    [&](int j, Real sum) { s[j] = static_cast<double>(sum); });
    sums_of_columns([&](int i, int j) { return K(i, j) * Base::finite_cost(i, j) * a(i); },
                    [&](int j, Real sum) { column_spent[j] = static_cast<double>(sum); });
    for_each(n, [&](int i) {
      const double sent = problem.grad_f && !envelope ? problem.grad_f[index * problem.rows + i] : 0.0;
      const double slope = conjugate_slope(f[i], problem.row_reach) - r[i];
      const double made = sent + static_cast<double>(a(i)) * (of_distance * row_spent[i] / epsilon + of_value * slope);
      f_bar[i] = empty_rows[i] != Real(0) ? 0.0 : made;
      a_bar[i] =
          of_distance * row_spent[i] + of_value * (conjugate(f[i], problem.row_reach) - epsilon * (r[i] - sum_b));
    });
    for_each(m, [&](int j) {
      const double sent = problem.grad_g && !envelope ? problem.grad_g[index * problem.columns + j] : 0.0;
      const double slope = conjugate_slope(g[j], problem.column_reach) - s[j];
      const double made =
          sent + static_cast<double>(b(j)) * (of_distance * column_spent[j] / epsilon + of_value * slope);
      g_bar[j] = empty_columns[j] != Real(0) ? 0.0 : made;
      b_bar[j] =
          of_distance * column_spent[j] + of_value * (conjugate(g[j], problem.column_reach) - epsilon * (s[j] - sum_a));
    });
  }

  // Adds K o (left y' + x right') to the gradient of the costs; `both` false: the first product alone.
  __device__ __forceinline__ void add_products(const Real* by_rows, const Real* by_columns, bool both) const {
    if (!to_cost) return;
    Base::for_pairs(n, m, [&](int i, int j) {
      const Real product = by_rows[i] * by_columns[j];
      to_cost[i * problem.columns + j] += K(i, j) * (both ? product + x[i] * right[j] : product);
    });
  }

  // --- unrolled ---------------------------------------------------------------------------------------------------

  // The scalings of one iteration with respect to the base: of the columns' step u and v, of the rows' row_u and column_v.
  // False: some are too large.
  __device__ __forceinline__ bool scale(const double* fs, const double* gs, const double* old_gs, double epsilon,
                                        double row_relaxation, double column_relaxation) {
    const double scale = log2_e / epsilon;
    double highest = 0;
    const auto scaling = [&](double exponent) {
      highest = exponent > highest ? exponent : highest;
      return math::exp2(static_cast<Real>(exponent < trusted ? exponent : trusted));
    };
    for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      u[i] = scaling((fs[i] - f0[i]) * scale);
      row_u[i] = scaling((fs[i] / row_relaxation - f0[i]) * scale);
    }
    for (int j = threadIdx.x; j < m; j += static_cast<int>(blockDim.x)) {
      v[j] = scaling((gs[j] / column_relaxation - g0[j]) * scale);
      column_v[j] = scaling(((old_gs ? old_gs[j] : 0.0) - g0[j]) * scale);
    }
    return Base::max(highest) <= trusted;
  }

  // Takes g_bar back through the step of the columns, to f_bar; x is then f_bar scaled, which goes on.
  __device__ __forceinline__ void through_columns(double epsilon, double column_relaxation) {
    for_each(m, [&](int j) { y[j] = static_cast<Real>(g_bar[j]) * v[j]; });
    sums_of_rows([&](int i, int j) { return K(i, j) * y[j]; },
                 [&](int i, Real product) {
                   const double of_density = column_relaxation * static_cast<double>(u[i] * product);
                   a_bar[i] -= epsilon * of_density;
                   const double made = f_bar[i] - static_cast<double>(a(i)) * of_density;
                   left[i] = static_cast<Real>(column_relaxation) * a(i) * u[i];
                   x[i] = empty_rows[i] != Real(0) ? Real(0) : static_cast<Real>(made) * row_u[i];
                   f_bar[i] = 0;
                 });
  }

  // Takes x back through the step of the rows, to the g_bar of the iteration before.
  __device__ __forceinline__ void through_rows(double epsilon, double row_relaxation) {
    sums_of_columns([&](int i, int j) { return K(i, j) * x[i]; },
                    [&](int j, Real sum) {
                      const double of_density = row_relaxation * static_cast<double>(sum * column_v[j]);
                      b_bar[j] -= epsilon * of_density;
                      g_bar[j] = empty_columns[j] != Real(0) ? 0.0 : -static_cast<double>(b(j)) * of_density;
                      right[j] = static_cast<Real>(row_relaxation) * b(j) * column_v[j];
                    });
  }

  // Both in turn, each with a base of its own.
  __device__ __forceinline__ void step_apart(const double* fs, const double* gs, const double* old_gs, double epsilon,
                                             double row_relaxation, double column_relaxation) {
    set_base(fs, 1, gs, 1 / column_relaxation, epsilon);
    for_each(n, [&](int i) { u[i] = row_u[i] = Real(1); });
    for_each(m, [&](int j) { v[j] = column_v[j] = Real(1); });
    through_columns(epsilon, column_relaxation);
    add_products(left, y, false);
    set_base(fs, 1 / row_relaxation, old_gs, 1, epsilon);
    through_rows(epsilon, row_relaxation);
    add_products(x, right, false);
  }

  __device__ __forceinline__ void unrolled() {
    double base_epsilon = problem.epsilon;
    bool based = true;
    for (int64_t k = problem.iterations[index] - 1; k >= 0; --k) {
      const int64_t place = index * problem.max_iterations + k;
      const double* const fs = problem.f_history + place * problem.rows;
      const double* const gs = problem.g_history + place * problem.columns;
      const double* const first_gs = problem.start ? problem.start + index * problem.columns : nullptr;
      const double* const old_gs = k > 0 ? gs - problem.columns : first_gs;
      const double epsilon = epsilon_at(problem, k);
      const double row_relaxation = relaxation(problem.row_reach, epsilon);
      const double column_relaxation = relaxation(problem.column_reach, epsilon);
      bool ready =
          based && epsilon == base_epsilon && scale(fs, gs, old_gs, epsilon, row_relaxation, column_relaxation);
      if (!ready) {
        set_base(fs, 1, gs, 1 / column_relaxation, epsilon);
        base_epsilon = epsilon;
        based = ready = scale(fs, gs, old_gs, epsilon, row_relaxation, column_relaxation);
      }
      if (ready) {
        through_columns(epsilon, column_relaxation);
        through_rows(epsilon, row_relaxation);
        add_products(left, y, true);
      } else {
        step_apart(fs, gs, old_gs, epsilon, row_relaxation, column_relaxation);
      }
    }
  }

  // --- implicit ---------------------------------------------------------------------------------------------------

  // The inner product of the columns: sum_j one_j other_j b_j / s_j.
  __device__ __forceinline__ double product(const double* one, const double* other) const {
    return Base::sum_of(m, [&](int j) { return one[j] * other[j] * static_cast<double>(b(j)) / s[j]; });
  }

  // Balanced, potentials are known up to a constant only: takes off the part of h along s.
  __device__ __forceinline__ void remove_shift(double* h, double shift) const {
    if (shift == 0) return;
    const double along = Base::sum_of(m, [&](int j) { return static_cast<double>(b(j)) * h[j]; });
    for_each(m, [&](int j) { h[j] -= s[j] * along / shift; });
  }

  __device__ __forceinline__ void implicit() {
    const double epsilon = problem.epsilon;
    const double row_relaxation = relaxation(problem.row_reach, epsilon);
    const double column_relaxation = relaxation(problem.column_reach, epsilon);
    const bool balanced = std::isinf(problem.row_reach) && std::isinf(problem.column_reach);
    for_each(n, [&](int i) { r[i] = r[i] > 0 ? r[i] : 1.0; });
    for_each(m, [&](int j) {
      s[j] = s[j] > 0 ? s[j] : 1.0;
      y[j] = static_cast<Real>(g_bar[j] / s[j]);
    });
    // The right-hand side.
    sums_of_rows([&](int i, int j) { return K(i, j) * y[j]; },
                 [&](int i, Real sum) {
                   x[i] = static_cast<Real>((f_bar[i] - column_relaxation * static_cast<double>(a(i) * sum)) / r[i]);
                 });
    sums_of_columns([&](int i, int j) { return K(i, j) * x[i]; },
                    [&](int j, Real sum) { residual[j] = -row_relaxation * static_cast<double>(sum); });
    const double along_s = Base::sum_of(m, [&](int j) { return static_cast<double>(b(j)) * s[j]; });
    const double shift = balanced ? along_s : 0.0;
    remove_shift(residual, shift);
    for_each(m, [&](int j) { direction[j] = residual[j], solution[j] = 0; });
    double size = product(residual, residual);
    const double enough = size * problem.solver_tolerance * problem.solver_tolerance;
    const int64_t steps = 2 * (n < m ? n : m) + 10;
    double* const image = column_spent;
    for (int64_t step = 0; step < steps && size > enough; ++step) {
      for_each(m, [&](int j) { y[j] = static_cast<Real>(static_cast<double>(b(j)) / s[j] * direction[j]); });
      sums_of_rows([&](int i, int j) { return K(i, j) * y[j]; },
                   [&](int i, Real sum) { x[i] = static_cast<Real>(static_cast<double>(a(i)) / r[i]) * sum; });
      sums_of_columns([&](int i, int j) { return K(i, j) * x[i]; },
                      [&](int j, Real sum) {
                        image[j] = direction[j] - row_relaxation * column_relaxation * static_cast<double>(sum);
                      });
      const double curvature = product(direction, image);
      if (!(curvature > 0)) break;
      const double length = size / curvature;
      for_each(m, [&](int j) {
        solution[j] += length * direction[j];
        residual[j] -= length * image[j];
      });
      remove_shift(residual, shift);
      const double new_size = product(residual, residual);
      for_each(m, [&](int j) { direction[j] = residual[j] + new_size / size * direction[j]; });
      size = new_size;
    }
    remove_shift(solution, shift);
    // From y = g_bar + b h to the gradients.
    for_each(m, [&](int j) {
      y[j] = static_cast<Real>((g_bar[j] + static_cast<double>(b(j)) * solution[j]) / s[j]);
      right[j] = static_cast<Real>(row_relaxation) * b(j);
    });
    sums_of_rows([&](int i, int j) { return K(i, j) * y[j]; },
                 [&](int i, Real sum) {
                   const double of_density = column_relaxation * static_cast<double>(sum), mass = a(i);
                   a_bar[i] -= epsilon * of_density;
                   x[i] = static_cast<Real>((f_bar[i] - mass * of_density) / r[i]);
                   left[i] = static_cast<Real>(column_relaxation * mass);
                 });
    sums_of_columns([&](int i, int j) { return K(i, j) * x[i]; },
                    [&](int j, Real sum) { b_bar[j] -= epsilon * row_relaxation * static_cast<double>(sum); });
    add_products(left, y, true);
  }

  __device__ __forceinline__ void run() {
    direct();
    if (problem.gradient == TransportGradient::unrolled) unrolled();
    if (problem.gradient == TransportGradient::implicit) implicit();
  }
};

template <class Real>
__global__ void __launch_bounds__(most_transport_threads, 1)
    sinkhorn_gradient_kernel(SinkhornGradientProblem problem, bool kept) {
  KD_DYNAMIC_SHARED(Real, matrix);
  KD_SHARED(double, partial, most_transport_threads);
  KD_SHARED(double, sums, warp_lanes);
  Gradient<Real> one(problem, {matrix, partial, sums}, kept);
  if (one.n) {
    one.run();
  } else if (one.to_cost) {
    one.for_pairs(static_cast<int>(problem.rows), static_cast<int>(problem.columns),
                  [&](int i, int j) { one.to_cost[i * problem.columns + j] = 0; });
  }
  Real* const grad_a = static_cast<Real*>(problem.grad_a);
  Real* const grad_b = static_cast<Real*>(problem.grad_b);
  if (grad_a)
    for (int64_t i = threadIdx.x; i < problem.rows; i += blockDim.x)
      grad_a[one.index * problem.rows + i] = i < one.n ? static_cast<Real>(one.a_bar[i]) : Real(0);
  if (grad_b)
    for (int64_t j = threadIdx.x; j < problem.columns; j += blockDim.x)
      grad_b[one.index * problem.columns + j] = j < one.m ? static_cast<Real>(one.b_bar[j]) : Real(0);
}

template <class Real>
std::string run(const SinkhornGradientProblem& problem, void* stream) {
  return launch_transport<Real>("sinkhorn_gradient", sinkhorn_gradient_kernel<Real>, problem, stream);
}

}  // namespace

std::string sinkhorn_gradient(const SinkhornGradientProblem& problem, void* stream) {
  if (problem.batch == 0) return {};
  return problem.compute_double ? run<double>(problem, stream) : run<float>(problem, stream);
}

}  // namespace kd::cuda
