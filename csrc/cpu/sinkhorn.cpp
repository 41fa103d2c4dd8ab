// Sinkhorn's iterations on the CPU.
#include "cpu/sinkhorn_small.h"

namespace kd::KD_ISA {
namespace {

template <class Real>
struct Iterations : Transport<Real> {
  using Base = Transport<Real>;
  using Eight = typename Base::Eight;
  using Base::a, Base::b, Base::n, Base::m, Base::rows, Base::stride, Base::f, Base::g, Base::f0, Base::g0;
  using Base::empty_columns, Base::empty_rows;

  // While the scalings u and v of the base potentials are within the first range, what underflows in K is negligible;
  // beyond the second the base is moved.
  static constexpr double trusted = Base::single ? 40 : 300;
  static constexpr double comfortable = Base::single ? 20 : 200;

  const SinkhornProblem& problem;
  int64_t index;
  Real *u, *v, *new_u, *new_v;
  Real *y, *row_sums, *column_sums, *row_offsets;
  double* buffer;
  double epsilon = 0, row_relaxation = 1, column_relaxation = 1;

  static int64_t bytes(int64_t n, int64_t m) {
    const int64_t rows = round_up(n, row_group), stride = round_up(m, lanes<Real>);
    return Base::bytes(n, m) + 4 * Arena::size<Real>(rows) + 4 * Arena::size<Real>(stride) +
           Arena::size<double>(std::max(rows, stride));
  }

  Iterations(const SinkhornProblem& problem, int64_t index, int64_t n, int64_t m, int threads, Arena& arena)
      : Base(problem, index, n, m, threads, arena), problem(problem), index(index) {
    u = arena.take<Real>(rows);
    new_u = arena.take<Real>(rows);
    row_sums = arena.take<Real>(rows);
    row_offsets = arena.take<Real>(rows);
    v = arena.take<Real>(stride);
    new_v = arena.take<Real>(stride);
    y = arena.take<Real>(stride);
    column_sums = arena.take<Real>(stride);
    buffer = arena.take<double>(std::max(rows, stride));
    if (problem.start) std::copy_n(problem.start + index * problem.columns, m, g);
  }

  void set_scalings_to_one() {
    std::fill(u, u + rows, Real(1));
    std::fill(v, v + stride, Real(1));
    set_base_dependents();
  }

  void set_base_dependents() {
    for (int64_t j = 0; j < stride; ++j) y[j] = b[j] * v[j];
    for (int64_t i = 0; i < rows; ++i) row_offsets[i] = static_cast<Real>((row_relaxation - 1) * f0[i] / epsilon);
  }

  // A base from g alone: K is at most 1, and 1 somewhere in each row and column.
  bool rebase() {
    if (!Base::transform_rows(g, new_v)) return false;
    Base::transform_columns(f0, new_v);
    Base::build(epsilon, buffer);
    std::fill(u, u + rows, Real(1));
    const double scale = Base::log2_e / epsilon;
#pragma omp simd
    for (int64_t j = 0; j < stride; ++j) {
      const double x = (g[j] - g0[j]) * scale;
      v[j] = empty_columns[j] != Real(0) ? Real(1) : static_cast<Real>(math::exp2(x < 0 ? x : 0));
    }
    set_base_dependents();
    return true;
  }

  // The potentials become the base.
  void absorb() {
    std::copy(f, f + rows, f0);
    std::copy(g, g + stride, g0);
    Base::build(epsilon, buffer);
    set_scalings_to_one();
  }

  // f and g from their base and scalings.
  void make_potentials() {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      f[i] = empty_rows[i] != Real(0) ? 0.0 : f0[i] + epsilon * math::log(static_cast<double>(u[i]));
#pragma omp simd
    for (int64_t j = 0; j < m; ++j)
      g[j] = empty_columns[j] != Real(0) ? 0.0 : g0[j] + epsilon * math::log(static_cast<double>(v[j]));
  }

  void keep(int64_t iteration) {
    if (!problem.f_history) return;
    const int64_t place = index * problem.max_iterations + iteration;
    double* fs = problem.f_history + place * problem.rows;
    double* gs = problem.g_history + place * problem.columns;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) fs[i] = f0[i] + epsilon * static_cast<double>(math::log(u[i]));
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) gs[j] = g0[j] + epsilon * static_cast<double>(math::log(v[j]));
  }

  KD_INLINE static Real relaxed(Real offset, Real relaxation, Real sum) {
    return math::exp(offset - relaxation * math::log(sum));
  }

