// The `pairwise_l1` family on NVIDIA GPUs: sums over the vocabulary of |x - y| for every softmax row x of one side and y of the
// other, and their gradient.
//
// Distances: a block owns a tile of pairs and a part of the vocabulary. Step by step it makes the probabilities of all rows of
// its tile, once, in shared memory; there groups of 64 threads take columns of their own, each thread a few pairs in its
// registers. Sums over one step go into two numbers that hold twice the digits: beside a probability near 1 every small one
// that is added costs a rounding. The sums of the parts are the caller's to add.
//
// Gradients: a block owns some rows of one side and some columns, and meets the other side's rows a few at a time.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sides.cuh"

namespace kd::cuda {
namespace {

constexpr int block_threads = 256;
constexpr int warps = block_threads / warp_lanes;

// Rows of one side next to each other: one access to shared memory.
template <class Real, int count>
struct alignas(sizeof(Real) * count < 16 ? sizeof(Real) * count : 16) Several {
  Real of[count];
};

template <class Real>
using OneSide = Stream<Real, 1, false>;

template <class Real>
__device__ __forceinline__ OneSide<Real> side_of(const PairSide& side, int64_t row) {
  OneSide<Real> stream(side.logits, row, side.softcap, {nullptr, side.temperature}, nullptr);
  stream.max = static_cast<const Real*>(side.normalisers)[2 * row];
  return stream;
}

template <class Real>
__device__ __forceinline__ Real factor_of(const PairSide& side, int64_t row) {
  return Real(1) / static_cast<const Real*>(side.normalisers)[2 * row + 1];
}

// The largest logit is subtracted first, so that its own exponential is exactly 1, and the softmax of a single entry too.
template <class Real>
__device__ __forceinline__ Real probability_of(const OneSide<Real>& stream, Real factor, int64_t column) {
  return math::exp2(stream.exponent(stream.logits.one(column, 0))) * factor;
}

// A sum in two numbers, the second of which is what the first has lost.
template <class Real>
struct LongSum {
  Real sum, lost;

  // Knuth's TwoSum: exact whichever is larger.
  __device__ __forceinline__ void add(Real x) {
    const Real total = sum + x, of_x = total - sum;
    lost += (sum - (total - of_x)) + (x - of_x);
    sum = total;
  }
  __device__ __forceinline__ Real value() const { return sum + lost; }
};

template <class Real>
__global__ void __launch_bounds__(512) normalisers_kernel(PairNormalisers problem, bool adjacent) {
  KD_SHARED(Real, scratch, warp_lanes);
  const BlockSums<Real> block{scratch};
  const int64_t row = blockIdx.x;
  Stream<Real, most_entries, false> stream(problem.logits, row, problem.softcap, {nullptr, problem.temperature},
                                           nullptr);
  for_steps<most_entries>(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
    Real logits[most_entries];
    stream.logits.load(columns, whole, logits);
    stream.raise(logits);
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < most_entries; ++i)
      if (whole || columns.valid(i)) sum += math::exp2(stream.exponent(logits[i]));
    stream.sum += sum;
  });
  const Real max = block.max(stream.max);
  const Real sum = block.total(stream.sum * math::exp2((stream.max - max) * stream.scale));
  if (threadIdx.x != 0) return;
  Real* const result = static_cast<Real*>(problem.normalisers) + 2 * row;
  result[0] = max, result[1] = sum;
}

// --- distances ------------------------------------------------------------------------------------------------------

constexpr int side_threads = 8;  // of a group, along either side of its pairs
constexpr int groups = block_threads / (side_threads * side_threads);
constexpr int step_columns = 128;

template <class Real, bool signs>
struct PairShape {
  static constexpr int rows = sizeof(Real) == 4 ? 4 : 2;  // of a thread
  static constexpr int columns = sizeof(Real) == 4 && !signs ? 4 : 2;
};

