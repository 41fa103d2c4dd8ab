// The `token_statistics` family on NVIDIA GPUs: a block per row, every quantity in one sweep.
//
// Each thread keeps the sums of its own entries relative to its own maxima; at the end they are brought to those of the row.
// The kernel comes plain, with vectors of entries, and in a general form for compositions and double precision.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sides.cuh"
#include "math/token_statistics.h"

namespace kd::cuda {
namespace {

// The largest logit and the lowest of the columns that have it.
template <class Real>
struct Peak {
  Real logit;
  int64_t column;
};

template <class Real>
struct HigherPeak {
  __device__ __forceinline__ Peak<Real> operator()(Peak<Real> a, Peak<Real> b) const {
    const bool first = a.logit > b.logit || a.logit != a.logit || (a.logit == b.logit && a.column < b.column);
    return first ? a : b;
  }
  __device__ __forceinline__ Peak<Real> shuffled(Peak<Real> value, int distance) const {
    return {__shfl_xor_sync(full_warp, value.logit, distance), __shfl_xor_sync(full_warp, value.column, distance)};
  }
};

// One side of a row: its stream, and sums in log 2 and relative to the maximum of that.
template <class Real, int entries, bool composed>
struct Side {
  Stream<Real, entries, composed> stream;
  Real weighted = 0;  // sum 2^x x
  Real cross = 0;     // sum 2^x (x - other side)
  int64_t argmax = 0;

  __device__ __forceinline__ Side(const Matrix& matrix, int64_t row, double softcap, const PerRow& temperatures,
                                  const Composition* composition)
      : stream(matrix, row, softcap, temperatures, composition) {
    stream.max = static_cast<Real>(masked_entry);  // below the floor, so that a masked entry may be the first
  }

  // Raises the maximum to that of a step; returns by how much (log2, <= 0) what was relative to it falls.
  __device__ __forceinline__ Real advance(const Columns& columns, bool whole, Real* block) {
    int highest = -1;
    Real top = stream.max;
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      if (!whole && !columns.valid(i)) block[i] = static_cast<Real>(masked_entry);
      if (block[i] > top) top = block[i], highest = i;
    }
    if (highest >= 0) argmax = columns.at(highest);
    return stream.raise(block);
  }

  // Makes the sums relative to a maximum `shift` above; that of the other side falls by `other_shift`.
  __device__ __forceinline__ void fall(Real old_sum, Real shift, Real other_shift) {
    const Real factor = math::exp2(shift);
    weighted = (weighted + old_sum * shift) * factor;
    cross = (cross + old_sum * (shift - other_shift)) * factor;
  }

