// The `divergence` family on NVIDIA GPUs: a block per row, the same formulas as the CPU (csrc/math/divergence.h).
//
// Forward reads both rows once, with online normalisers per thread; mixture and power forms read them again, from the end to
// the start, where the caches still hold them. It leaves what the backward wants per row: maxima, log-sums, and the constants
// H_s and H_t of the gradients. Backward reads each logit once and writes each gradient once; it may write over the logits.
// What reads a row more than once leaves it to divergence_on_chip.cu where shared memory can hold the row.
//
// Where there are few rows, several blocks share each: in the forward the blocks of a cluster (sm_90 and later), which add up
// their sums through each other's shared memory.
//
// Each kernel comes plain, one per divergence, and in a general form for all that is rare: compositions, targets apart, double
// precision. That one takes an entry at a time and looks up the divergence as it goes.
#include "cuda/divergence_on_chip.cuh"
#include "cuda/divergence_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace kd::cuda {
namespace {

constexpr int most_threads = 256;

// Of the plain kernels, so many blocks run side by side on a multiprocessor: it leaves each thread the registers it needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int plain_blocks = 2;  // its compiler keeps more in them
#else
constexpr int plain_blocks = 3;
#endif
template <int number>
constexpr int least_blocks = number == any ? 1 : plain_blocks;

struct Compositions {
  Composition student, teacher;
};

// log2 of 1 / (1 + 2^-z).
template <class Real>
__device__ __forceinline__ Real log2_logistic(Real z) {
  const Real small = math::exp2(z < Real(0) ? z : -z);
  // With u = 2^-|z|, log(1 + u) by its own series: all digits however small u is.
  const Real log_sum = math::log_of_ratio(small / (Real(2) + small)) * static_cast<Real>(log2_e);
  return (z < Real(0) ? z : Real(0)) - log_sum;
}

template <class Real>
struct TargetTerm {
  Real value, student, teacher;  // the divergence of two outcomes, target or not, and its derivatives
};

// From the log-odds (log2) of the target, which come from sums without it: nothing cancels where it has nearly all the mass.
template <class Real>
__device__ __forceinline__ TargetTerm<Real> target_term(Real student_odds, Real teacher_odds) {
  const Real x = teacher_odds, y = student_odds;
  const Real log_q = log2_logistic(y), log_not_q = log2_logistic(-y);
  const Real log_p = log2_logistic(x), log_not_p = log2_logistic(-x);
  const Real p = math::exp2(log_p), not_p = math::exp2(log_not_p);
  const Real value = p * (log_p - log_q) + not_p * (log_not_p - log_not_q);
  const Real difference = x > Real(0) ? not_p - math::exp2(log_not_q) : math::exp2(log_q) - p;
  return {value * static_cast<Real>(log_2), difference, static_cast<Real>(log_2) * p * not_p * (x - y)};
}

// Reads a row from memory as often as it is swept over; the second time from the end, where the caches still hold it.
template <class Real, int entries, bool general>
struct SweepsOverMemory {
  const Stream<Real, entries, general>& student;
  const Stream<Real, entries, general>& teacher;
  Span span;
  bool adjacent;
  int64_t target;

  __device__ __forceinline__ bool left_out(const Columns& columns, bool whole, int i) const {
    return (!whole && !columns.valid(i)) || (general && columns.at(i) == target);
  }

  template <class Body>
  __device__ __forceinline__ void first(Body body) const {
    for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) { step(columns, whole, body); });
  }

  template <class Body>
  __device__ __forceinline__ void again(Body body) const {
    for_steps<entries, true>(span, adjacent, [&](const Columns& columns, bool whole) { step(columns, whole, body); });
  }

 private:
  template <class Body>
  __device__ __forceinline__ void step(const Columns& columns, bool whole, Body body) const {
    Real s[entries], t[entries];
    student.logits.load(columns, whole, s);
    teacher.logits.load(columns, whole, t);
    if constexpr (general) {  // what is left out must not raise a maximum
#pragma unroll
      for (int i = 0; i < entries; ++i)
        if (left_out(columns, whole, i)) s[i] = t[i] = static_cast<Real>(logit_floor);
    }
    body(columns, whole, s, t);
  }
};

template <class Real, int number>
__global__ void __launch_bounds__(most_threads, least_blocks<number>)
    forward_kernel(RowProblem problem, Compositions compositions, bool adjacent) {
  constexpr Kind kind = static_cast<Kind>(number);
  constexpr bool general = number == any;
  constexpr int entries = general ? 1 : most_entries;
  using Sums = ClusterSums<Real, most_sums>;
  KD_SHARED(Real, scratch, Sums::scratch_elements);
  KD_SHARED(Real, published, most_sums);
  const int64_t row = blockIdx.x / cluster_blocks();
  const Span span = part_of_row(problem.vocab, cluster_blocks(), cluster_rank());
  const bool writes = threadIdx.x == 0 && cluster_rank() == 0;
  if (problem.active && !problem.active[row]) {
    if (writes) write_nothing_of_row<Real>(problem, row);
    return;
  }
  Stream<Real, entries, general> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                         &compositions.student);
  Stream<Real, entries, general> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature,
                                         &compositions.teacher);
  const int64_t target = general && problem.targets ? problem.targets[row] : -1;
  const SweepsOverMemory<Real, entries, general> sweeps{student, teacher, span, adjacent, target};
  auto sums = sums_of_row<kind, entries, Real>(problem, row, student, teacher, sweeps, Sums{scratch, published});
  if (!writes) return;
  if constexpr (general) {
    if (problem.targets) sums.value *= of_row<Real>(problem.rest_weight, row);
    if (target >= 0) {
      const Real weight = of_row<Real>(problem.target_weight, row);
      const Real s = student.logits.one(target, problem.vocab), t = teacher.logits.one(target, problem.vocab);
      const auto term = target_term(student.log_probability(s), teacher.log_probability(t));
      sums.value += weight * term.value;
      sums.student_target = weight * term.student, sums.teacher_target = weight * term.teacher;
      const Real gap = s - student.max;
      const Real high = merged_max(sums.hard_log_sum, gap);
      sums.hard_log_sum = high + math::log(math::exp(sums.hard_log_sum - high) + math::exp(gap - high));
    }
  }
  const Real label_logit = problem.labels ? logit_at_label<Real>(problem, row, student) : Real(0);
  write_row<Real>(problem, row, student, teacher, sums, label_logit);
}

