// The `divergence` family on NVIDIA GPUs: a block per row, the same formulas as the CPU (csrc/math/divergence.h).
//
// Forward reads both rows once, with online normalisers per thread; mixture and power forms read them again, from the end to
// the start, where the caches still hold them. It leaves what the backward wants per row: maxima, log-sums, and the constants
// H_s and H_t of the gradients. Backward reads each logit once and writes each gradient once; it may write over the logits.
//
// Where there are few rows, several blocks share each: in the forward the blocks of a cluster (sm_90 and later), which add up
// their sums through each other's shared memory.
//
// Each kernel comes plain, one per divergence, and in a general form for all that is rare: compositions, targets apart, double
// precision. That one takes an entry at a time and looks up the divergence as it goes.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sides.cuh"

namespace kd::cuda {
namespace {

// What the forward leaves of a row.
enum Saved {
  student_max,
  student_log_sum,  // log2
  teacher_max,
  teacher_log_sum,
  student_constant,
  teacher_constant,
  hard_log_sum,    // of the student at temperature 1, for the cross-entropy
  student_target,  // derivatives of the target's own term, with its weight
  teacher_target,
};
static_assert(teacher_target + 1 == saved_statistics);

// In the place of a kind: it is known when the kernel runs. Kernels take numbers, because nvcc's stubs refuse an enumeration's
// value without a name.
constexpr int any = -1;
constexpr Kind any_kind = static_cast<Kind>(any);

constexpr int most_threads = 256;

// Of the plain kernels, so many blocks run side by side on a multiprocessor: it leaves each thread the registers it needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int plain_blocks = 2;  // its compiler keeps more in them
#else
constexpr int plain_blocks = 3;
#endif
template <int number>
constexpr int least_blocks = number == any ? 1 : plain_blocks;

// Those that are sums of terms.
#define KD_FOR_ADDITIVE_KINDS(KD_CASE) \
  KD_CASE(forward_kl)                  \
  KD_CASE(reverse_kl)                  \
  KD_CASE(jeffreys)                    \
  KD_CASE(jsd)                         \
  KD_CASE(skew_forward_kl)             \
  KD_CASE(skew_reverse_kl)             \
  KD_CASE(total_variation)             \
  KD_CASE(alpha)                       \
  KD_CASE(alpha_beta)                  \
  KD_CASE(soft_cross_entropy)

struct Compositions {
  Composition student, teacher;
};

template <class Real>
__device__ __forceinline__ Real parameter_of(const RowProblem& problem, int64_t row) {
  return problem.parameters ? static_cast<const Real*>(problem.parameters)[row] : static_cast<Real>(problem.a);
}

// h_s, h_t and f at an entry, for the forms that take two sweeps. Logarithms are natural.
template <Kind kind, class Real>
__device__ __forceinline__ math::Terms<Real> terms_at(Real log_p, Real log_q, Real a, Real b) {
  const Real p = math::exp(log_p), q = math::exp(log_q);
  if constexpr (math::Traits<kind>::logs_for_terms) {
    constexpr bool own = kind == Kind::alpha_beta;
    const auto power = [&](Real x, Real y) { return math::exp(math::cross_exponent<kind>(x, y, a, b)); };
    return math::power_terms<kind, Real>(own ? power(log_p, log_p) : p, own ? power(log_q, log_q) : q,
                                         power(log_p, log_q), a, b);
  } else {
    auto h = math::terms<kind, Real>(p, q, log_p, log_q, a);
    // Without skew, which a row of its own may have, the mixture is the other distribution also where that underflows.
    if (kind == Kind::skew_forward_kl && a == Real(0)) {
      h = math::terms<Kind::forward_kl, Real>(p, q, log_p, log_q, a);
      h.value = h.teacher;
    }
    if (kind == Kind::skew_reverse_kl && a == Real(0)) {
      h = math::terms<Kind::reverse_kl, Real>(p, q, log_p, log_q, a);
      h.value = h.student;
    }
    return h;
  }
}

// The same of a kind that may be known only now.
template <Kind kind, class Real>
__device__ __forceinline__ math::Terms<Real> terms_of(Kind now, Real log_p, Real log_q, Real a, Real b) {
  if constexpr (kind == Kind::renyi) {
    return {};  // it is no sum of terms
  } else if constexpr (kind != any_kind) {
    return terms_at<kind, Real>(log_p, log_q, a, b);
  } else {
    switch (now) {
#define KD_CASE(name) \
  case Kind::name: return terms_at<Kind::name, Real>(log_p, log_q, a, b);
      KD_FOR_ADDITIVE_KINDS(KD_CASE)
#undef KD_CASE
      default: return {};
    }
  }
}

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

template <class Real, int number>
__global__ void __launch_bounds__(most_threads, least_blocks<number>)
    forward_kernel(RowProblem problem, Compositions compositions, bool adjacent) {
  constexpr Kind kind = static_cast<Kind>(number);
  constexpr bool general = number == any;
  constexpr int entries = general ? 1 : most_entries;
  const Kind now = general ? static_cast<Kind>(problem.kind) : kind;
  const bool forward_sum = now == Kind::forward_kl || now == Kind::jeffreys;
  const bool student_sum = now == Kind::soft_cross_entropy;
  const bool reverse_sum = now == Kind::reverse_kl || now == Kind::jeffreys;
  constexpr Real to_natural = static_cast<Real>(log_2), to_binary = static_cast<Real>(log2_e);
  KD_SHARED(Real, scratch, warp_lanes);
  KD_SHARED(Real, published, 1);
  const ClusterSums<Real> block{scratch, published};
  const int64_t row = blockIdx.x / cluster_blocks();
  const Span span = part_of_row(problem.vocab, cluster_blocks(), cluster_rank());
  Real* const divergence = static_cast<Real*>(problem.divergence);
  Real* const cross_entropy = static_cast<Real*>(problem.cross_entropy);
  if (problem.active && !problem.active[row]) {
    if (threadIdx.x == 0 && cluster_rank() == 0) {
      divergence[row] = 0;
      if (problem.labels) cross_entropy[row] = 0;
    }
    return;
  }
  Stream<Real, entries, general> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                         &compositions.student);
  Stream<Real, entries, general> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature,
                                         &compositions.teacher);
  const Real a = parameter_of<Real>(problem, row), b = static_cast<Real>(problem.b);
  const int64_t target = general && problem.targets ? problem.targets[row] : -1;
  const auto left_out = [&](const Columns& columns, bool whole, int i) {
    return (!whole && !columns.valid(i)) || (general && columns.at(i) == target);
  };
  // What is left out must not raise a maximum.
  const auto load = [&](const Columns& columns, bool whole, Real* s, Real* t) {
    student.logits.load(columns, whole, s);
    teacher.logits.load(columns, whole, t);
    if constexpr (general) {
#pragma unroll
      for (int i = 0; i < entries; ++i)
        if (left_out(columns, whole, i)) s[i] = t[i] = static_cast<Real>(logit_floor);
    }
  };