// The probabilities of a step for the rows of a tile, of which each warp has some; 0 where there is no logit.
template <class Real, int count>
__device__ __forceinline__ void make_tile(const PairSide& side, int64_t problem, int64_t first, int64_t column,
                                          int64_t end, SharedView<Several<Real, count>> tile) {
  static_assert(warps == side_threads);
  constexpr int steps = step_columns / warp_lanes;
  const int lane = threadIdx.x % warp_lanes, warp = threadIdx.x / warp_lanes;
  Several<Real, count> made[steps] = {};
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int64_t in_problem = first + warp * count + i, row = problem * side.rows + in_problem;
    if (in_problem >= side.rows) continue;
    const auto stream = side_of<Real>(side, row);
    const Real factor = factor_of<Real>(side, row);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      const int64_t at = column + k * warp_lanes + lane;
      if (at < end) made[k].of[i] = probability_of(stream, factor, at);
    }
  }
#pragma unroll
  for (int k = 0; k < steps; ++k) tile[(k * warp_lanes + lane) * (side_threads + 1) + warp] = made[k];
}

template <class Real, bool signs>
__global__ void __launch_bounds__(block_threads) distance_kernel(PairProblem problem) {
  using Shape = PairShape<Real, signs>;
  using Xs = Several<Real, Shape::rows>;
  using Ys = Several<Real, Shape::columns>;
  constexpr int tile_rows = side_threads * Shape::rows, tile_columns = side_threads * Shape::columns;
  KD_SHARED(Xs, xs, step_columns * (side_threads + 1));
  KD_SHARED(Ys, ys, step_columns * (side_threads + 1));
  const int64_t column_tiles = (problem.teacher.rows + tile_columns - 1) / tile_columns;
  const int64_t tiles = (problem.student.rows + tile_rows - 1) / tile_rows * column_tiles;
  const int64_t tile = blockIdx.x % tiles, index = blockIdx.x / tiles % problem.problems,
                part = blockIdx.x / (tiles * problem.problems);
  const int64_t first_row = tile / column_tiles * tile_rows, first_column = tile % column_tiles * tile_columns;
  const int64_t steps = (problem.vocab + step_columns - 1) / step_columns;
  const int64_t bound = steps * (part + 1) / problem.parts * step_columns;
  const int64_t end = bound < problem.vocab ? bound : problem.vocab;

  const int thread = threadIdx.x, group = thread / (side_threads * side_threads);
  const int x_place = thread / side_threads % side_threads, y_place = thread % side_threads;
  LongSum<Real> sums[Shape::rows][Shape::columns] = {}, masses[signs ? Shape::rows : 1][Shape::columns] = {};
  for (int64_t column = steps * part / problem.parts * step_columns; column < end; column += step_columns) {
    make_tile<Real, Shape::rows>(problem.student, index, first_row, column, end, xs);
    make_tile<Real, Shape::columns>(problem.teacher, index, first_column, column, end, ys);
    __syncthreads();
    Real sum[Shape::rows][Shape::columns] = {}, mass[signs ? Shape::rows : 1][Shape::columns] = {};
#pragma unroll 4
    for (int k = group * (step_columns / groups); k < (group + 1) * (step_columns / groups); ++k) {
      const Xs x = xs[k * (side_threads + 1) + x_place];
      const Ys y = ys[k * (side_threads + 1) + y_place];
#pragma unroll
      for (int r = 0; r < Shape::rows; ++r)
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
          const Real difference = x.of[r] - y.of[c];
          sum[r][c] += std::fabs(difference);
          if constexpr (signs) mass[r][c] += difference == Real(0) ? Real(0) : std::copysign(x.of[r], difference);
        }
    }
#pragma unroll
    for (int r = 0; r < Shape::rows; ++r)
#pragma unroll
      for (int c = 0; c < Shape::columns; ++c) {
        sums[r][c].add(sum[r][c]);
        if constexpr (signs) masses[r][c].add(mass[r][c]);
      }
    __syncthreads();
  }

  // The groups' sums together, in their order.
  const auto store = [&](const LongSum<Real>(&own)[Shape::rows][Shape::columns], void* result) {
#pragma unroll
    for (int c = 0; c < Shape::columns; ++c) {
      Xs column;
#pragma unroll
      for (int r = 0; r < Shape::rows; ++r) column.of[r] = own[r][c].value();
      xs[thread * Shape::columns + c] = column;
    }
    __syncthreads();
    if (group == 0) {
      for (int c = 0; c < Shape::columns; ++c) {
        LongSum<Real> totals[Shape::rows] = {};
        for (int g = 0; g < groups; ++g) {
          const Xs part_of = xs[(g * side_threads * side_threads + thread) * Shape::columns + c];
#pragma unroll
          for (int r = 0; r < Shape::rows; ++r) totals[r].add(part_of.of[r]);
        }
        const int64_t j = first_column + y_place * Shape::columns + c;
#pragma unroll
        for (int r = 0; r < Shape::rows; ++r) {
          const int64_t i = first_row + x_place * Shape::rows + r;
          if (i < problem.student.rows && j < problem.teacher.rows)
            static_cast<Real*>(
                result)[((part * problem.problems + index) * problem.student.rows + i) * problem.teacher.rows + j] =
                totals[r].value();
        }
      }
    }
    __syncthreads();
  };
  static_assert(block_threads * Shape::columns <= step_columns * (side_threads + 1));
  store(sums, problem.distance);
  if constexpr (signs) store(masses, problem.signed_mass);
}

