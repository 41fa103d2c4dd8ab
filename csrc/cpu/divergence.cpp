// The `divergence` family on the CPU: value and gradients of a row in up to three sweeps.
//
// Sweep 1 reads both rows of logits from memory, finds the normalisers online and keeps the
// exponentials, relative to the running maximum of their block, in a scratch row. Sweep 2 (mixture
// and power forms) turns them into h_s, h_t and their sums. The last sweep writes the gradient.
// Two rows of 150k floats fit the second-level cache, so only sweep 1 waits for memory, and no
// exponential is computed twice. The gradient may be written over the logits.
#include "math/divergence.h"

#include "cpu/gradient_row.h"

namespace kd::KD_ISA {
namespace {

// The scratch rows of a thread.
template <class Real>
struct Scratch {
  Real *student, *teacher;  // exponentials, later perhaps h_t / h_s
  Real *student_terms, *teacher_terms;
  Real *student_origin, *teacher_origin;      // what a block's exponentials are relative to
  Real *student_gradient, *teacher_gradient;  // where lists of the gradients' entries are wanted

  static constexpr int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

  // Both gradients of a two-sweep form need h_s and h_t beside p and q; else they share the rows.
  static int64_t bytes(int64_t vocab, bool separate_terms, bool lists) {
    const int64_t blocks = (vocab + block_size - 1) / block_size;
    const int64_t length = (separate_terms ? 4 : 2) + (lists ? 2 : 0);
    return static_cast<int64_t>(sizeof(Real)) * (length * padded(vocab) + 2 * padded(blocks));
  }

  Scratch(void* memory, int64_t vocab, bool separate_terms) {
    const int64_t row = padded(vocab), blocks = padded((vocab + block_size - 1) / block_size);
    student = static_cast<Real*>(memory);
    teacher = student + row;
    student_terms = separate_terms ? teacher + row : teacher;
    teacher_terms = separate_terms ? student_terms + row : student;
    student_origin = (separate_terms ? teacher_terms : teacher) + row;
    teacher_origin = student_origin + blocks;
    student_gradient = teacher_origin + blocks;
    teacher_gradient = student_gradient + row;
  }
};

template <class Real, Kind kind>
class Row {
  using Traits = math::Traits<kind>;
  static constexpr bool renyi = kind == Kind::renyi;
  static constexpr bool forward_sum = kind == Kind::forward_kl || kind == Kind::jeffreys;
  static constexpr bool student_sum = kind == Kind::soft_cross_entropy;
  static constexpr bool reverse_sum = kind == Kind::reverse_kl || kind == Kind::jeffreys;

 public:
  Row(const RowProblem& problem, const Scratch<Real>& scratch, int64_t row)
      : problem_(problem),
        scratch_(scratch),
        row_(row),
        student_(problem.student, row, problem.student_softcap, per_row<Real>(problem.student_temperature, row),
                 problem.student_composition),
        teacher_(problem.teacher, row, problem.teacher_softcap, per_row<Real>(problem.teacher_temperature, row),
                 problem.teacher_composition),
        parameter_(parameter_of<Real>(problem, row)),
        a_(static_cast<Real>(parameter_)),
        b_(static_cast<Real>(problem.b)),
        target_(problem.targets ? problem.targets[row] : -1),
        label_temperature_differs_(problem.labels && student_.inverse_temperature != 1) {}