  // One iteration of the scalings into new_u and new_v.
  void iterate() {
    if (std::isinf(problem.row_reach)) {
      Base::sweep(y, column_sums, [&](int64_t i, const Eight& sums) {
        put_eight<Real>(row_sums + i, sums);
        const Eight scaling = Real(1) / (sums + eight_at<Real>(empty_rows + i));
        put_eight<Real>(new_u + i, scaling);
        return eight_at<Real>(a + i) * scaling;
      });
    } else {
      const Real relaxation = static_cast<Real>(row_relaxation);
      Base::sweep(y, column_sums, [&](int64_t i, const Eight& sums) {
        put_eight<Real>(row_sums + i, sums);
#pragma omp simd
        for (int64_t r = i; r < i + 8; ++r) new_u[r] = relaxed(row_offsets[r], relaxation, row_sums[r] + empty_rows[r]);
        return eight_at<Real>(a + i) * eight_at<Real>(new_u + i);
      });
    }
    if (std::isinf(problem.column_reach)) {
#pragma omp simd
      for (int64_t j = 0; j < stride; ++j) new_v[j] = Real(1) / (column_sums[j] + empty_columns[j]);
    } else {
      const Real relaxation = static_cast<Real>(column_relaxation);
      const double scale = (column_relaxation - 1) / epsilon;
#pragma omp simd
      for (int64_t j = 0; j < stride; ++j)
        new_v[j] = relaxed(static_cast<Real>(g0[j] * scale), relaxation, column_sums[j] + empty_columns[j]);
    }
  }

  bool balanced() const { return std::isinf(problem.row_reach) && std::isinf(problem.column_reach); }

  // The error of the present scalings, from the sums and new scalings of the rows.
  double scaled_error() const {
    double error = 0;
    if (balanced()) {
      for (int64_t i = 0; i < n; ++i)
        error += static_cast<double>(a[i] * std::abs(u[i] * row_sums[i] - (Real(1) - empty_rows[i])));
    } else {
      for (int64_t i = 0; i < n; ++i)
        if (a[i] > Real(0))
          error = std::max(error, std::abs(std::log(static_cast<double>(new_u[i]) / static_cast<double>(u[i]))));
    }
    return error;
  }

  // The same iteration from f and g in the log domain, for what scalings cannot express. False: the error of f and g
  // is within the tolerance, and they stay.
  bool iterate_carefully(bool test) {
    Base::transform_rows(g, new_v);
    std::copy(g, g + stride, g0);
    Base::build(epsilon, buffer);
    std::copy(b, b + stride, y);
    Base::sweep(y, column_sums, [&](int64_t i, const Eight& sums) {
      put_eight<Real>(row_sums + i, sums);
      return Eight{};
    });
    for (int64_t i = 0; i < n; ++i)
      buffer[i] = empty_rows[i] != Real(0)
                      ? 0.0
                      : row_relaxation * (f0[i] - epsilon * std::log(static_cast<double>(row_sums[i])));
    if (test) {
      double error = 0;
      for (int64_t i = 0; i < n; ++i) {
        const double change = (buffer[i] - f[i]) / epsilon;
        if (balanced()) {
          error += static_cast<double>(a[i]) * std::abs(std::expm1(-change));
        } else if (a[i] > Real(0)) {
          error = std::max(error, std::abs(change));
        }
      }
      if (error <= problem.tolerance) return false;
    }
    std::copy(buffer, buffer + n, f);
    Base::transform_columns(f, new_v);
    std::copy(f, f + rows, f0);
    Base::build(epsilon, buffer);
    Base::sweep(y, column_sums, [&](int64_t i, const Eight&) { return eight_at<Real>(a + i); });
    for (int64_t j = 0; j < m; ++j)
      g[j] = empty_columns[j] != Real(0)
                 ? 0.0
                 : column_relaxation * (g0[j] - epsilon * std::log(static_cast<double>(column_sums[j])));
    return true;
  }

  // Makes the iterations; afterwards K and the scalings are those of f and g.
  int32_t run(int64_t& iterations) {
    iterations = 0;
    for (int64_t k = 0; k < problem.max_iterations; ++k) {
      const double next_epsilon = epsilon_at(problem, k);
      const bool fresh = k == 0 || next_epsilon != epsilon;
      if (fresh) {
        if (k > 0) make_potentials();
        epsilon = next_epsilon;
        row_relaxation = relaxation(problem.row_reach, epsilon);
        column_relaxation = relaxation(problem.column_reach, epsilon);
        if (!rebase()) return 1;
        if (k == 0) {
          for (int64_t i = 0; i < n; ++i)
            if (a[i] > Real(0) && empty_rows[i] != Real(0)) return 2;
          for (int64_t j = 0; j < m; ++j)
            if (b[j] > Real(0) && empty_columns[j] != Real(0)) return 3;
        }
      }
      const bool test = problem.tolerance > 0 && !fresh && epsilon == problem.epsilon;
      iterate();
      const Range<Real> of_rows(new_u, rows), of_columns(new_v, stride);
      if (of_rows.within(trusted) && of_columns.within(trusted)) {
        if (test && scaled_error() <= problem.tolerance) break;
        std::swap(u, new_u);
        std::swap(v, new_v);
#pragma omp simd
        for (int64_t j = 0; j < stride; ++j) y[j] = b[j] * v[j];
        if (!of_rows.within(comfortable) || !of_columns.within(comfortable)) {
          make_potentials();
          absorb();
        }
      } else {
        if (!fresh) make_potentials();
        const bool moved = iterate_carefully(test);
        absorb();
        if (!moved) break;
      }
      keep(k);
      iterations = k + 1;
    }
    make_potentials();
    return 0;
  }