  Real forward = 0, reverse = 0, hard = 0;
  const bool hard_apart = problem.labels && student.temperature != Real(1);
  for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries];
    load(columns, whole, s, t);
    const Real old_student_sum = student.sum, old_teacher_sum = teacher.sum, old_max = student.max;
    const Real student_shift = student.raise(s), teacher_shift = teacher.raise(t);
    if (forward_sum)
      forward = (forward + old_teacher_sum * (teacher_shift - student_shift)) * math::exp2(teacher_shift);
    if (student_sum) forward = (forward - old_teacher_sum * student_shift) * math::exp2(teacher_shift);
    if (reverse_sum)
      reverse = (reverse + old_student_sum * (student_shift - teacher_shift)) * math::exp2(student_shift);
    if (hard_apart) hard *= math::exp2((old_max - student.max) * to_binary);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      if (left_out(columns, whole, i)) continue;
      const Real x = student.exponent(s[i]), y = teacher.exponent(t[i]);
      const Real exp_x = math::exp2(x), exp_y = math::exp2(y);
      student.sum += exp_x;
      teacher.sum += exp_y;
      if (forward_sum) forward += exp_y * (y - x);
      if (student_sum) forward -= exp_y * x;
      if (reverse_sum) reverse += exp_x * (x - y);
      if (hard_apart) hard += math::exp2((s[i] - student.max) * to_binary);
    }
  });

  // The threads' states become the row's.
  const Real max_s = block.max(student.max), max_t = block.max(teacher.max);
  const Real shift_s = (student.max - max_s) * student.scale, shift_t = (teacher.max - max_t) * teacher.scale;
  if (forward_sum) forward = (forward + teacher.sum * (shift_t - shift_s)) * math::exp2(shift_t);
  if (student_sum) forward = (forward - teacher.sum * shift_s) * math::exp2(shift_t);
  if (reverse_sum) reverse = (reverse + student.sum * (shift_s - shift_t)) * math::exp2(shift_s);
  if (hard_apart) hard *= math::exp2((student.max - max_s) * to_binary);
  const Real sum_s = block.total(student.sum * math::exp2(shift_s));
  const Real sum_t = block.total(teacher.sum * math::exp2(shift_t));
  student.max = max_s, teacher.max = max_t;
  student.log_sum = math::log(sum_s) * to_binary, teacher.log_sum = math::log(sum_t) * to_binary;
  if (forward_sum) forward = (block.total(forward) / sum_t - (teacher.log_sum - student.log_sum)) * to_natural;
  if (student_sum) forward = (block.total(forward) / sum_t + student.log_sum) * to_natural;
  if (reverse_sum) reverse = (block.total(reverse) / sum_s - (student.log_sum - teacher.log_sum)) * to_natural;
  const Real hard_sum = hard_apart ? block.total(hard) : sum_s;

  Real value, constant_s, constant_t;
  if (now == Kind::forward_kl || now == Kind::soft_cross_entropy) {
    value = forward, constant_s = -1, constant_t = forward;
  } else if (now == Kind::reverse_kl) {
    value = reverse, constant_s = reverse, constant_t = -1;
  } else if (now == Kind::jeffreys) {
    value = a * forward + (1 - a) * reverse;
    constant_s = (1 - a) * reverse - a, constant_t = a * forward - (1 - a);
  } else {
    Real sum_student = 0, sum_teacher = 0, sum_value = 0;
    Online<Real> affinity{static_cast<Real>(masked_entry), 0};  // of exponents that no floor bounds
    for_steps<entries, true>(span, adjacent, [&](const Columns& columns, bool whole) {
      Real s[entries], t[entries];
      load(columns, whole, s, t);
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        if (left_out(columns, whole, i)) continue;
        const Real log_q = student.log_probability(s[i]) * to_natural;
        const Real log_p = teacher.log_probability(t[i]) * to_natural;
        if (now == Kind::renyi) {
          affinity = merged<Real>(affinity, {a * log_p + (1 - a) * log_q, 1}, to_binary);
        } else {
          const auto h = terms_of<kind, Real>(now, log_p, log_q, a, b);
          sum_student += h.student, sum_teacher += h.teacher, sum_value += h.value;
        }
      }
    });
    if (now == Kind::renyi) {
      const Real highest = block.max(affinity.max);
      const Real sum = block.total(affinity.sum * math::exp(affinity.max - highest));
      constant_s = constant_t = highest + math::log(sum);
      value = constant_s / (a - 1);
    } else {
      constant_s = block.total(sum_student), constant_t = block.total(sum_teacher);
      const Real whole_value = block.total(sum_value);
      value = now == Kind::skew_forward_kl || now == Kind::skew_reverse_kl ? whole_value : constant_s + constant_t;
      if (now == Kind::alpha_beta) value /= a + b;
    }
  }

  if (threadIdx.x != 0 || cluster_rank() != 0) return;
  Real* const kept = static_cast<Real*>(problem.statistics) + row * saved_statistics;
  kept[student_max] = student.max, kept[student_log_sum] = student.log_sum;
  kept[teacher_max] = teacher.max, kept[teacher_log_sum] = teacher.log_sum;
  kept[student_constant] = constant_s, kept[teacher_constant] = constant_t;
  kept[student_target] = kept[teacher_target] = 0;
  if constexpr (general) {
    if (problem.targets) value *= of_row<Real>(problem.rest_weight, row);
    if (target >= 0) {
      const Real weight = of_row<Real>(problem.target_weight, row);
      const auto term = target_term(student.log_probability(student.logits.one(target, problem.vocab)),
                                    teacher.log_probability(teacher.logits.one(target, problem.vocab)));
      value += weight * term.value;
      kept[student_target] = weight * term.student, kept[teacher_target] = weight * term.teacher;
    }
  }
  divergence[row] = value;
  if (!problem.labels) return;
  Real log_hard = math::log(hard_sum);
  if (general && target >= 0) {
    const Real gap = student.logits.one(target, problem.vocab) - student.max;
    const Real high = merged_max(log_hard, gap);
    log_hard = high + math::log(math::exp(log_hard - high) + math::exp(gap - high));
  }
  kept[hard_log_sum] = log_hard;
  const int64_t label = problem.labels[row];
  const bool inside = label >= 0 && label < problem.vocab;
  cross_entropy[row] = inside ? log_hard - (student.logits.one(label, problem.vocab) - student.max) : Real(NAN);
}