  void run() {
    const bool gradient = problem_.grad_student.data || problem_.grad_teacher.data;
    if (gradient || Traits::two_sweeps) {
      exponentials<true>();
    } else {
      exponentials<false>();
    }
    log_sum_student_ = student_.log_sum();
    log_sum_teacher_ = teacher_.log_sum();
    const double log_ratio = log_sum_teacher_ - log_sum_student_;
    const double forward = forward_ / teacher_.sum - log_ratio;
    const double reverse = reverse_ / student_.sum + log_ratio;
    double value;
    if constexpr (kind == Kind::forward_kl) {
      value = forward;
      sum_student_terms_ = -1;
      sum_teacher_terms_ = forward;
    } else if constexpr (kind == Kind::reverse_kl) {
      value = reverse;
      sum_student_terms_ = reverse;
      sum_teacher_terms_ = -1;
    } else if constexpr (kind == Kind::jeffreys) {
      const double a = parameter_;
      value = a * forward + (1 - a) * reverse;
      sum_student_terms_ = -a + (1 - a) * reverse;
      sum_teacher_terms_ = a * forward - (1 - a);
    } else if constexpr (kind == Kind::soft_cross_entropy) {
      value = forward_ / teacher_.sum + log_sum_student_;
      sum_student_terms_ = -1;
      sum_teacher_terms_ = value;
    } else if constexpr (renyi) {
      log_affinity();
      value = log_affinity_ / (parameter_ - 1);
    } else {
      mixture_terms(gradient);
      value = math::value_from_sums<kind, double>(sum_student_terms_, sum_teacher_terms_, sum_value_, parameter_,
                                                  problem_.b);
    }
    if (problem_.targets) {
      rest_weight_ = static_cast<double>(per_row<Real>(problem_.rest_weight, row_));
      value *= rest_weight_;
      if (target_ >= 0) value += target_outcome();
    }
    if (problem_.divergence) static_cast<Real*>(problem_.divergence)[row_] = static_cast<Real>(value);
    const double hard = problem_.labels ? cross_entropy() : 0;
    if (problem_.cross_entropy) static_cast<Real*>(problem_.cross_entropy)[row_] = static_cast<Real>(hard);
    if (problem_.weighted)
      problem_.weighted[row_] = static_cast<double>(per_row<Real>(problem_.grad_divergence, row_)) * value +
                                static_cast<double>(per_row<Real>(problem_.grad_cross_entropy, row_)) * hard;
    if (gradient) gradients();
  }

 private:
  static constexpr Real log2_e = static_cast<Real>(Stream<Real>::log2_e);

  // sum exp_x (x - y) over a block, x and y tempered and in log 2.
  static double cross_sum(const Real* exp_x, const Stream<Real>& of_x, const Real* x, const Stream<Real>& of_y,
                          const Real* y, int64_t n) {
    const Tempering<Real> temper_x = of_x.tempering, temper_y = of_y.tempering;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += exp_x[i] * (temper_x(x[i]) - temper_y(y[i]));
    return sum;
  }

  // sum exp_x (-y) over a block, y tempered and in log 2.
  static double negated_sum(const Real* exp_x, const Stream<Real>& of_y, const Real* y, int64_t n) {
    const Tempering<Real> temper_y = of_y.tempering;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum -= exp_x[i] * temper_y(y[i]);
    return sum;
  }

  // block = exp(block), in place.
  static void exponentials_of(Real* block, int64_t n) {
    alignas(64) Real exponents[block_size];
    std::memcpy(exponents, block, n * sizeof(Real));
    exp2_block(exponents, n, Tempering<Real>{log2_e, 0}, block);
  }

  // block = exp(a log p + (1 - a) log q - shift), the weights of the Renyi divergence, in place of log q.
  void affinities(const Real* teacher_logs, Real* student_logs, int64_t n, Real shift) const {
    const Real a = a_;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) student_logs[i] = (a * teacher_logs[i] + (Real(1) - a) * student_logs[i]) - shift;
    exponentials_of(student_logs, n);
  }

