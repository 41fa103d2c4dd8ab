// One transport problem, worked on by one block, in scaled form: the matrix K_ij = exp((f0_i + g0_j - C_ij) / eps) around base
// potentials in double precision, as on the CPU (csrc/cpu/sinkhorn.h). K lies in shared memory where it fits there; else its
// entries are made again from the costs wherever they are asked for. Vectors lie in global memory, which a block's own
// first-level cache serves.
//
// All threads of a block call everything here together, and what is called ends with a block barrier.
#pragma once

#include <cmath>

#include "cuda/launch.cuh"
#include "cuda/reductions.cuh"
#include "cuda/sides.cuh"

namespace kd::cuda {

constexpr int most_transport_threads = 384;  // so that each can have 168 registers

// How much of a balanced update a relaxed one makes.
__device__ __forceinline__ double relaxation(double reach, double epsilon) {
  return std::isinf(reach) ? 1.0 : reach / (reach + epsilon);
}

// What the dual objective takes of a potential, and its derivative.
__device__ __forceinline__ double conjugate(double x, double reach) {
  return std::isinf(reach) ? x : -reach * std::expm1(-x / reach);
}
__device__ __forceinline__ double conjugate_slope(double x, double reach) {
  return std::isinf(reach) ? 1.0 : math::exp(-x / reach);
}

__device__ __forceinline__ double epsilon_at(const SinkhornProblem& problem, int64_t iteration) {
  const double annealed =
      problem.epsilon_start * math::exp(static_cast<double>(iteration) * math::log(problem.epsilon_decay));
  return annealed > problem.epsilon ? annealed : problem.epsilon;
}

// Vectors of one problem, one after another.
struct Scratch {
  double* next;

  template <class T>
  __device__ __forceinline__ T* take(int count) {
    T* const taken = reinterpret_cast<T*>(next);
    next += count;
    return taken;
  }
};

template <class Body>
__device__ __forceinline__ void for_each(int count, Body body) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) body(i);
  __syncthreads();
}

// The shared memory of a block.
template <class Real>
struct TransportMemory {
  SharedView<Real> matrix;     // [n, pitch] if K is kept
  SharedView<double> partial;  // [threads]
  SharedView<double> sums;     // [warps]
};

template <class Real>
struct Transport {
  static constexpr bool single = sizeof(Real) == 4;
  // Entries beyond this belong to a row and a column without mass.
  static constexpr double highest_exponent = single ? 100 : 1000;
  static constexpr Real least_normal = single ? Real(1.17549435e-38) : Real(2.2250738585072014e-308);

  const SinkhornProblem& problem;
  TransportMemory<Real> memory;
  bool kept;  // K is, in shared memory
  int64_t index;
  int n, m;
  const Real* cost;  // rows are problem.columns apart
  const Real *masses_a, *masses_b;
  Scratch scratch;
  double *f0, *g0;
  Real *empty_rows, *empty_columns;  // 1 without an allowed partner of positive mass, else 0
  double epsilon = 0, scale = 0;     // log2(e) / epsilon
  double sum_a = 0, sum_b = 0;

  __device__ __forceinline__ Transport(const SinkhornProblem& problem, const TransportMemory<Real>& memory, bool kept,
                                       int vectors)
      : problem(problem), memory(memory), kept(kept), index(blockIdx.x) {
    n = static_cast<int>(problem.row_lengths ? problem.row_lengths[index] : problem.rows);
    m = static_cast<int>(problem.column_lengths ? problem.column_lengths[index] : problem.columns);
    if (n == 0 || m == 0) n = m = 0;
    cost = static_cast<const Real*>(problem.cost) + index * problem.rows * problem.columns;
    masses_a = static_cast<const Real*>(problem.a) + index * problem.rows;
    masses_b = static_cast<const Real*>(problem.b) + index * problem.columns;
    scratch.next = problem.scratch + index * vectors * (problem.rows + problem.columns);
    f0 = scratch.take<double>(n);
    g0 = scratch.take<double>(m);
    empty_rows = scratch.take<Real>(n);
    empty_columns = scratch.take<Real>(m);
  }

  __device__ __forceinline__ double total(double own) const { return BlockSums<double>{memory.sums}.total(own); }
  __device__ __forceinline__ double max(double own) const { return BlockSums<double>{memory.sums}.max(own); }

