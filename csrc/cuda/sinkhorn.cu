// Sinkhorn's iterations on NVIDIA GPUs: one block per problem, the scheme of csrc/cpu/sinkhorn.cpp. While the scalings u and v
// of the base potentials stay within bounds, an iteration is two products of K with a vector; else the base is moved, or the
// iteration made in the log domain.
#include "cuda/sinkhorn.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace kd::cuda {
namespace {

template <class Real>
struct Iterations : Transport<Real> {
  using Base = Transport<Real>;
  using Base::a, Base::b, Base::n, Base::m, Base::problem, Base::index, Base::f0, Base::g0, Base::epsilon;
  using Base::empty_columns, Base::empty_rows, Base::K;

  // While the scalings are within the first range (log2), what underflows in K is negligible; beyond the second the base is
  // moved.
  static constexpr double trusted = Base::single ? 40 : 300;
  static constexpr double comfortable = Base::single ? 20 : 200;

  double *f, *g, *next_f;
  Real *u, *new_u, *row_sums, *x, *v, *new_v, *y;
  double row_relaxation = 1, column_relaxation = 1;

  __device__ __forceinline__ Iterations(const SinkhornProblem& problem, const TransportMemory<Real>& memory, bool kept)
      : Base(problem, memory, kept, sinkhorn_vectors),
        f(problem.f + index * problem.rows),
        g(problem.g + index * problem.columns) {
    next_f = Base::scratch.template take<double>(n);
    u = Base::scratch.template take<Real>(n);
    new_u = Base::scratch.template take<Real>(n);
    row_sums = Base::scratch.template take<Real>(n);
    x = Base::scratch.template take<Real>(n);
    v = Base::scratch.template take<Real>(m);
    new_v = Base::scratch.template take<Real>(m);
    y = Base::scratch.template take<Real>(m);
  }

  __device__ __forceinline__ bool balanced() const {
    return std::isinf(problem.row_reach) && std::isinf(problem.column_reach);
  }

  __device__ __forceinline__ void weigh() {
    for_each(m, [&](int j) { y[j] = b(j) * v[j]; });
  }

  // A base from g alone: K is at most 1, and 1 somewhere in each row and column.
  __device__ __forceinline__ void rebase(double new_epsilon) {
    Base::transform_rows(g);
    Base::transform_columns(f0);
    Base::build(new_epsilon);
    for_each(n, [&](int i) { u[i] = Real(1); });
    for_each(m, [&](int j) {
      const double exponent = (g[j] - g0[j]) * Base::scale;
      v[j] = empty_columns[j] != Real(0) ? Real(1) : math::exp2(static_cast<Real>(exponent < 0 ? exponent : 0));
    });
    weigh();
  }

  // The potentials become the base.
  __device__ __forceinline__ void absorb(double new_epsilon) {
    for_each(n, [&](int i) { f0[i] = f[i], u[i] = Real(1); });
    for_each(m, [&](int j) { g0[j] = g[j], v[j] = Real(1); });
    Base::build(new_epsilon);
    weigh();
  }

  __device__ __forceinline__ double row_potential(int i) const {
    return empty_rows[i] != Real(0) ? 0.0 : f0[i] + epsilon * math::log(static_cast<double>(u[i]));
  }
  __device__ __forceinline__ double column_potential(int j) const {
    return empty_columns[j] != Real(0) ? 0.0 : g0[j] + epsilon * math::log(static_cast<double>(v[j]));
  }

  __device__ __forceinline__ void make_potentials() {
    for_each(n, [&](int i) { f[i] = row_potential(i); });
    for_each(m, [&](int j) { g[j] = column_potential(j); });
  }

  __device__ __forceinline__ void keep(int64_t iteration) {
    if (!problem.f_history) return;
    const int64_t place = index * problem.max_iterations + iteration;
    for_each(n, [&](int i) { problem.f_history[place * problem.rows + i] = row_potential(i); });
    for_each(m, [&](int j) { problem.g_history[place * problem.columns + j] = column_potential(j); });
  }

  __device__ __forceinline__ static Real relaxed(double base, double relaxation, double epsilon, Real sum) {
    if (relaxation == 1.0) return Real(1) / sum;
    return math::exp(static_cast<Real>((relaxation - 1) * base / epsilon) -
                     static_cast<Real>(relaxation) * math::log(sum));
  }
  __device__ __forceinline__ Real row_scaling(int i) const {
    return relaxed(f0[i], row_relaxation, epsilon, row_sums[i] + empty_rows[i]);
  }