  // Sweep 1. The exponentials stay in the scratch rows if `keep`, else in the first-level cache.
  template <bool keep>
  void exponentials() {
    alignas(64) Real student_buffer[block_size], teacher_buffer[block_size];
    alignas(64) Real student_exp[block_size], teacher_exp[block_size];
    for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
      const Real old_max = student_.max;
      Range<Real> student_range, teacher_range;
      const Real* s = load_rest(student_, start, n, student_buffer, student_range);
      const Real* t = load_rest(teacher_, start, n, teacher_buffer, teacher_range);
      const double old_student_sum = student_.sum, old_teacher_sum = teacher_.sum;
      const double student_shift = student_.raise(student_range);
      const double teacher_shift = teacher_.raise(teacher_range);
      Real* exp_s = keep ? scratch_.student + start : student_exp;
      Real* exp_t = keep ? scratch_.teacher + start : teacher_exp;
      student_.exponentiate(s, start, n, problem_.vocab, exp_s);
      teacher_.exponentiate(t, start, n, problem_.vocab, exp_t);
      if constexpr (forward_sum) {
        if (student_shift != 0 || teacher_shift != 0)
          forward_ = (forward_ + old_teacher_sum * (teacher_shift - student_shift)) * std::exp2(teacher_shift);
        forward_ += cross_sum(exp_t, teacher_, t, student_, s, n);
      }
      if constexpr (student_sum) {
        if (student_shift != 0 || teacher_shift != 0)
          forward_ = (forward_ - old_teacher_sum * student_shift) * std::exp2(teacher_shift);
        forward_ += negated_sum(exp_t, student_, s, n);
      }
      if constexpr (reverse_sum) {
        if (student_shift != 0 || teacher_shift != 0)
          reverse_ = (reverse_ + old_student_sum * (student_shift - teacher_shift)) * std::exp2(student_shift);
        reverse_ += cross_sum(exp_s, student_, s, teacher_, t, n);
      }
      if constexpr (keep) {
        scratch_.student_origin[start / block_size] = student_.tempering.origin;
        scratch_.teacher_origin[start / block_size] = teacher_.tempering.origin;
      }
      if (label_temperature_differs_) {
        const Tempering<Real> untempered = Tempering<Real>::at_temperature_one(student_.max);
        const double fall = untempered.distance(Tempering<Real>::at_temperature_one(old_max).origin, untempered.origin);
        label_sum_ = label_sum_ * std::exp2(fall) + exp2_block(s, n, untempered, student_exp);
      }
    });
    if (!label_temperature_differs_) label_sum_ = student_.sum;
    forward_ *= Stream<Real>::log_2;
    reverse_ *= Stream<Real>::log_2;
  }

  // A block of logits without the target, if it has one.
  const Real* load_rest(const Stream<Real>& stream, int64_t start, int64_t n, Real* buffer, Range<Real>& range) const {
    const Real* block = stream.load(start, n, buffer, range);
    const int64_t place = target_ - start;
    if (place < 0 || place >= n) return block;
    if (block != buffer) std::memcpy(buffer, block, static_cast<size_t>(n) * sizeof(Real));
    buffer[place] = stream.hole();
    range.max = range_of(buffer, n).max;
    return buffer;
  }

  // The divergence of the two outcomes, target or not, times its weight; leaves its derivatives. x and y are the log-odds
  // of the target, from sums without it, so that nothing cancels where it has nearly all of the mass.
  double target_outcome() {
    const auto softplus = [](double z) { return (z > 0 ? z : 0) + std::log1p(std::exp(-std::abs(z))); };
    const auto logistic = [](double z) { return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z)); };
    const double x = teacher_.log_probability(teacher_.logit(target_));
    const double y = student_.log_probability(student_.logit(target_));
    const double p = logistic(x), not_p = logistic(-x);
    const double weight = static_cast<double>(per_row<Real>(problem_.target_weight, row_));
    target_student_ = weight * (x > 0 ? not_p - logistic(-y) : logistic(y) - p);
    target_teacher_ = weight * p * not_p * (x - y);
    return weight * (p * (softplus(-y) - softplus(-x)) + not_p * (softplus(y) - softplus(x)));
  }

  // A logit of the student at temperature 1, relative to what label_sum_ is relative to.
  double untempered(int64_t column) const {
    return Tempering<Real>::at_temperature_one(student_.max).of(student_.logit(column)) * Stream<Real>::log_2;
  }

  double cross_entropy() {
    double log_sum = std::log(label_sum_);
    if (target_ >= 0) {
      const double target = untempered(target_), high = std::max(log_sum, target);
      const double total = high + std::log1p(std::exp(std::min(log_sum, target) - high));
      label_rest_ = std::exp(log_sum - total);
      label_target_ = std::exp(target - total);
      log_sum = total;
    }
    return log_sum - untempered(problem_.labels[row_]);
  }

  // What turns the exponentials kept for a block into probabilities.
  static Real probability_scale(const Stream<Real>& stream, Real block_origin) {
    const double shift = stream.tempering.distance(block_origin, stream.tempering.origin);
    return static_cast<Real>((shift == 0 ? 1.0 : std::exp2(shift)) / stream.sum);
  }

  void load_log_probabilities(int64_t start, int64_t n, Real* student_logs, Real* teacher_logs) const {
    student_.log_probabilities(student_.load(start, n, student_logs), n, student_logs);
    teacher_.log_probabilities(teacher_.load(start, n, teacher_logs), n, teacher_logs);
    const int64_t place = target_ - start;
    if (place >= 0 && place < n) student_logs[place] = teacher_logs[place] = static_cast<Real>(-1e30);
  }

  // Sweep 2 of the additive forms.
  void mixture_terms(bool gradient) {
    if constexpr (Traits::two_sweeps && !renyi) {
      alignas(64) Real student_logs[block_size], teacher_logs[block_size];
      const bool keep_student = gradient && problem_.grad_student.data;
      const bool keep_teacher = gradient && problem_.grad_teacher.data;
      for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
        if constexpr (Traits::logs_for_terms) load_log_probabilities(start, n, student_logs, teacher_logs);
        const Real student_scale = probability_scale(student_, scratch_.student_origin[start / block_size]);
        const Real teacher_scale = probability_scale(teacher_, scratch_.teacher_origin[start / block_size]);
        const Real* student_kept = scratch_.student + start;
        const Real* teacher_kept = scratch_.teacher + start;
        const Real a = a_;
        [[maybe_unused]] const Real b = b_;
        alignas(64) Real student_terms[block_size], teacher_terms[block_size];
        Real sum_student = 0, sum_teacher = 0, sum_value = 0;
        if constexpr (Traits::logs_for_terms) {
          // The terms' own arrays hold the powers first.
          constexpr bool own_powers = kind == Kind::alpha_beta;
          Real* cross = teacher_terms;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            const Real log_p = teacher_logs[i], log_q = student_logs[i];
            cross[i] = math::cross_exponent<kind>(log_p, log_q, a, b);
            if constexpr (own_powers) {  // rounded like the cross exponent, so that nothing remains where p = q
              teacher_logs[i] = math::cross_exponent<kind>(log_p, log_p, a, b);
              student_logs[i] = math::cross_exponent<kind>(log_q, log_q, a, b);
            }
          }
          exponentials_of(cross, n);
          if constexpr (own_powers) {
            exponentials_of(student_logs, n);
            exponentials_of(teacher_logs, n);
          }
#pragma omp simd reduction(+ : sum_student, sum_teacher)
          for (int64_t i = 0; i < n; ++i) {
            const auto h = math::power_terms<kind, Real>(own_powers ? teacher_logs[i] : teacher_kept[i] * teacher_scale,
                                                         own_powers ? student_logs[i] : student_kept[i] * student_scale,
                                                         cross[i], a, b);
            sum_student += h.student;
            sum_teacher += h.teacher;
            student_terms[i] = h.student;
            teacher_terms[i] = h.teacher;
          }
        } else {
#pragma omp simd reduction(+ : sum_student, sum_teacher, sum_value)
          for (int64_t i = 0; i < n; ++i) {
            const auto h = math::terms<kind, Real>(teacher_kept[i] * teacher_scale, student_kept[i] * student_scale,
                                                   Real(0), Real(0), a);
            sum_student += h.student;
            sum_teacher += h.teacher;
            sum_value += h.value;
            student_terms[i] = h.student;
            teacher_terms[i] = h.teacher;
          }
        }
        sum_student_terms_ += sum_student;
        sum_teacher_terms_ += sum_teacher;
        sum_value_ += sum_value;
        // These rows may be those of the exponentials, which this block has finished with.
        if (keep_student) std::memcpy(scratch_.student_terms + start, student_terms, n * sizeof(Real));
        if (keep_teacher) std::memcpy(scratch_.teacher_terms + start, teacher_terms, n * sizeof(Real));
      });
    }
  }

  // Sweep 2 of the Renyi divergence: log sum_v p^a q^(1-a), online.
  void log_affinity() {
    alignas(64) Real student_logs[block_size], teacher_logs[block_size];
    double max = -1e300, sum = 0;
    for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
      load_log_probabilities(start, n, student_logs, teacher_logs);
      const Real a = a_;
      Real block_max = static_cast<Real>(-1e30);
#pragma omp simd reduction(max : block_max)
      for (int64_t i = 0; i < n; ++i) {
        const Real x = a * teacher_logs[i] + (Real(1) - a) * student_logs[i];
        student_logs[i] = x;
        block_max = block_max < x ? x : block_max;
      }
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) student_logs[i] -= block_max;
      const Real block_sum = exp2_block(student_logs, n, Tempering<Real>{log2_e, 0}, teacher_logs);
      if (block_max > max) {
        sum *= std::exp(max - block_max);
        max = block_max;
      }
      sum += block_sum * std::exp(block_max - max);
    });
    log_affinity_ = max + std::log(sum);
  }

  // The last sweep: writes the gradients.
  void gradients() const {
    const bool to_student = problem_.grad_student.data, to_teacher = problem_.grad_teacher.data;
    const double whole_upstream = static_cast<double>(per_row<Real>(problem_.grad_divergence, row_));
    const double upstream = whole_upstream * rest_weight_;
    // Of the target's own term: what its logit gets, and the others lose in proportion to their probability.
    const double student_target = whole_upstream * student_.inverse_temperature * target_student_;
    const double teacher_target = whole_upstream * teacher_.inverse_temperature * target_teacher_;
    const Real label_upstream = problem_.labels ? per_row<Real>(problem_.grad_cross_entropy, row_) : Real(0);
    const GradientRow<Real> student_row(problem_.grad_student, problem_.student_entries, scratch_.student_gradient,
                                        problem_, row_);
    const GradientRow<Real> teacher_row(problem_.grad_teacher, problem_.teacher_entries, scratch_.teacher_gradient,
                                        problem_, row_);
    const bool label_softmax_apart = label_temperature_differs_ && label_upstream != Real(0);
    const bool logs =
        (to_student && Traits::logs_for_student_gradient) || (to_teacher && Traits::logs_for_teacher_gradient);
    const bool compute_logs = logs && (renyi || !Traits::two_sweeps);
    const bool raw = compute_logs || label_softmax_apart || student_.masked || teacher_.masked ||
                     student_.softcap != Real(0) || teacher_.softcap != Real(0);
    // A single gradient of the compute type is written in place, without a copy through the block.
    const bool direct_student = !to_teacher && student_row.direct(raw);
    const bool direct_teacher = !to_student && teacher_row.direct(raw);
    for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
      alignas(64) Real student_block[block_size], teacher_block[block_size];
      alignas(64) Real student_logs[block_size], teacher_logs[block_size];
      const Real *s = nullptr, *t = nullptr;
      if (raw) {
        s = student_.load(start, n, student_block);
        t = teacher_.load(start, n, teacher_block);
      }
      if (compute_logs) {
        student_.log_probabilities(s, n, student_logs);
        teacher_.log_probabilities(t, n, teacher_logs);
        if constexpr (renyi) affinities(teacher_logs, student_logs, n, static_cast<Real>(log_affinity_));
      }
      const Real student_scale = probability_scale(student_, scratch_.student_origin[start / block_size]);
      const Real teacher_scale = probability_scale(teacher_, scratch_.teacher_origin[start / block_size]);
      // Both gradients read both rows of logits: compute all before storing, in case they overlap.
      alignas(64) Real student_buffer[block_size], teacher_buffer[block_size];
      Real* student_out = direct_student ? student_row.at(start) : student_buffer;
      Real* teacher_out = direct_teacher ? teacher_row.at(start) : teacher_buffer;
      const int64_t target = target_ - start;
      const bool has_target = target >= 0 && target < n;
      if (to_teacher) {
        teacher_gradient(start, n, static_cast<Real>(upstream * teacher_.inverse_temperature),
                         static_cast<Real>(-teacher_target), student_scale, teacher_scale, student_logs, teacher_logs,
                         teacher_out);
        if (has_target) teacher_out[target] = static_cast<Real>(teacher_target);
        through_clamp_and_softcap(teacher_, n, t, teacher_out);
      }
      if (to_student) {
        const Real own = label_softmax_apart ? Real(0) : static_cast<Real>(label_upstream * label_rest_);
        student_gradient(start, n, static_cast<Real>(upstream * student_.inverse_temperature),
                         own - static_cast<Real>(student_target), student_scale, teacher_scale, student_logs,
                         teacher_logs, student_out);
        if (label_softmax_apart) {
          const Real scale = static_cast<Real>(label_upstream * label_rest_ / label_sum_);
          exp2_block(s, n, Tempering<Real>::at_temperature_one(student_.max), student_logs);  // whose logs have served
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) student_out[i] += scale * student_logs[i];
        }
        if (has_target) student_out[target] = static_cast<Real>(student_target + label_upstream * label_target_);
        if (label_upstream != Real(0)) {
          const int64_t label = problem_.labels[row_] - start;
          if (has_target && label == target) {
            student_out[label] = static_cast<Real>(student_target - label_upstream * label_rest_);
          } else if (label >= 0 && label < n) {
            student_out[label] -= label_upstream;
          }
        }
        through_clamp_and_softcap(student_, n, s, student_out);
      }
      if (to_student && !direct_student) student_row.store(start, n, student_out);
      if (to_teacher && !direct_teacher) teacher_row.store(start, n, teacher_out);
    });
    student_row.finish(!student_.masked);
    teacher_row.finish(!teacher_.masked);
  }

  // scale * (h_s - q H_s) + label_scale * q
  KD_INLINE void student_gradient(int64_t start, int64_t n, Real scale, Real label_scale, Real student_scale,
                                  Real teacher_scale, const Real* student_logs, const Real* teacher_logs,
                                  Real* __restrict out) const {
    const Real* kept = scratch_.student + start;
    if constexpr (renyi) {
      const Real* r = student_logs;  // see gradients()
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Real q = kept[i] * student_scale;
        out[i] = scale * (q - r[i]) + label_scale * q;
      }
    } else {
      const Real own = label_scale - scale * static_cast<Real>(sum_student_terms_);
      if constexpr (Traits::two_sweeps) {
        const Real* terms = scratch_.student_terms + start;
        const Real own_kept = own * student_scale;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = scale * terms[i] + own_kept * kept[i];
      } else if constexpr (kind == Kind::forward_kl || kind == Kind::soft_cross_entropy) {
        const Real* teacher_kept = scratch_.teacher + start;
        const Real own_kept = own * student_scale, other_kept = -scale * teacher_scale;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = own_kept * kept[i] + other_kept * teacher_kept[i];
      } else {
        const Real* teacher_kept = scratch_.teacher + start;
        const Real a = a_;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const Real q = kept[i] * student_scale;
          const auto h =
              math::terms<kind, Real>(teacher_kept[i] * teacher_scale, q, teacher_logs[i], student_logs[i], a);
          out[i] = scale * h.student + own * q;
        }
      }
    }
  }

  // scale * (h_t - p H_t) + extra * p
  KD_INLINE void teacher_gradient(int64_t start, int64_t n, Real scale, Real extra, Real student_scale,
                                  Real teacher_scale, const Real* student_logs, const Real* teacher_logs,
                                  Real* __restrict out) const {
    const Real* kept = scratch_.teacher + start;
    if constexpr (renyi) {
      const Real* r = student_logs;  // see gradients()
      const Real factor = scale * a_ / (a_ - Real(1));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Real p = kept[i] * teacher_scale;
        out[i] = factor * (r[i] - p) + extra * p;
      }
    } else {
      const Real own = extra - scale * static_cast<Real>(sum_teacher_terms_);
      if constexpr (Traits::two_sweeps) {
        const Real* terms = scratch_.teacher_terms + start;
        const Real own_kept = own * teacher_scale;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = scale * terms[i] + own_kept * kept[i];
      } else {
        const Real* student_kept = scratch_.student + start;
        const Real a = a_;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const Real p = kept[i] * teacher_scale;
          const auto h =
              math::terms<kind, Real>(p, student_kept[i] * student_scale, teacher_logs[i], student_logs[i], a);
          out[i] = scale * h.teacher + own * p;
        }
      }
    }
  }

  const RowProblem& problem_;
  const Scratch<Real>& scratch_;
  int64_t row_;
  Stream<Real> student_, teacher_;
  double parameter_;
  Real a_, b_;
  int64_t target_;                                  // the column that stands apart, or -1
  double rest_weight_ = 1;                          // of the divergence of the others
  double target_student_ = 0, target_teacher_ = 0;  // derivatives of the target's own term
  double label_rest_ = 1, label_target_ = 0;  // shares of the others and of the target in the hard label's softmax
  bool label_temperature_differs_;
  // sum exp(t) (t - s), of a soft cross-entropy sum exp(t) (-s), and sum exp(s) (s - t), relative to the maxima
  double forward_ = 0, reverse_ = 0;
  double label_sum_ = 0;  // sum exp(s - max) at temperature 1, without the target
  double log_sum_student_ = 0, log_sum_teacher_ = 0;
  double sum_student_terms_ = 0, sum_teacher_terms_ = 0, sum_value_ = 0;
  double log_affinity_ = 0;
};