// --- gradients ------------------------------------------------------------------------------------------------------

// Of a block: a warp has some rows, a thread some columns of these.
constexpr int warp_rows = 4, lane_columns = 2;
constexpr int own_rows = warps * warp_rows, own_columns = warp_lanes * lane_columns;
constexpr int met_rows = 16;  // of the other side at a time

template <class Real>
__global__ void __launch_bounds__(block_threads, 2)
    gradient_kernel(PairProblem problem, bool to_student, double inverse_temperature) {
  using Weights = Several<Real, warp_rows>;
  KD_SHARED(Real, ys, met_rows * own_columns);
  KD_SHARED(Weights, weights, met_rows * warps);
  const PairSide own = to_student ? problem.student : problem.teacher;
  const PairSide other = to_student ? problem.teacher : problem.student;
  const int64_t row_tiles = (own.rows + own_rows - 1) / own_rows;
  const int64_t index = blockIdx.x / row_tiles % problem.problems;
  const int64_t first_column = blockIdx.x / (row_tiles * problem.problems) * own_columns;
  const int thread = threadIdx.x, lane = thread % warp_lanes, warp = thread / warp_lanes;
  const int64_t first_row = blockIdx.x % row_tiles * own_rows, first = first_row + warp * warp_rows;
  const int64_t row_step = to_student ? problem.teacher.rows : 1, other_step = to_student ? 1 : problem.teacher.rows;
  const Real* const grad = static_cast<const Real*>(problem.grad) + index * own.rows * other.rows;

  Real x[warp_rows][lane_columns] = {}, sums[warp_rows][lane_columns] = {};
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    if (first + r >= own.rows) continue;
    const int64_t row = index * own.rows + first + r;
    const auto stream = side_of<Real>(own, row);
    const Real factor = factor_of<Real>(own, row);
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int64_t column = first_column + c * warp_lanes + lane;
      if (column < problem.vocab) x[r][c] = probability_of(stream, factor, column);
    }
  }
  for (int64_t met = 0; met < other.rows; met += met_rows) {
    for (int k = thread; k < met_rows * own_columns; k += block_threads) {
      const int64_t j = met + k / own_columns, column = first_column + k % own_columns;
      Real y = 0;
      if (j < other.rows && column < problem.vocab) {
        const int64_t row = index * other.rows + j;
        y = probability_of(side_of<Real>(other, row), factor_of<Real>(other, row), column);
      }
      ys[k] = y;
    }
    for (int k = thread; k < met_rows * warps; k += block_threads) {
      const int64_t j = met + k / warps, i = first_row + k % warps * warp_rows;
      Weights of_rows;
#pragma unroll
      for (int r = 0; r < warp_rows; ++r)
        of_rows.of[r] = j < other.rows && i + r < own.rows ? grad[j * other_step + (i + r) * row_step] : Real(0);
      weights[k] = of_rows;
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < met_rows; ++j) {
      const Weights of_rows = weights[j * warps + warp];
#pragma unroll
      for (int c = 0; c < lane_columns; ++c) {
        const Real y = ys[j * own_columns + c * warp_lanes + lane];
#pragma unroll
        for (int r = 0; r < warp_rows; ++r) {
          const Real difference = x[r][c] - y;
          sums[r][c] += difference == Real(0) ? Real(0) : std::copysign(Real(1), difference) * of_rows.of[r];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < warp_rows; ++r) {
    if (first + r >= own.rows) continue;
    const int64_t row = index * own.rows + first + r;
    const auto stream = side_of<Real>(own, row);
    const Stored<Real> gradient(own.gradient, row);
    const Real centre = static_cast<const Real*>(own.centres)[row];
#pragma unroll
    for (int c = 0; c < lane_columns; ++c) {
      const int64_t column = first_column + c * warp_lanes + lane;
      if (column >= problem.vocab) continue;
      const Real made = x[r][c] * (sums[r][c] - centre) * static_cast<Real>(inverse_temperature);
      gradient.store_one(column, stream.through_clamp_and_softcap(made, stream.logits.one(column, problem.vocab)));
    }
  }
}

template <class Real, bool signs>
std::string run_distances(const PairProblem& problem, void* stream) {
  using Shape = PairShape<Real, signs>;
  const int64_t tile_rows = side_threads * Shape::rows, tile_columns = side_threads * Shape::columns;
  const int64_t tiles =
      (problem.student.rows + tile_rows - 1) / tile_rows * ((problem.teacher.rows + tile_columns - 1) / tile_columns);
  return launch("pairwise_l1_forward", distance_kernel<Real, signs>,
                static_cast<unsigned>(problem.parts * problem.problems * tiles), block_threads, 0,
                static_cast<LaunchStream>(stream), problem);
}

template <class Real>
std::string run_gradient(const PairProblem& problem, bool to_student, void* stream) {
  const PairSide& own = to_student ? problem.student : problem.teacher;
  if (!own.gradient.data) return {};
  const int64_t row_tiles = (own.rows + own_rows - 1) / own_rows;
  const int64_t column_tiles = (problem.vocab + own_columns - 1) / own_columns;
  return launch("pairwise_l1_backward", gradient_kernel<Real>,
                static_cast<unsigned>(problem.problems * row_tiles * column_tiles), block_threads, 0,
                static_cast<LaunchStream>(stream), problem, to_student, 1 / own.temperature);
}

template <class Real>
std::string run(const PairProblem& problem, void* stream) {
  if (!problem.grad)
    return problem.signed_mass ? run_distances<Real, true>(problem, stream)
                               : run_distances<Real, false>(problem, stream);
  // Each gradient asks for the logits of both sides: the one that is written over its own comes last.
  const bool student_first = problem.student.gradient.data != problem.student.logits.data;
  const std::string error = run_gradient<Real>(problem, student_first, stream);
  return error.empty() ? run_gradient<Real>(problem, !student_first, stream) : error;
}

template <class Real>
std::string normalise(const PairNormalisers& problem, void* stream) {
  return launch("pairwise_normalisers", normalisers_kernel<Real>, static_cast<unsigned>(problem.rows),
                threads_for(problem.vocab), 0, static_cast<LaunchStream>(stream), problem, aligned(problem.logits));
}

}  // namespace

std::string pairwise_normalisers(const PairNormalisers& problem, void* stream) {
  if (problem.rows == 0) return {};
  return problem.compute_double ? normalise<double>(problem, stream) : normalise<float>(problem, stream);
}

std::string pairwise_l1(const PairProblem& problem, void* stream) {
  return problem.compute_double ? run<double>(problem, stream) : run<float>(problem, stream);
}

}  // namespace kd::cuda