  __device__ __forceinline__ Real log_probability(int64_t column, int64_t vocab) const {
    return stream.log_probability(stream.logits.one(column, vocab)) * static_cast<Real>(log_2);
  }
};

constexpr int most_threads = 256;

// Blocks that a multiprocessor must have room for: what their registers allow without spilling any.
template <class Real>
constexpr int least_blocks = sizeof(Real) == 8 ? 2 : 3;

template <class Real, bool general>
__global__ void __launch_bounds__(most_threads, least_blocks<Real>)
    token_statistics_kernel(RowProblem problem, Composition of_student, Composition of_teacher, bool adjacent) {
  constexpr int entries = general ? 1 : most_entries;
  constexpr Real to_natural = static_cast<Real>(log_2);
  KD_SHARED(Real, scratch, warp_lanes);
  KD_SHARED(Peak<Real>, student_peaks, warp_lanes);
  KD_SHARED(Peak<Real>, teacher_peaks, warp_lanes);
  const BlockSums<Real> block{scratch};
  const int64_t row = blockIdx.x;
  Real* const out = static_cast<Real*>(problem.statistics) + row * statistics_count;
  int64_t* const argmax = problem.argmax + row * 2;
  if (problem.active && !problem.active[row]) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < statistics_count; ++i) out[i] = 0;
      argmax[0] = argmax[1] = 0;
    }
    return;
  }
  const bool pair = problem.teacher.data;
  Side<Real, entries, general> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                       &of_student);
  Side<Real, entries, general> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature,
                                       &of_teacher);
  for_steps<entries>(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries];
    student.stream.logits.load(columns, whole, s);
    const Real student_sum = student.stream.sum, teacher_sum = teacher.stream.sum;
    const Real student_shift = student.advance(columns, whole, s);
    Real teacher_shift = 0;
    if (pair) {
      teacher.stream.logits.load(columns, whole, t);
      teacher_shift = teacher.advance(columns, whole, t);
      teacher.fall(teacher_sum, teacher_shift, student_shift);
    }
    student.fall(student_sum, student_shift, teacher_shift);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      if (!whole && !columns.valid(i)) continue;
      const Real x = student.stream.exponent(s[i]), exp_x = math::exp2(x);
      student.stream.sum += exp_x;
      student.weighted += exp_x * x;
      if (!pair) continue;
      const Real y = teacher.stream.exponent(t[i]), exp_y = math::exp2(y);
      teacher.stream.sum += exp_y;
      teacher.weighted += exp_y * y;
      student.cross += exp_x * (x - y);
      teacher.cross += exp_y * (y - x);
    }
  });

  // The threads' states become the row's.
  const HigherPeak<Real> higher;
  const auto top_s = over_block(Peak<Real>{student.stream.max, student.argmax}, student_peaks, higher);
  const auto top_t = over_block(Peak<Real>{teacher.stream.max, teacher.argmax}, teacher_peaks, higher);
  const Real shift_s = (student.stream.max - top_s.logit) * student.stream.scale;
  const Real shift_t = pair ? (teacher.stream.max - top_t.logit) * teacher.stream.scale : Real(0);
  student.fall(student.stream.sum, shift_s, shift_t);
  teacher.fall(teacher.stream.sum, shift_t, shift_s);
  student.stream.max = top_s.logit, teacher.stream.max = top_t.logit;
  const Real sum_s = block.total(student.stream.sum * math::exp2(shift_s));
  const Real weighted_s = block.total(student.weighted);
  Real sum_t = 1, weighted_t = 0, cross_s = 0, cross_t = 0;
  if (pair) {
    sum_t = block.total(teacher.stream.sum * math::exp2(shift_t)), weighted_t = block.total(teacher.weighted);
    cross_s = block.total(student.cross), cross_t = block.total(teacher.cross);
  }
  if (threadIdx.x != 0) return;
  const Real log_s = math::log(sum_s), log_t = math::log(sum_t), none = static_cast<Real>(NAN);
  student.stream.log_sum = log_s * static_cast<Real>(log2_e),
  teacher.stream.log_sum = log_t * static_cast<Real>(log2_e);
  const int64_t label = problem.labels ? problem.labels[row] : -1;
  const bool labelled = label >= 0 && label < problem.vocab;
  out[lse_student] = top_s.logit / student.stream.temperature + log_s;
  out[lse_teacher] = pair ? top_t.logit / teacher.stream.temperature + log_t : none;
  out[forward_kl] = pair ? cross_t / sum_t * to_natural - (log_t - log_s) : none;
  out[reverse_kl] = pair ? cross_s / sum_s * to_natural + (log_t - log_s) : none;
  out[entropy_student] = log_s - weighted_s / sum_s * to_natural;
  out[entropy_teacher] = pair ? log_t - weighted_t / sum_t * to_natural : none;
  out[max_student] = top_s.logit;
  out[max_teacher] = pair ? top_t.logit : none;
  out[label_student] = labelled ? student.log_probability(label, problem.vocab) : none;
  out[label_teacher] = labelled && pair ? teacher.log_probability(label, problem.vocab) : none;
  argmax[0] = top_s.column, argmax[1] = top_t.column;
}

template <class Real, bool general>
std::string run(const RowProblem& problem, const Composition& student, const Composition& teacher, void* stream) {
  const bool adjacent = !general && aligned(problem.student) && aligned(problem.teacher);
  return launch("token_statistics", token_statistics_kernel<Real, general>, static_cast<unsigned>(problem.rows),
                threads_for(problem.vocab, general ? 1 : most_entries, most_threads), 0,
                static_cast<LaunchStream>(stream), problem, student, teacher, adjacent);
}

}  // namespace

std::string token_statistics(const RowProblem& problem, void* stream) {
  if (!problem.rows) return {};
  Composition student, teacher;
  student.sources = teacher.sources = 0;  // none
  if (problem.student_composition) student = *problem.student_composition;
  if (problem.teacher_composition) teacher = *problem.teacher_composition;
  if (problem.compute_double) return run<double, true>(problem, student, teacher, stream);
  if (problem.student_composition || problem.teacher_composition)
    return run<float, true>(problem, student, teacher, stream);
  return run<float, false>(problem, student, teacher, stream);
}

}  // namespace kd::cuda