  template <class Term>
  __device__ __forceinline__ double sum_of(int count, Term term) const {
    double sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) sum += term(i);
    return total(sum);
  }

  // Masses below the normal numbers count as zero.
  __device__ __forceinline__ Real a(int i) const { return masses_a[i] < least_normal ? Real(0) : masses_a[i]; }
  __device__ __forceinline__ Real b(int j) const { return masses_b[j] < least_normal ? Real(0) : masses_b[j]; }

  __device__ __forceinline__ void add_up_masses() {
    sum_a = sum_of(n, [&](int i) { return static_cast<double>(a(i)); });
    sum_b = sum_of(m, [&](int j) { return static_cast<double>(b(j)); });
  }

  __device__ __forceinline__ Real cost_at(int i, int j) const { return cost[i * problem.columns + j]; }
  __device__ __forceinline__ Real finite_cost(int i, int j) const {
    const Real found = cost_at(i, j);
    return found < Real(INFINITY) ? found : Real(0);
  }

  __device__ __forceinline__ int pitch() const {
    return static_cast<int>(problem.columns) | 1;
  }  // odd: columns meet all banks

  // The exponent is made in double precision: costs of 1e4 at an epsilon of 1e-3 have no digits left in single.
  __device__ __forceinline__ Real made(int i, int j) const {
    if (empty_rows[i] != Real(0) || empty_columns[j] != Real(0)) return 0;
    const double x = (f0[i] + g0[j] - static_cast<double>(cost_at(i, j))) * scale;
    return math::exp2(static_cast<Real>(x < highest_exponent ? x : highest_exponent));
  }

  __device__ __forceinline__ Real K(int i, int j) const {
    return kept ? static_cast<Real>(memory.matrix[i * pitch() + j]) : made(i, j);
  }

  // Calls body(i, j) for all pairs, neighbours in a row by neighbouring threads.
  template <class Body>
  __device__ __forceinline__ void for_pairs(int rows, int columns, Body body) const {
    const int warps = blockDim.x / warp_lanes;
    for (int i = threadIdx.x / warp_lanes; i < rows; i += warps)
#pragma unroll 2
      for (int j = threadIdx.x % warp_lanes; j < columns; j += warp_lanes) body(i, j);
    __syncthreads();
  }

  // To be called when a base potential or epsilon has changed.
  __device__ __forceinline__ void build(double new_epsilon) {
    epsilon = new_epsilon, scale = log2_e / epsilon;
    if (kept) for_pairs(n, m, [&](int i, int j) { memory.matrix[i * pitch() + j] = made(i, j); });
  }

  // out(i, combination of term(i, j) over the columns): some rows a warp at a time.
  template <class Value, class Combine, class Term, class Out>
  __device__ __forceinline__ void over_rows(Value start, Combine combine, Term term, Out out) const {
    constexpr int together = 4;
    const int lane = threadIdx.x % warp_lanes, step = blockDim.x / warp_lanes * together;
    for (int first = static_cast<int>(threadIdx.x) / warp_lanes * together; first < n; first += step) {
      Value found[together];
      int rows[together];
#pragma unroll
      for (int r = 0; r < together; ++r) {
        found[r] = start;
        rows[r] = first + r < n ? first + r : n - 1;
      }
#pragma unroll 1
      for (int j = lane; j < m; j += warp_lanes)
#pragma unroll
        for (int r = 0; r < together; ++r) found[r] = combine(found[r], term(rows[r], j));
#pragma unroll 1
      for (int distance = warp_lanes / 2; distance; distance /= 2)
#pragma unroll
        for (int r = 0; r < together; ++r) found[r] = combine(found[r], combine.shuffled(found[r], distance));
#pragma unroll
      for (int r = 0; r < together; ++r)
        if (lane == r && first + r < n) out(first + r, found[r]);
    }
    __syncthreads();
  }

  // out(j, combination of term(i, j) over the rows): a column a thread, or several threads where there are few columns.
  template <class Value, class Combine, class Term, class Out>
  __device__ __forceinline__ void over_columns(Value start, Combine combine, Term term, Out out) const {
    const int threads = blockDim.x, thread = threadIdx.x;
    const int width = m < threads ? (m + warp_lanes - 1) / warp_lanes * warp_lanes : threads;
    const int groups = threads / width, group = thread / width;
    for (int first = 0; first < m; first += width) {
      const int j = first + thread % width;
      Value found = start;
      if (group < groups && j < m)
#pragma unroll 2
        for (int i = group; i < n; i += groups) found = combine(found, term(i, j));
      if (groups > 1) {
        memory.partial[thread] = static_cast<double>(found);
        __syncthreads();
        if (group == 0)
          for (int other = 1; other < groups; ++other)
            found = combine(found, static_cast<Value>(memory.partial[other * width + thread]));
      }
      if (group == 0 && j < m) out(j, found);
    }
    __syncthreads();
  }

  // f0_i = min_j C_ij - g_j over the columns with mass, and which rows are empty.
  __device__ __forceinline__ void transform_rows(const double* g) const {
    over_rows(
        -double(INFINITY), Largest<double>{},
        [&](int i, int j) { return b(j) > Real(0) ? g[j] - static_cast<double>(cost_at(i, j)) : -double(INFINITY); },
        [&](int i, double highest) {
          empty_rows[i] = highest > -double(INFINITY) ? Real(0) : Real(1);
          f0[i] = highest > -double(INFINITY) ? -highest : 0.0;
        });
  }

  // g0_j = min_i C_ij - f_i over the rows with mass, and which columns are empty.
  __device__ __forceinline__ void transform_columns(const double* f) const {
    over_columns(
        -double(INFINITY), Largest<double>{},
        [&](int i, int j) { return a(i) > Real(0) ? f[i] - static_cast<double>(cost_at(i, j)) : -double(INFINITY); },
        [&](int j, double highest) {
          empty_columns[j] = highest > -double(INFINITY) ? Real(0) : Real(1);
          g0[j] = highest > -double(INFINITY) ? -highest : 0.0;
        });
  }
};

// One block per problem; K is kept where shared memory can hold it.
template <class Real, class Problem>
std::string launch_transport(const char* name, void (*kernel)(Problem, bool), const Problem& problem, void* stream) {
  constexpr int64_t declared = (most_transport_threads + warp_lanes) * sizeof(double);
  const int64_t pairs = problem.rows * problem.columns;
  const int64_t bytes = problem.rows * (problem.columns | 1) * static_cast<int64_t>(sizeof(Real));
  const bool kept = bytes <= most_shared_bytes() - declared;
  unsigned threads = warp_lanes;
  while (threads < most_transport_threads && threads * 32 < pairs) threads *= 2;
  if (threads > most_transport_threads) threads = most_transport_threads;
  if (kept) {
    const std::string error = allow_all_shared_bytes(name, kernel, declared);
    if (!error.empty()) return error;
  }
  return launch(name, kernel, static_cast<unsigned>(problem.batch), threads, static_cast<size_t>(kept ? bytes : 0),
                static_cast<LaunchStream>(stream), problem, kept);
}

}  // namespace kd::cuda