  // One iteration of the scalings into new_u and new_v.
  __device__ __forceinline__ void iterate() {
    Base::over_rows(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * y[j]; },
        [&](int i, Real sum) {
          row_sums[i] = sum;
          new_u[i] = row_scaling(i);
          x[i] = a(i) * new_u[i];
        });
    Base::over_columns(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * x[i]; },
        [&](int j, Real sum) { new_v[j] = relaxed(g0[j], column_relaxation, epsilon, sum + empty_columns[j]); });
  }

  // 0: the new scalings are in the second range; 1: in the first; 2: in none.
  __device__ __forceinline__ int range() const {
    const Real near = math::exp2(static_cast<Real>(comfortable)), far = math::exp2(static_cast<Real>(trusted));
    double found = 0;
    const auto look = [&](Real scaling) {
      const double one = !(scaling <= far && scaling * far >= Real(1))     ? 2
                         : !(scaling <= near && scaling * near >= Real(1)) ? 1
                                                                           : 0;
      found = one > found ? one : found;
    };
    for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) look(new_u[i]);
    for (int j = threadIdx.x; j < m; j += static_cast<int>(blockDim.x)) look(new_v[j]);
    return static_cast<int>(Base::max(found));
  }

  // The error of the present scalings, from the sums and new scalings of the rows.
  __device__ __forceinline__ double scaled_error() const {
    if (balanced())
      return Base::sum_of(n, [&](int i) {
        return static_cast<double>(a(i) * std::fabs(u[i] * row_sums[i] - (Real(1) - empty_rows[i])));
      });
    double error = 0;
    for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
      if (!(a(i) > Real(0))) continue;
      const double change = std::fabs(math::log(static_cast<double>(new_u[i]) / static_cast<double>(u[i])));
      error = merged_max(error, change);
    }
    return Base::max(error);
  }

  // The same iteration from f and g in the log domain, for what scalings cannot express. False: the error of f and g
  // is within the tolerance, and they stay.
  __device__ __forceinline__ bool iterate_carefully(bool test) {
    Base::transform_rows(g);
    for_each(m, [&](int j) { g0[j] = g[j]; });
    Base::build(epsilon);
    Base::over_rows(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * b(j); },
        [&](int i, Real sum) {
          next_f[i] =
              empty_rows[i] != Real(0) ? 0.0 : row_relaxation * (f0[i] - epsilon * math::log(static_cast<double>(sum)));
        });
    if (test) {
      double own = 0;
      for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x)) {
        const double change = (next_f[i] - f[i]) / epsilon;
        if (balanced()) {
          own += static_cast<double>(a(i)) * std::fabs(std::expm1(-change));
        } else if (a(i) > Real(0)) {
          own = merged_max(own, std::fabs(change));
        }
      }
      if ((balanced() ? Base::total(own) : Base::max(own)) <= problem.tolerance) return false;
    }
    for_each(n, [&](int i) { f[i] = next_f[i]; });
    Base::transform_columns(f);
    for_each(n, [&](int i) { f0[i] = f[i]; });
    Base::build(epsilon);
    Base::over_columns(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * a(i); },
        [&](int j, Real sum) {
          g[j] = empty_columns[j] != Real(0)
                     ? 0.0
                     : column_relaxation * (g0[j] - epsilon * math::log(static_cast<double>(sum)));
        });
    return true;
  }

  // What FAULTS in kdkernels/backends/transport.py says of the costs; 0: nothing.
  __device__ __forceinline__ int fault() const {
    double found = 0;
    for (int i = threadIdx.x; i < n; i += static_cast<int>(blockDim.x))
      if (a(i) > Real(0) && empty_rows[i] != Real(0)) found = 2;
    for (int j = threadIdx.x; j < m; j += static_cast<int>(blockDim.x))
      if (found == 0 && b(j) > Real(0) && empty_columns[j] != Real(0)) found = 1;
    const int worst = static_cast<int>(Base::max(found));
    return worst == 0 ? 0 : 4 - worst;
  }
  __device__ __forceinline__ bool costs_are_wrong() const {
    double wrong = 0;
    Base::for_pairs(n, m, [&](int i, int j) {
      if (!(Base::cost_at(i, j) > -Real(INFINITY))) wrong = 1;
    });
    return Base::max(wrong) > 0;
  }

  // Makes the iterations; afterwards K and the scalings are those of f and g.
  __device__ __forceinline__ int run(int64_t& iterations) {
    iterations = 0;
    if (costs_are_wrong()) return 1;
    for_each(m, [&](int j) { g[j] = problem.start ? problem.start[index * problem.columns + j] : 0.0; });
    for (int64_t k = 0; k < problem.max_iterations; ++k) {
      const double next_epsilon = epsilon_at(problem, k);
      const bool fresh = k == 0 || next_epsilon != epsilon;
      if (fresh) {
        if (k > 0) make_potentials();
        row_relaxation = relaxation(problem.row_reach, next_epsilon);
        column_relaxation = relaxation(problem.column_reach, next_epsilon);
        rebase(next_epsilon);
        const int found = k == 0 ? fault() : 0;
        if (found) return found;
      }
      const bool test = problem.tolerance > 0 && !fresh && epsilon == problem.epsilon;
      iterate();
      const int reached = range();
      if (reached < 2) {
        if (test && scaled_error() <= problem.tolerance) break;
        Real *const old_u = u, *const old_v = v;
        u = new_u, new_u = old_u, v = new_v, new_v = old_v;
        weigh();
        if (reached == 1) {
          make_potentials();
          absorb(epsilon);
        }
      } else {
        if (!fresh) make_potentials();
        const bool moved = iterate_carefully(test);
        absorb(epsilon);
        if (!moved) break;
      }
      keep(k);
      iterations = k + 1;
    }
    make_potentials();
    return 0;
  }

  __device__ __forceinline__ void write_results() {
    if (epsilon != problem.epsilon) {  // annealing has not come to its end
      row_relaxation = relaxation(problem.row_reach, problem.epsilon);
      absorb(problem.epsilon);
    }
    double* const spent = next_f;
    Base::over_rows(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * y[j]; },
        [&](int i, Real sum) { row_sums[i] = sum; });
    Base::over_rows(
        Real(0), Add<Real>{}, [&](int i, int j) { return K(i, j) * y[j] * Base::finite_cost(i, j); },
        [&](int i, Real sum) {
          spent[i] = static_cast<double>(sum);
          new_u[i] = row_scaling(i);
        });
    Base::add_up_masses();
    const double distance =
        Base::sum_of(n, [&](int i) { return static_cast<double>(a(i)) * static_cast<double>(u[i]) * spent[i]; });
    const double excess =
        Base::sum_of(n,
                     [&](int i) {
                       return static_cast<double>(a(i)) * static_cast<double>(u[i]) * static_cast<double>(row_sums[i]);
                     }) -
        Base::sum_a * Base::sum_b;
    const double objective =
        Base::sum_of(n, [&](int i) { return static_cast<double>(a(i)) * conjugate(f[i], problem.row_reach); }) +
        Base::sum_of(m, [&](int j) { return static_cast<double>(b(j)) * conjugate(g[j], problem.column_reach); });
    const double error = scaled_error();
    if (threadIdx.x != 0) return;
    static_cast<Real*>(problem.distance)[index] = static_cast<Real>(distance);
    static_cast<Real*>(problem.value)[index] = static_cast<Real>(objective - epsilon * excess);
    static_cast<Real*>(problem.error)[index] = static_cast<Real>(error);
  }
};

