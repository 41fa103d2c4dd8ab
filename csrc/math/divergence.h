// Every divergence as two functions of the probabilities at one vocabulary entry.
//
// With p = softmax(teacher), q = softmax(student) and D = sum_v f(p_v, q_v):
//     h_s = q * df/dq,   H_s = sum_v h_s,   dD/d(student logit) = (h_s - q * H_s) / temperature
//     h_t = p * df/dp,   H_t = sum_v h_t,   dD/d(teacher logit) = (h_t - p * H_t) / temperature
// The gradient does not change when c * q is added to h_s (and c to H_s), which is used below to
// drop terms. Where f is homogeneous of degree k in (p, q), D = (H_s + H_t) / k for the full h.
#pragma once

#include "math/elementary.h"

namespace kd {

// The numbering is shared with kdkernels/divergences.py and triton_kernels/divergence.py.
enum class Kind : int {
  forward_kl = 0,
  reverse_kl = 1,
  jeffreys = 2,         // a: weight of the forward KL
  jsd = 3,              // a: beta, m = a p + (1 - a) q
  skew_forward_kl = 4,  // a: alpha, m = a p + (1 - a) q
  skew_reverse_kl = 5,  // a: alpha, m = (1 - a) p + a q
  total_variation = 6,
  alpha = 7,       // a: alpha, b: factor in front
  renyi = 8,       // a: order
  alpha_beta = 9,  // a, b: both exponents
  soft_cross_entropy = 10,
};

// Which formula a row follows whose parameter is its own: without skew the mixture is the other distribution, and the
// plain KL is exact also where that underflows.
KD_INLINE constexpr Kind kind_of_row(Kind kind, double a) {
  return a != 0                          ? kind
         : kind == Kind::skew_forward_kl ? Kind::forward_kl
         : kind == Kind::skew_reverse_kl ? Kind::reverse_kl
                                         : kind;
}

namespace KD_ISA::math {

// Which of its inputs a form reads, so that the others are never loaded or computed.
template <Kind kind>
struct Traits {
  // The value follows from sums that survive a change of the running maximum. Else it needs a second sweep, after both
  // normalisers are known.
  static constexpr bool one_sweep = kind == Kind::forward_kl || kind == Kind::reverse_kl || kind == Kind::jeffreys ||
                                    kind == Kind::soft_cross_entropy;
  static constexpr bool two_sweeps = !one_sweep;
  // h reads log p and log q rather than p and q alone.
  static constexpr bool logs_for_terms = kind == Kind::alpha || kind == Kind::renyi || kind == Kind::alpha_beta;
  static constexpr bool logs_for_student_gradient =
      logs_for_terms || kind == Kind::reverse_kl || kind == Kind::jeffreys;
  static constexpr bool logs_for_teacher_gradient =
      logs_for_terms || kind == Kind::forward_kl || kind == Kind::jeffreys || kind == Kind::soft_cross_entropy;
};

template <class Real>
struct Terms {
  Real student;  // h_s
  Real teacher;  // h_t
  Real value;    // f, where it is not (h_s + h_t)
};

// The largest exponent that a power form may reach: it saturates instead of overflowing.
template <class Real>
constexpr Real saturation = Real(60);

template <Kind kind, class Real>
KD_INLINE Terms<Real> terms(Real p, Real q, [[maybe_unused]] Real log_p, [[maybe_unused]] Real log_q,
                            [[maybe_unused]] Real a) {
  constexpr Real tiny = sizeof(Real) == 4 ? Real(1.2e-38) : Real(2.3e-308);
  const auto positive = [](Real x) { return x < tiny ? tiny : x; };
  const Real one = Real(1);
  if constexpr (kind == Kind::forward_kl) {
    return {-p, p * (log_p - log_q), Real(0)};
  } else if constexpr (kind == Kind::reverse_kl) {
    return {q * (log_q - log_p), -q, Real(0)};
  } else if constexpr (kind == Kind::jeffreys) {
    const Real d = log_p - log_q;
    return {-a * p - (one - a) * q * d, a * p * d - (one - a) * q, Real(0)};
  } else if constexpr (kind == Kind::soft_cross_entropy) {
    return {-p, -p * log_q, Real(0)};
  } else if constexpr (kind == Kind::jsd) {
    const Real inverse_m = one / positive(a * p + (one - a) * q);
    return {(one - a) * q * log(positive(q * inverse_m)), a * p * log(positive(p * inverse_m)), Real(0)};
  } else if constexpr (kind == Kind::skew_forward_kl) {
    const Real ratio = p / positive(a * p + (one - a) * q);
    const Real value = p * log(positive(ratio));
    return {(a - one) * q * ratio, value - a * p * ratio, value};
  } else if constexpr (kind == Kind::skew_reverse_kl) {
    const Real ratio = q / positive((one - a) * p + a * q);
    const Real value = q * log(positive(ratio));
    return {value - a * q * ratio, (a - one) * p * ratio, value};
  } else if constexpr (kind == Kind::total_variation) {
    const Real half_sign = q > p ? Real(0.5) : (q < p ? Real(-0.5) : (q - p));  // NaN passes through
    return {q * half_sign, -p * half_sign, Real(0)};
  } else {
    static_assert(kind != kind, "power forms have power_terms, the Renyi divergence has no additive terms");
  }
}

// The power forms are made of X = exp(cross_exponent) and of powers of p and q: p and q themselves
// for alpha, p^(a+b) and q^(a+b) for alpha_beta. They start from logarithms, because a small power
// of an underflowing probability matters.
template <Kind kind, class Real>
KD_INLINE Real cross_exponent(Real log_p, Real log_q, Real a, Real b) {
  const Real exponent = a * log_p + (kind == Kind::alpha_beta ? b : Real(1) - a) * log_q;
  return kind == Kind::alpha && exponent > saturation<Real> ? saturation<Real> : exponent;
}

template <Kind kind, class Real>
KD_INLINE Terms<Real> power_terms(Real p_power, Real q_power, Real cross, Real a, Real b) {
  static_assert(kind == Kind::alpha || kind == Kind::alpha_beta);
  if constexpr (kind == Kind::alpha) {
    return {b * (Real(1) - a) * (q_power - cross), b * a * (p_power - cross), Real(0)};
  } else {
    return {(q_power - cross) / a, (p_power - cross) / b, Real(0)};
  }
}

// One outcome of a distribution in full. Nothing is dropped as it is from `terms`, so that sums of h_s over some of the
// outcomes, or over distributions that do not add up to 1, are the derivative of the sum of the values.
template <class Real>
struct Outcome {
  Real student;  // h_s
  Real value;    // f
};

template <Kind kind, class Real>
KD_INLINE Outcome<Real> outcome(Real log_p, Real log_q, [[maybe_unused]] Real a, [[maybe_unused]] Real b) {
  const Real p = exp(log_p), q = exp(log_q);
  [[maybe_unused]] const Real one = Real(1), d = log_p - log_q;
  if constexpr (kind == Kind::forward_kl) {
    return {-p, p * d};
  } else if constexpr (kind == Kind::reverse_kl) {
    return {q * (one - d), -q * d};
  } else if constexpr (kind == Kind::jeffreys) {
    return {(one - a) * q * (one - d) - a * p, (a * p - (one - a) * q) * d};
  } else if constexpr (kind == Kind::soft_cross_entropy) {
    return {-p, -p * log_q};
  } else if constexpr (kind == Kind::alpha || kind == Kind::alpha_beta) {
    const Real cross = exp(cross_exponent<kind>(log_p, log_q, a, b));
    if constexpr (kind == Kind::alpha) {
      const auto h = power_terms<kind>(p, q, cross, a, b);
      return {h.student, h.student + h.teacher};
    } else {
      const auto h = power_terms<kind>(exp(cross_exponent<kind>(log_p, log_p, a, b)),
                                       exp(cross_exponent<kind>(log_q, log_q, a, b)), cross, a, b);
      return {h.student, (h.student + h.teacher) / (a + b)};
    }
  } else {
    const auto h = terms<kind>(p, q, log_p, log_q, a);
    if constexpr (kind == Kind::skew_forward_kl) {
      return {h.student, h.value};
    } else if constexpr (kind == Kind::skew_reverse_kl) {
      return {h.student + q, h.value};
    } else {
      return {h.student, h.student + h.teacher};
    }
  }
}

// D from the sums over the vocabulary of h_s, h_t and f.
template <Kind kind, class Real>
KD_INLINE Real value_from_sums(Real sum_student, Real sum_teacher, Real sum_value, Real a, Real b) {
  if constexpr (kind == Kind::skew_forward_kl || kind == Kind::skew_reverse_kl) {
    return sum_value;
  } else if constexpr (kind == Kind::alpha_beta) {
    return (sum_student + sum_teacher) / (a + b);
  } else {
    return sum_student + sum_teacher;
  }
}

}  // namespace KD_ISA::math
}  // namespace kd
