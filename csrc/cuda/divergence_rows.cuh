// A row of the family `divergence`: what it comes to and what its gradients are, wherever its logits are read from.
#pragma once

#include <cmath>

#include "cuda/kernels.h"
#include "cuda/sides.cuh"

namespace kd::cuda {

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
#define KD_FOR_ALL_KINDS(KD_CASE) \
  KD_FOR_ADDITIVE_KINDS(KD_CASE)  \
  KD_CASE(renyi)

// Whether the value needs both normalisers first, and so a second sweep.
inline bool swept_twice(Kind kind) {
  switch (kind) {
#define KD_CASE(name) \
  case Kind::name: return math::Traits<Kind::name>::two_sweeps;
    KD_FOR_ALL_KINDS(KD_CASE)
#undef KD_CASE
  }
  return false;
}

inline bool aligned_rows(const RowProblem& problem) {
  return aligned(problem.student) && aligned(problem.teacher) && aligned(problem.grad_student) &&
         aligned(problem.grad_teacher);
}

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

// What a row comes to, beside the states of both streams.
template <class Real>
struct RowSums {
  Real value;
  Real student_constant, teacher_constant;
  Real hard_log_sum;        // natural
  Real student_target = 0;  // derivatives of the target's own term, with its weight
  Real teacher_target = 0;
};

// Numbers that are added up over a row at once.
constexpr int most_sums = 5;

// Sweeps over the row, once or twice: `sweeps.first` and `sweeps.again` call a body with the columns and logits of each step,
// and entries for which `sweeps.left_out` do not count. Brings the streams to the state of the whole row.
template <Kind kind, int entries, class Real, class Side, class Sweeps>
__device__ __forceinline__ RowSums<Real> sums_of_row(const RowProblem& problem, int64_t row, Side& student,
                                                     Side& teacher, const Sweeps& sweeps,
                                                     const ClusterSums<Real, most_sums>& block) {
  constexpr Real to_natural = static_cast<Real>(log_2), to_binary = static_cast<Real>(log2_e);
  const Kind now = kind == any_kind ? static_cast<Kind>(problem.kind) : kind;
  const bool forward_sum = now == Kind::forward_kl || now == Kind::jeffreys;
  const bool student_sum = now == Kind::soft_cross_entropy;
  const bool reverse_sum = now == Kind::reverse_kl || now == Kind::jeffreys;
  const Real a = parameter_of<Real>(problem, row), b = static_cast<Real>(problem.b);
  Real forward = 0, reverse = 0, hard = 0;
  const bool hard_apart = problem.labels && student.temperature != Real(1);
  sweeps.first([&](const Columns& columns, bool whole, const Real* s, const Real* t) {
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
      if (sweeps.left_out(columns, whole, i)) continue;
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
  Real maxima[] = {student.max, teacher.max};
  block.max(maxima);
  const Real shift_s = (student.max - maxima[0]) * student.scale, shift_t = (teacher.max - maxima[1]) * teacher.scale;
  if (forward_sum) forward = (forward + teacher.sum * (shift_t - shift_s)) * math::exp2(shift_t);
  if (student_sum) forward = (forward - teacher.sum * shift_s) * math::exp2(shift_t);
  if (reverse_sum) reverse = (reverse + student.sum * (shift_s - shift_t)) * math::exp2(shift_s);
  if (hard_apart) hard *= math::exp2((student.max - maxima[0]) * to_binary);
  Real sums[] = {student.sum * math::exp2(shift_s), teacher.sum * math::exp2(shift_t), forward, reverse, hard};
  block.total(sums);
  const Real sum_s = sums[0], sum_t = sums[1];
  student.max = maxima[0], teacher.max = maxima[1];
  student.log_sum = math::log(sum_s) * to_binary, teacher.log_sum = math::log(sum_t) * to_binary;
  if (forward_sum) forward = (sums[2] / sum_t - (teacher.log_sum - student.log_sum)) * to_natural;
  if (student_sum) forward = (sums[2] / sum_t + student.log_sum) * to_natural;
  if (reverse_sum) reverse = (sums[3] / sum_s - (student.log_sum - teacher.log_sum)) * to_natural;
  const Real log_hard = math::log(hard_apart ? sums[4] : sum_s);

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
    sweeps.again([&](const Columns& columns, bool whole, const Real* s, const Real* t) {
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        if (sweeps.left_out(columns, whole, i)) continue;
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
      Real highest[] = {affinity.max};
      block.max(highest);
      Real sum[] = {affinity.sum * math::exp(affinity.max - highest[0])};
      block.total(sum);
      constant_s = constant_t = highest[0] + math::log(sum[0]);
      value = constant_s / (a - 1);
    } else {
      Real terms[] = {sum_student, sum_teacher, sum_value};
      block.total(terms);
      constant_s = terms[0], constant_t = terms[1];
      value = now == Kind::skew_forward_kl || now == Kind::skew_reverse_kl ? terms[2] : constant_s + constant_t;
      if (now == Kind::alpha_beta) value /= a + b;
    }
  }
  return {value, constant_s, constant_t, log_hard};
}

// The student's logit at the row's label; NaN if that is none of its columns.
template <class Real, class Side>
__device__ __forceinline__ Real logit_at_label(const RowProblem& problem, int64_t row, const Side& student) {
  const int64_t label = problem.labels[row];
  return label >= 0 && label < problem.vocab ? student.logits.one(label, problem.vocab) : Real(NAN);
}

// Writes the results of a row, and what its gradients want.
template <class Real, class Side>
__device__ __forceinline__ void write_row(const RowProblem& problem, int64_t row, const Side& student,
                                          const Side& teacher, const RowSums<Real>& sums, Real label_logit) {
  Real* const kept = static_cast<Real*>(problem.statistics) + row * saved_statistics;
  kept[student_max] = student.max, kept[student_log_sum] = student.log_sum;
  kept[teacher_max] = teacher.max, kept[teacher_log_sum] = teacher.log_sum;
  kept[student_constant] = sums.student_constant, kept[teacher_constant] = sums.teacher_constant;
  kept[student_target] = sums.student_target, kept[teacher_target] = sums.teacher_target;
  static_cast<Real*>(problem.divergence)[row] = sums.value;
  if (!problem.labels) return;
  kept[hard_log_sum] = sums.hard_log_sum;
  static_cast<Real*>(problem.cross_entropy)[row] = sums.hard_log_sum - (label_logit - student.max);
}

// The same of a row that does not count.
template <class Real>
__device__ __forceinline__ void write_nothing_of_row(const RowProblem& problem, int64_t row) {
  static_cast<Real*>(problem.divergence)[row] = 0;
  if (problem.labels) static_cast<Real*>(problem.cross_entropy)[row] = 0;
}

template <class Real, int entries>
__device__ __forceinline__ void write_zero_gradients(const RowProblem& problem, int64_t row, Span span, bool adjacent) {
  const Stored<Real> to_student(problem.grad_student, row), to_teacher(problem.grad_teacher, row);
  for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
    const Real zeros[entries] = {};
    to_student.template store<entries>(columns, whole, zeros);
    to_teacher.template store<entries>(columns, whole, zeros);
  });
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

// The gradients to the logits of a row whose sums are known.
template <Kind kind, int entries, class Real>
struct RowGradients {
  static constexpr bool general = kind == any_kind;
  RowSums<Real> sums;
  Kind now;
  Stored<Real> to_student, to_teacher;
  Real a, b, student_factor, teacher_factor;
  bool hard;
  Real hard_factor, log_hard;
  int64_t label, target;
  Real rest_weight;

  template <class Side>
  __device__ __forceinline__ RowGradients(const RowProblem& problem, int64_t row, const RowSums<Real>& sums,
                                          const Side& student, const Side& teacher)
      : sums(sums),
        now(general ? static_cast<Kind>(problem.kind) : kind),
        to_student(problem.grad_student, row),
        to_teacher(problem.grad_teacher, row),
        a(parameter_of<Real>(problem, row)),
        b(static_cast<Real>(problem.b)) {
    const Real upstream = of_row<Real>(problem.grad_divergence, row);
    student_factor = upstream / student.temperature, teacher_factor = upstream / teacher.temperature;
    hard = problem.labels && to_student.data && (problem.grad_cross_entropy.values || problem.grad_cross_entropy.value);
    hard_factor = hard ? of_row<Real>(problem.grad_cross_entropy, row) : Real(0);
    log_hard = hard ? sums.hard_log_sum * static_cast<Real>(log2_e) : Real(0);
    label = hard ? problem.labels[row] : -1;
    target = general && problem.targets ? problem.targets[row] : -1;
    rest_weight = general && problem.targets ? of_row<Real>(problem.rest_weight, row) : Real(1);
  }

  // Writes those of a step.
  template <class Side>
  __device__ __forceinline__ void write(const Columns& columns, bool whole, const Side& student, const Side& teacher,
                                        const Real* s, const Real* t) const {
    constexpr Real to_natural = static_cast<Real>(log_2), to_binary = static_cast<Real>(log2_e);
    Real g_s[entries], g_t[entries];
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const Real log_q = student.log_probability(s[i]) * to_natural;
      const Real log_p = teacher.log_probability(t[i]) * to_natural;
      gradients_at<kind, Real>(now, log_p, log_q, sums.student_constant, sums.teacher_constant, a, b, g_s[i], g_t[i]);
      if constexpr (general) {
        if (target >= 0) {
          const bool apart = columns.at(i) == target;
          g_s[i] = apart ? sums.student_target : rest_weight * g_s[i] - sums.student_target * math::exp(log_q);
          g_t[i] = apart ? sums.teacher_target : rest_weight * g_t[i] - sums.teacher_target * math::exp(log_p);
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
  }
};

}  // namespace kd::cuda