// tau_s times the gradient to the student's logit at an entry, and tau_t times that to the teacher's. Logarithms are natural.
template <Kind kind, class Real>
__device__ __forceinline__ void gradients_at(Kind now, Real log_p, Real log_q, Real constant_s, Real constant_t, Real a,
                                             Real b, Real& to_student, Real& to_teacher) {
  const Real p = math::exp(log_p), q = math::exp(log_q);
  if (now == Kind::renyi) {
    const Real r = math::exp(a * log_p + (1 - a) * log_q - constant_s);
    to_student = q - r, to_teacher = a / (a - 1) * (r - p);
  } else {
    const auto h = terms_of<kind, Real>(now, log_p, log_q, a, b);
    to_student = h.student - q * constant_s, to_teacher = h.teacher - p * constant_t;
  }
}

template <class Real, int number>
__global__ void __launch_bounds__(most_threads, least_blocks<number>)
    backward_kernel(RowProblem problem, Compositions compositions, bool adjacent) {
  constexpr Kind kind = static_cast<Kind>(number);
  constexpr bool general = number == any;
  constexpr int entries = general ? 1 : most_entries;
  constexpr Real to_natural = static_cast<Real>(log_2), to_binary = static_cast<Real>(log2_e);
  const Kind now = general ? static_cast<Kind>(problem.kind) : kind;
  const int64_t row = blockIdx.x;
  const Span span = part_of_row(problem.vocab, static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y));
  const Stored<Real> to_student(problem.grad_student, row), to_teacher(problem.grad_teacher, row);
  if (problem.active && !problem.active[row]) {
    for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
      const Real zeros[entries] = {};
      to_student.template store<entries>(columns, whole, zeros);
      to_teacher.template store<entries>(columns, whole, zeros);
    });
    return;
  }
  Stream<Real, entries, general> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                         &compositions.student);
  Stream<Real, entries, general> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature,
                                         &compositions.teacher);
  const Real* const kept = static_cast<const Real*>(problem.statistics) + row * saved_statistics;
  student.max = kept[student_max], student.log_sum = kept[student_log_sum];
  teacher.max = kept[teacher_max], teacher.log_sum = kept[teacher_log_sum];
  const Real constant_s = kept[student_constant], constant_t = kept[teacher_constant];
  const Real a = parameter_of<Real>(problem, row), b = static_cast<Real>(problem.b);
  const Real upstream = of_row<Real>(problem.grad_divergence, row);
  const Real student_factor = upstream / student.temperature, teacher_factor = upstream / teacher.temperature;
  const bool hard = problem.labels && to_student.data;
  const Real hard_factor = hard ? of_row<Real>(problem.grad_cross_entropy, row) : Real(0);
  const Real log_hard = hard ? kept[hard_log_sum] * to_binary : Real(0);
  const int64_t label = hard ? problem.labels[row] : -1;
  const int64_t target = general && problem.targets ? problem.targets[row] : -1;
  const Real rest_weight = general && problem.targets ? of_row<Real>(problem.rest_weight, row) : Real(1);
  for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
    Real s[entries], t[entries], g_s[entries], g_t[entries];
    student.logits.load(columns, whole, s);
    teacher.logits.load(columns, whole, t);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const Real log_q = student.log_probability(s[i]) * to_natural;
      const Real log_p = teacher.log_probability(t[i]) * to_natural;
      gradients_at<kind, Real>(now, log_p, log_q, constant_s, constant_t, a, b, g_s[i], g_t[i]);
      if constexpr (general) {
        if (target >= 0) {
          const bool apart = columns.at(i) == target;
          g_s[i] = apart ? kept[student_target] : rest_weight * g_s[i] - kept[student_target] * math::exp(log_q);
          g_t[i] = apart ? kept[teacher_target] : rest_weight * g_t[i] - kept[teacher_target] * math::exp(log_p);
        } else {
          g_s[i] *= rest_weight, g_t[i] *= rest_weight;
        }
      }
      g_s[i] *= student_factor, g_t[i] *= teacher_factor;
      if (hard)
        g_s[i] += hard_factor * (math::exp2((s[i] - student.max) * to_binary - log_hard) -
                                 (columns.at(i) == label ? Real(1) : Real(0)));
      g_s[i] = student.through_clamp_and_softcap(g_s[i], s[i]);
      g_t[i] = teacher.through_clamp_and_softcap(g_t[i], t[i]);
    }
    to_student.template store<entries>(columns, whole, g_s);
    to_teacher.template store<entries>(columns, whole, g_t);
  });
}

bool adjacent(const RowProblem& problem, const Compositions& compositions) {
  bool all = aligned(problem.student) && aligned(problem.teacher) && aligned(problem.grad_student) &&
             aligned(problem.grad_teacher);
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
    KD_FOR_ADDITIVE_KINDS(KD_CASE)
    KD_CASE(renyi)
#undef KD_CASE
  }
  return "divergence: no such kind";
}

}  // namespace

std::string divergence_forward(const RowProblem& problem, void* stream) { return dispatch<true>(problem, stream); }

std::string divergence_backward(const RowProblem& problem, void* stream) { return dispatch<false>(problem, stream); }

}  // namespace kd::cuda