template <class Real, Kind kind>
void run_row(const RowProblem& problem, const Scratch<Real>& scratch, int64_t row) {
  constexpr Kind without_skew = kind_of_row(kind, 0);
  if constexpr (without_skew != kind) {
    if (parameter_of<Real>(problem, row) == 0) {
      Row<Real, without_skew>(problem, scratch, row).run();
      return;
    }
  }
  Row<Real, kind>(problem, scratch, row).run();
}

template <class Real, Kind kind>
bool run(const RowProblem& problem) {
  const bool separate_terms = math::Traits<kind>::two_sweeps && problem.grad_student.data && problem.grad_teacher.data;
  const int64_t bytes = Scratch<Real>::bytes(problem.vocab, separate_terms,
                                             problem.student_entries.counts || problem.teacher_entries.counts);
  // Small rows go to a thread in groups, so that handing them out costs little.
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  int failed = 0;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
    const FlushSubnormals flush;
    void* memory = thread_scratch(bytes);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    const Scratch<Real> scratch(memory, problem.vocab, separate_terms);
#pragma omp for schedule(dynamic, group)
    for (int64_t row = 0; row < problem.rows; ++row) {
      if (!memory) continue;
      if (problem.active && !problem.active[row]) {
        clear_row(problem, row);
      } else {
        run_row<Real, kind>(problem, scratch, row);
      }
    }
    stream_fence();
  }
  return !failed;
}