template <class Real, int number>
__global__ void __launch_bounds__(most_threads, least_blocks<number>)
    backward_kernel(RowProblem problem, Compositions compositions, bool adjacent) {
  constexpr Kind kind = static_cast<Kind>(number);
  constexpr bool general = number == any;
  constexpr int entries = general ? 1 : most_entries;
  const int64_t row = blockIdx.x;
  const Span span = part_of_row(problem.vocab, static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y));
  if (problem.active && !problem.active[row]) {
    write_zero_gradients<Real, entries>(problem, row, span, adjacent);
    return;
  }
  Stream<Real, entries, general> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                         &compositions.student);
  Stream<Real, entries, general> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature,
                                         &compositions.teacher);
  const Real* const kept = static_cast<const Real*>(problem.statistics) + row * saved_statistics;
  student.max = kept[student_max], student.log_sum = kept[student_log_sum];
  teacher.max = kept[teacher_max], teacher.log_sum = kept[teacher_log_sum];
  RowSums<Real> sums{};
  sums.student_constant = kept[student_constant], sums.teacher_constant = kept[teacher_constant];
  sums.student_target = kept[student_target], sums.teacher_target = kept[teacher_target];
  if (problem.labels) sums.hard_log_sum = kept[hard_log_sum];
  const RowGradients<kind, entries, Real> gradients(problem, row, sums, student, teacher);
  for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries];
    student.logits.load(columns, whole, s);
    teacher.logits.load(columns, whole, t);
    gradients.write(columns, whole, student, teacher, s, t);
  });
}

bool adjacent(const RowProblem& problem, const Compositions& compositions) {
  bool all = aligned_rows(problem);
  for (const Composition* each : {&compositions.student, &compositions.teacher})
    for (int i = 0; i + 1 < each->sources; ++i) all = all && aligned(each->others[i]);
  return all;
}

template <bool forward, class Real, int number>
std::string run(const RowProblem& problem, const Compositions& compositions, void* stream) {
  const bool general = number == any;
  const unsigned rows = static_cast<unsigned>(problem.rows);
  const unsigned blocks = static_cast<unsigned>(blocks_per_row(problem.rows, problem.vocab, multiprocessors()));
  // Sums over a row need a cluster of its blocks; its gradient needs no sums.
  const unsigned cluster = has_clusters() ? blocks : 1;
  return launch(forward ? "divergence_forward" : "divergence_backward",
                forward ? forward_kernel<Real, number> : backward_kernel<Real, number>,
                forward ? Grid(rows * cluster, 1, cluster) : Grid(rows, blocks),
                threads_for(problem.vocab, general ? 1 : most_entries, most_threads), 0,
                static_cast<LaunchStream>(stream), problem, compositions, !general && adjacent(problem, compositions));
}

template <bool forward>
std::string dispatch(const RowProblem& problem, void* stream) {
  Compositions compositions;
  compositions.student.sources = compositions.teacher.sources = 0;  // none
  if (problem.student_composition) compositions.student = *problem.student_composition;
  if (problem.teacher_composition) compositions.teacher = *problem.teacher_composition;
  if (problem.compute_double) return run<forward, double, any>(problem, compositions, stream);
  if (problem.student_composition || problem.teacher_composition || problem.targets)
    return run<forward, float, any>(problem, compositions, stream);
  switch (static_cast<Kind>(problem.kind)) {
#define KD_CASE(name) \
  case Kind::name: return run<forward, float, static_cast<int>(Kind::name)>(problem, compositions, stream);
    KD_FOR_ALL_KINDS(KD_CASE)
#undef KD_CASE
  }
  return "divergence: no such kind";
}

}  // namespace

std::string divergence_forward(const RowProblem& problem, void* stream) {
  return swept_twice(static_cast<Kind>(problem.kind)) && fits_on_chip(problem) ? divergence_on_chip(problem, stream)
                                                                               : dispatch<true>(problem, stream);
}

std::string divergence_backward(const RowProblem& problem, void* stream) { return dispatch<false>(problem, stream); }

std::string divergence_fused(const RowProblem& problem, void* stream) {
  if (fits_on_chip(problem)) return divergence_on_chip(problem, stream);
  const std::string error = dispatch<true>(problem, stream);
  const bool wanted = problem.grad_student.data || problem.grad_teacher.data;
  return error.empty() && wanted ? dispatch<false>(problem, stream) : error;
}

}  // namespace kd::cuda