template <class Real>
__global__ void __launch_bounds__(most_transport_threads, 1) sinkhorn_kernel(SinkhornProblem problem, bool kept) {
  KD_DYNAMIC_SHARED(Real, matrix);
  KD_SHARED(double, partial, most_transport_threads);
  KD_SHARED(double, sums, warp_lanes);
  Iterations<Real> one(problem, {matrix, partial, sums}, kept);
  for (int64_t i = one.n + threadIdx.x; i < problem.rows; i += blockDim.x) one.f[i] = 0;
  for (int64_t j = one.m + threadIdx.x; j < problem.columns; j += blockDim.x) one.g[j] = 0;
  int64_t iterations = 0;
  const int status = one.n ? one.run(iterations) : 0;
  if (threadIdx.x == 0) {
    problem.status[one.index] = status;
    problem.iterations[one.index] = iterations;
    static_cast<Real*>(problem.distance)[one.index] = 0;
    static_cast<Real*>(problem.value)[one.index] = 0;
    static_cast<Real*>(problem.error)[one.index] = 0;
  }
  if (one.n && !status) one.write_results();
}

template <class Real>
std::string run(const SinkhornProblem& problem, void* stream) {
  return launch_transport<Real>("sinkhorn", sinkhorn_kernel<Real>, problem, stream);
}

}  // namespace

std::string sinkhorn(const SinkhornProblem& problem, void* stream) {
  if (problem.batch == 0) return {};
  return problem.compute_double ? run<double>(problem, stream) : run<float>(problem, stream);
}

}  // namespace kd::cuda