template <class Real>
bool run_kind(const RowProblem& problem) {
  switch (static_cast<Kind>(problem.kind)) {
    case Kind::forward_kl: return run<Real, Kind::forward_kl>(problem);
    case Kind::reverse_kl: return run<Real, Kind::reverse_kl>(problem);
    case Kind::jeffreys: return run<Real, Kind::jeffreys>(problem);
    case Kind::jsd: return run<Real, Kind::jsd>(problem);
    case Kind::skew_forward_kl: return run<Real, Kind::skew_forward_kl>(problem);
    case Kind::skew_reverse_kl: return run<Real, Kind::skew_reverse_kl>(problem);
    case Kind::total_variation: return run<Real, Kind::total_variation>(problem);
    case Kind::alpha: return run<Real, Kind::alpha>(problem);
    case Kind::renyi: return run<Real, Kind::renyi>(problem);
    case Kind::alpha_beta: return run<Real, Kind::alpha_beta>(problem);
    case Kind::soft_cross_entropy: return run<Real, Kind::soft_cross_entropy>(problem);
  }
  return false;
}

}  // namespace

bool divergence(const RowProblem& problem) {
  return problem.compute_double ? run_kind<double>(problem) : run_kind<float>(problem);
}

}  // namespace kd::KD_ISA
