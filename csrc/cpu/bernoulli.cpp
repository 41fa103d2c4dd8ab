// The `bernoulli` family on the CPU: every entry of the vocabulary is a yes-or-no question of its own, whose probability is
// the logistic function of its logit. There is no normaliser, so that one sweep makes the value and the gradient of a row.
//
// With u = exp(-|x|) and w = exp(-|y|), of a student's logit x and a teacher's y, all that is needed is rational in u and w
// or the logarithm of such a quotient, without cancellation but where x and y are close.
#include "cpu/gradient_row.h"

namespace kd::KD_ISA {
namespace {

// The numbering is shared with kdkernels/backends/bernoulli.py and triton_kernels/bernoulli.py.
enum class Form : int {
  cross_entropy = 0,         // of the student from the teacher's probabilities
  kl = 1,                    // the same less the teacher's entropy
  half = 2,                  // KL of (1/2, 1/2) from the logistic function of the difference of the logits
  target_cross_entropy = 3,  // the teacher's matrix holds probabilities
  target_kl = 4,
};

constexpr bool has_probabilities(Form form) { return form == Form::target_cross_entropy || form == Form::target_kl; }

template <class Real>
struct Terms {
  Real value, gradient;  // to the tempered logit x
};

// Choices are made with the sign bit: conditions on floating-point numbers would not survive as vectors.
KD_INLINE int32_t bits_of(float x) { return math::bit_cast<int32_t>(x); }
KD_INLINE int64_t bits_of(double x) { return math::bit_cast<int64_t>(x); }
KD_INLINE int32_t negative_mask(float x) { return bits_of(x) >> 31; }
KD_INLINE int64_t negative_mask(double x) { return bits_of(x) >> 63; }

template <class Real, class Mask>
KD_INLINE Real select(Mask mask, Real x, Real y) {
  return math::bit_cast<Real>((bits_of(x) & mask) | (bits_of(y) & ~mask));
}

template <class Real>
KD_INLINE Real magnitude(Real x) {
  return math::bit_cast<Real>(bits_of(x) & ~bits_of(Real(-0.0)));
}

// log(1 + u) for 0 <= u <= 1.
template <class Real>
KD_INLINE Real log1p(Real u) {
  return math::log_of_ratio(u / (Real(2) + u));
}

// The entropy of (b, 1 - b), negative.
template <class Real>
KD_INLINE Real negative_entropy(Real b) {
  const Real other = Real(1) - b;
  const Real small = select(negative_mask(b - other), b, other);
  const Real tiny = sizeof(Real) == 4 ? Real(1e-37) : Real(1e-307);
  return small * math::log(select(negative_mask(small - tiny), tiny, small)) +
         (Real(1) - small) * math::log_of_ratio(-small / (Real(2) - small));
}

template <Form form, class Real>
KD_INLINE Terms<Real> terms(Real x, Real y) {
  const Real one = 1, two = 2;
  if constexpr (has_probabilities(form)) {
    const auto negative = negative_mask(x);
    const Real u = math::exp(-magnitude(x)), other = one - y;
    const Real rest = u / (one + u);
    Real value = select(negative, -y, other) * x + log1p(u);
    if constexpr (form == Form::target_kl) value += negative_entropy(y);
    return {value, select(negative, rest - y, other - rest)};
  } else if constexpr (form == Form::half) {
    const Real d = x - y;
    const Real size = magnitude(d), u = math::exp(-size);
    const Real e = one - u, f = one + u, e2 = e * e;
    // log cosh(d / 2), which is -log(1 - tanh^2) / 2: the other form cancels for small d.
    const auto small = negative_mask(size - Real(1.75));
    const Real series = math::log_of_ratio(select(small, -e2, u) / select(small, two * f * f - e2, two + u));
    const Real far = Real(0.5) * size - Real(0.69314718055994530942) + series;
    const Real slope = Real(0.5) * e / f;
    return {select(small, Real(-0.5) * series, far), select(negative_mask(d), -slope, slope)};
  } else {
    const auto negative = negative_mask(x), teacher_negative = negative_mask(y);
    const Real u = math::exp(-magnitude(x)), w = math::exp(-magnitude(y));
    const Real both = one / ((one + u) * (one + w));
    const Real gradient = select(negative ^ teacher_negative, one - u * w, w - u) * both;
    const Real affirmed = select(teacher_negative, w, one), denied = select(teacher_negative, one, w);
    const Real factor = select(negative, -affirmed, denied) * (one + u) * both;
    Real value;
    if constexpr (form == Form::cross_entropy) {
      value = factor * x + log1p(u);
    } else {
      const Real crossing = select(negative, Real(0), one) - select(teacher_negative, Real(0), one);
      value = factor * (x - y) + crossing * y + math::log_of_ratio((u - w) / (two + u + w));
    }
    return {value, select(negative, -gradient, gradient)};
  }
}

// The sum of the values of a block; out = the gradients times `factor` (null: not wanted). The numbers are arguments, not
// references that the stores might change, so that the loops become vectors.
template <Form form, class Real>
inline Real sum_block(const Real* __restrict s, const Real* __restrict t, int64_t n, Real student_factor,
                      Real teacher_factor, Real factor, Real* __restrict out) {
  Real sum = 0;
  if (!out) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += terms<form>(s[i] * student_factor, t[i] * teacher_factor).value;
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Terms<Real> found = terms<form>(s[i] * student_factor, t[i] * teacher_factor);
    sum += found.value;
    out[i] = factor * found.gradient;
  }
  return sum;
}

template <Form form, class Real>
void run_row(const RowProblem& problem, int64_t row) {
  Stream<Real> student(problem.student, row, problem.student_softcap, per_row<Real>(problem.student_temperature, row));
  const Stream<Real> teacher(problem.teacher, row, problem.teacher_softcap,
                             per_row<Real>(problem.teacher_temperature, row));
  const Real student_factor = static_cast<Real>(student.inverse_temperature);
  const Real teacher_factor = has_probabilities(form) ? Real(1) : static_cast<Real>(teacher.inverse_temperature);
  const Real upstream = per_row<Real>(problem.grad_divergence, row);
  const Real factor = upstream * student_factor;
  const GradientRow<Real> gradient_row(problem.grad_student, {}, nullptr, problem, row);
  const bool direct = gradient_row.direct(true);
  double total = 0;
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    alignas(64) Real student_block[block_size], teacher_block[block_size], buffer[block_size];
    Range<Real> range;
    const Real* s = student.load(start, n, student_block, range);
    const Real* t = teacher.load(start, n, teacher_block);
    student.masked = student.masked || range.min <= static_cast<Real>(logit_floor);
    Real* out = !gradient_row.wanted() ? nullptr : direct ? gradient_row.at(start) : buffer;
    total += static_cast<double>(sum_block<form>(s, t, n, student_factor, teacher_factor, factor, out));
    if (!out) return;
    through_clamp_and_softcap(student, n, s, out);
    if (!direct) gradient_row.store(start, n, buffer);
  });
  if (problem.divergence) static_cast<Real*>(problem.divergence)[row] = static_cast<Real>(total);
  if (problem.weighted) problem.weighted[row] = static_cast<double>(upstream) * total;
}

template <Form form, class Real>
void run(const RowProblem& problem) {
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
    const FlushSubnormals flush;
#pragma omp for schedule(dynamic, group)
    for (int64_t row = 0; row < problem.rows; ++row) {
      if (problem.active && !problem.active[row]) {
        clear_row(problem, row);
      } else {
        run_row<form, Real>(problem, row);
      }
    }
    stream_fence();
  }
}

template <class Real>
void run_form(const RowProblem& problem) {
  switch (static_cast<Form>(problem.kind)) {
    case Form::cross_entropy: return run<Form::cross_entropy, Real>(problem);
    case Form::kl: return run<Form::kl, Real>(problem);
    case Form::half: return run<Form::half, Real>(problem);
    case Form::target_cross_entropy: return run<Form::target_cross_entropy, Real>(problem);
    case Form::target_kl: return run<Form::target_kl, Real>(problem);
  }
}

}  // namespace

bool bernoulli(const RowProblem& problem) {
  if (problem.compute_double) {
    run_form<double>(problem);
  } else {
    run_form<float>(problem);
  }
  return true;
}

}  // namespace kd::KD_ISA