  void write_results(int64_t iterations) {
    if (epsilon != problem.epsilon) {  // annealing has not come to its end
      epsilon = problem.epsilon;
      row_relaxation = relaxation(problem.row_reach, epsilon);
      absorb();
    }
    // Row sums of the plan's density and of its costs.
    for (int64_t j = 0; j < m; ++j) y[j] = b[j] * v[j];
    double* costs_of_rows = buffer;
    each_chunk(this->chunks, this->threads, [&](int64_t chunk) {
      for (int64_t i = chunk * chunk_rows; i < std::min(n, this->chunk_end(chunk)); ++i) {
        const Real* K = this->kernel + i * stride;
        const Real* costs = this->cost + i * this->cost_stride;
        Real sum = 0, spent = 0;
#pragma omp simd reduction(+ : sum, spent)
        for (int64_t j = 0; j < m; ++j) {
          const Real density = K[j] * y[j];
          sum += density;
          spent += density * (costs[j] < std::numeric_limits<Real>::infinity() ? costs[j] : Real(0));
        }
        row_sums[i] = sum;
        costs_of_rows[i] = static_cast<double>(spent);
      }
    });
    double distance = 0, mass = 0, value = 0, error = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double au = static_cast<double>(a[i]) * static_cast<double>(u[i]);
      distance += au * costs_of_rows[i];
      mass += au * static_cast<double>(row_sums[i]);
      value += static_cast<double>(a[i]) * conjugate(f[i], problem.row_reach);
    }
    for (int64_t j = 0; j < m; ++j) value += static_cast<double>(b[j]) * conjugate(g[j], problem.column_reach);
    value -= epsilon * (mass - this->sum_a * this->sum_b);
    if (!balanced()) {
      for (int64_t i = 0; i < rows; ++i)
        new_u[i] = relaxed(row_offsets[i], static_cast<Real>(row_relaxation), row_sums[i] + empty_rows[i]);
    }
    error = scaled_error();
    static_cast<Real*>(problem.distance)[index] = static_cast<Real>(distance);
    static_cast<Real*>(problem.value)[index] = static_cast<Real>(value);
    static_cast<Real*>(problem.error)[index] = static_cast<Real>(error);
    problem.iterations[index] = iterations;
    std::copy(f, f + n, problem.f + index * problem.rows);
    std::copy(g, g + m, problem.g + index * problem.columns);
  }
};

template <class Real>
bool run_problem(const SinkhornProblem& problem, int64_t index, int threads) {
  const int64_t n = problem.row_lengths ? problem.row_lengths[index] : problem.rows;
  const int64_t m = problem.column_lengths ? problem.column_lengths[index] : problem.columns;
  std::fill_n(problem.f + index * problem.rows, problem.rows, 0.0);
  std::fill_n(problem.g + index * problem.columns, problem.columns, 0.0);
  static_cast<Real*>(problem.distance)[index] = 0;
  static_cast<Real*>(problem.value)[index] = 0;
  static_cast<Real*>(problem.error)[index] = 0;
  problem.iterations[index] = 0;
  problem.status[index] = 0;
  if (n == 0 || m == 0) return true;
  Arena arena(Iterations<Real>::bytes(n, m));
  if (!arena) return false;
  Iterations<Real> one(problem, index, n, m, threads, arena);
  int64_t iterations;
  problem.status[index] = one.run(iterations);
  if (!problem.status[index]) one.write_results(iterations);
  return true;
}

constexpr int32_t pending = -1;

template <class Real>
bool run_small(const SinkhornProblem& problem, const int64_t* indices, int64_t count) {
  Arena arena(SmallProblems<Real>::bytes());
  if (arena) SmallProblems<Real>(problem, indices, count, arena).run();
  return static_cast<bool>(arena);
}

template <class Real>
bool run(const SinkhornProblem& problem) {
  std::fill_n(problem.status, problem.batch, pending);
  const auto small = [&](const int64_t* indices, int64_t count) { return run_small<Real>(problem, indices, count); };
  if (!each_group_of_small<Real>(problem, small)) return false;
  return each_problem(problem, [](const SinkhornProblem& problem, int64_t index, int threads) {
    return problem.status[index] != pending || run_problem<Real>(problem, index, threads);
  });
}

}  // namespace

bool sinkhorn(const SinkhornProblem& problem) {
  return problem.compute_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace kd::KD_ISA
