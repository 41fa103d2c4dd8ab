// The `sparse_divergence` family on the CPU: dense students, teachers that name some ids of each row.
//
// Sweep 1 reads the row of logits, finds the normaliser of what the teacher does not name online and keeps the
// exponentials, relative to the running maximum of their block, in a scratch row; named logits are taken out and kept
// apart. So the mass of the rest is a sum of its own, exact also where it is next to nothing. The outcomes, a few per
// row, are then computed in double precision. Sweep 2 writes the gradient: outside the named ids it is a multiple of
// the exponentials. It may be written over the logits.
#include <algorithm>

#include "cpu/gradient_row.h"
#include "math/divergence.h"
#include "math/records.h"

namespace kd::KD_ISA {
namespace {

constexpr double log_floor = logit_floor;  // log-probabilities are clamped here, as logits are
constexpr double nothing = -1e30;          // the logarithm of the probability of what is not there

// The scratch of a thread.
template <class Real>
struct Scratch {
  uint64_t* keys;  // id and place of an entry, for sorting
  double* stored;  // values as they come
  double* values;  // log p, or weights, in the order of the ids; later h_s
  double* logits;  // of the student, at the entries
  double* log_q;   // of the student, at the entries
  int32_t* ids;    // ascending, each once
  Real* exponentials;
  Real* origins;   // what a block's exponentials are relative to
  Real* gradient;  // where a list of the gradient's entries is wanted

  static constexpr int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }
  static constexpr int64_t blocks(int64_t vocab) { return (vocab + block_size - 1) / block_size; }

  static int64_t bytes(int64_t vocab, int64_t entries, bool lists) {
    const int64_t reals = (lists ? 2 : 1) * padded(vocab) + padded(blocks(vocab));
    return padded(entries) * (5 * 8 + 4) + reals * static_cast<int64_t>(sizeof(Real));
  }

  // Log-probabilities of a record, in place of the keys, which a record needs none of.
  float* decoded() const { return reinterpret_cast<float*>(keys); }

  Scratch(void* memory, int64_t vocab, int64_t entries) {
    const int64_t row = padded(entries);
    keys = static_cast<uint64_t*>(memory);
    stored = reinterpret_cast<double*>(keys + row);
    values = stored + row;
    logits = values + row;
    log_q = logits + row;
    ids = reinterpret_cast<int32_t*>(log_q + row);
    exponentials = reinterpret_cast<Real*>(ids + row);
    origins = exponentials + padded(vocab);
    gradient = origins + padded(blocks(vocab));
  }
};

// Decodes the record of a row into the scratch. False: it is malformed.
template <class Real>
bool decode(const SparseProblem& problem, const Scratch<Real>& scratch, int64_t row, double& log_tail) {
  float tail = 0;
  const bool valid = math::decode_record(problem.records + problem.offsets[row], {problem.vocab, problem.bits},
                                         problem.counts[row], scratch.ids, scratch.decoded(), &tail);
  log_tail = static_cast<double>(tail);
  return valid;
}

template <class Real>
class SparseRow {
 public:
  SparseRow(const SparseProblem& problem, const Scratch<Real>& scratch, int64_t row)
      : problem_(problem),
        scratch_(scratch),
        row_(row),
        parameter_(parameter_of<Real>(problem, row)),
        student_(problem.student, row, problem.student_softcap, per_row<Real>(problem.student_temperature, row)),
        label_temperature_differs_(problem.labels && student_.inverse_temperature != 1) {}

  void run() {
    load_entries();
    const bool gradient = problem_.grad_student.data;
    if (gradient) {
      exponentials<true>();
    } else {
      exponentials<false>();
    }
    normalise();
    const double value = outcomes();
    if (problem_.divergence) static_cast<Real*>(problem_.divergence)[row_] = static_cast<Real>(value);
    if (problem_.cross_entropy) static_cast<Real*>(problem_.cross_entropy)[row_] = static_cast<Real>(cross_entropy());
    if (gradient) gradients();
  }

 private:
  static constexpr double log_2 = Stream<Real>::log_2;
  static constexpr Real log2_e = static_cast<Real>(Stream<Real>::log2_e);
  static constexpr Real floor_ = static_cast<Real>(logit_floor);

  bool is(Policy policy) const { return problem_.policy == policy; }

  int64_t stored_id(int64_t place) const {
    const int64_t index = row_ * problem_.id_stride + place;
    return problem_.wide_ids ? static_cast<const int64_t*>(problem_.ids)[index]
                             : static_cast<const int32_t*>(problem_.ids)[index];
  }

  // A number of the teacher for this row.
  double constant() const {
    double number = 0;
    convert_block(entry_address(problem_.constants, row_, 0), problem_.constants.dtype, 1, &number);
    return number;
  }

  // The entries in the order of their ids, and the mass of the rest.
  void load_entries() {
    if (problem_.records) {
      decode_entries();
    } else {
      sort_entries();
    }
    outside_ = problem_.vocab - count_;
    if (!is(Policy::sampled)) temper_entries();
  }

  void decode_entries() {
    decode(problem_, scratch_, row_, log_tail_);
    count_ = problem_.counts[row_];
    const float* log_probs = scratch_.decoded();
    for (int64_t i = 0; i < count_; ++i) scratch_.values[i] = static_cast<double>(log_probs[i]);
  }

  void sort_entries() {
    bool ascending = true;
    int64_t found = 0;
    for (int64_t place = 0; place < problem_.entries; ++place) {
      const int64_t id = stored_id(place);
      if (id < 0 || id >= problem_.vocab) continue;
      const uint64_t key = static_cast<uint64_t>(id) << 32 | static_cast<uint64_t>(place);
      ascending = ascending && (found == 0 || scratch_.keys[found - 1] < key);
      scratch_.keys[found++] = key;
    }
    if (!ascending) std::sort(scratch_.keys, scratch_.keys + found);
    convert_block(entry_address(problem_.values, row_, 0), problem_.values.dtype, problem_.entries, scratch_.stored);
    for (int64_t i = 0; i < found; ++i) {
      const int32_t id = static_cast<int32_t>(scratch_.keys[i] >> 32);
      const double value = scratch_.stored[scratch_.keys[i] & 0xFFFFFFFFu];
      if (count_ && scratch_.ids[count_ - 1] == id) {  // drawn repeatedly
        scratch_.values[count_ - 1] += value;
        continue;
      }
      scratch_.ids[count_] = id;
      scratch_.values[count_++] = value;
    }
    if (is(Policy::sampled)) return;
    if (problem_.constants.data) {
      log_tail_ = constant();
      return;
    }
    double mass = 0;
    for (int64_t i = 0; i < count_; ++i) mass += math::exp(scratch_.values[i]);
    log_tail_ = std::log1p(mass < 1 ? -mass : -1.0);
  }

  void temper_entries() {
    double* log_p = scratch_.values;
    for (int64_t i = 0; i < count_; ++i) log_p[i] = log_p[i] < log_floor ? log_floor : log_p[i];
    log_tail_ = log_tail_ < log_floor ? log_floor : log_tail_;
    const double inverse_temperature = 1 / static_cast<double>(per_row<Real>(problem_.teacher_temperature, row_));
    if (is(Policy::renormalize) || is(Policy::uniform)) {
      const double log_count = outside_ ? std::log(static_cast<double>(outside_)) : 0;
      log_tail_ = is(Policy::uniform) && outside_ ? (log_tail_ - log_count) * inverse_temperature + log_count : nothing;
      double max = log_tail_;
      for (int64_t i = 0; i < count_; ++i) {
        log_p[i] *= inverse_temperature;
        max = max < log_p[i] ? log_p[i] : max;
      }
      double sum = math::exp(log_tail_ - max);
      for (int64_t i = 0; i < count_; ++i) sum += math::exp(log_p[i] - max);
      const double log_sum = max + std::log(sum);
      for (int64_t i = 0; i < count_; ++i) log_p[i] -= log_sum;
      if (log_tail_ > nothing) log_tail_ -= log_sum;
    }
    if (is(Policy::drop) || !outside_) log_tail_ = nothing;
  }

  // Sweep 1. The exponentials stay in the scratch row if `keep`, else in the first-level cache.
  template <bool keep>
  void exponentials() {
    alignas(64) Real buffer[block_size], cached[block_size];
    const Real hole = student_.hole();  // where a named logit was
    int64_t next = 0;
    for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
      Range<Real> range;
      const Real* s = student_.load(start, n, buffer, range);
      const int64_t first = next;
      for (; next < count_ && scratch_.ids[next] < start + n; ++next)
        scratch_.logits[next] = static_cast<double>(s[scratch_.ids[next] - start]);
      if (next > first) {
        if (s != buffer) std::memcpy(buffer, s, static_cast<size_t>(n) * sizeof(Real));
        for (int64_t i = first; i < next; ++i) buffer[scratch_.ids[i] - start] = hole;
        s = buffer;
        range.max = range_of(s, n).max;
      }
      const Real old_max = student_.max;
      student_.raise(range);
      student_.exponentiate(s, start, n, problem_.vocab, keep ? scratch_.exponentials + start : cached);
      if constexpr (keep) scratch_.origins[start / block_size] = student_.tempering.origin;
      if (label_temperature_differs_) {
        const Tempering<Real> untempered = Tempering<Real>::at_temperature_one(student_.max);
        const double fall = untempered.distance(Tempering<Real>::at_temperature_one(old_max).origin, untempered.origin);
        label_sum_ = label_sum_ * std::exp2(fall) + exp2_block(s, n, untempered, cached);
      }
      if (is(Policy::uniform)) {
        const Real max = range.max;
        for (int64_t i = first; i < next; ++i) buffer[scratch_.ids[i] - start] = max;
        Real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += s[i] - max;
        sum_outside_ += static_cast<double>(sum) + static_cast<double>(max) * static_cast<double>(n - (next - first));
      }
    });
  }

  // The logarithm to the base 2 of the sum of 2^x over the row, x tempered; `rest` is the sum outside the entries,
  // relative to the origin of `outside`.
  double log2_total(const Tempering<Real>& whole, const Tempering<Real>& outside, double rest) const {
    double sum = rest == 0 ? 0 : rest * std::exp2(outside.distance(outside.origin, whole.origin));
    for (int64_t i = 0; i < count_; ++i) sum += math::exp2(whole.of(scratch_.logits[i]));
    return std::log2(sum);
  }

  // From the sums over the rest to the log-probabilities of all outcomes. The origin is now the largest logit of the
  // row: next to that of the rest, which may be the floor, the others would lose digits.
  void normalise() {
    double max = static_cast<double>(student_.max);
    for (int64_t i = 0; i < count_; ++i) max = max < scratch_.logits[i] ? scratch_.logits[i] : max;
    whole_ = Tempering<Real>::at(static_cast<Real>(max), student_.tempering.scale);
    log2_total_ = log2_total(whole_, student_.tempering, student_.sum);
    for (int64_t i = 0; i < count_; ++i) scratch_.log_q[i] = (whole_.of(scratch_.logits[i]) - log2_total_) * log_2;
    rest_shift_ = student_.tempering.distance(student_.tempering.origin, whole_.origin);
    log_q_rest_ = outside_ ? (std::log2(student_.sum) + rest_shift_ - log2_total_) * log_2 : nothing;
    if (!label_temperature_differs_) return;
    untempered_ = Tempering<Real>::at_temperature_one(static_cast<Real>(max));
    label_log2_total_ = log2_total(untempered_, Tempering<Real>::at_temperature_one(student_.max), label_sum_);
  }

  double cross_entropy() const {
    const double logit = student_.logit(problem_.labels[row_]);
    return (label_temperature_differs_ ? label_log2_total_ - untempered_.of(logit) : log2_total_ - whole_.of(logit)) *
           log_2;
  }

  // The divergence. Leaves h_s of the entries in place of their values, and what the gradient needs besides.
  double outcomes() {
    double* values = scratch_.values;
    const double* log_q = scratch_.log_q;
    double value = 0;
    if (is(Policy::sampled)) {
      for (int64_t i = 0; i < count_; ++i) {
        value -= values[i] * log_q[i];
        values[i] = -values[i];
        sum_terms_ += values[i];
      }
      return problem_.constants.data ? value - constant() : value;
    }
    if (!count_ && (is(Policy::renormalize) || is(Policy::drop))) return 0;  // says nothing
    switch (kind_of_row(static_cast<Kind>(problem_.kind), parameter_)) {
      case Kind::forward_kl: value = sum_of_outcomes<Kind::forward_kl>(); break;
      case Kind::reverse_kl: value = sum_of_outcomes<Kind::reverse_kl>(); break;
      case Kind::jeffreys: value = sum_of_outcomes<Kind::jeffreys>(); break;
      case Kind::jsd: value = sum_of_outcomes<Kind::jsd>(); break;
      case Kind::skew_forward_kl: value = sum_of_outcomes<Kind::skew_forward_kl>(); break;
      case Kind::skew_reverse_kl: value = sum_of_outcomes<Kind::skew_reverse_kl>(); break;
      case Kind::total_variation: value = sum_of_outcomes<Kind::total_variation>(); break;
      case Kind::alpha: value = sum_of_outcomes<Kind::alpha>(); break;
      case Kind::renyi: value = renyi(); break;
      case Kind::alpha_beta: value = sum_of_outcomes<Kind::alpha_beta>(); break;
      case Kind::soft_cross_entropy: value = sum_of_outcomes<Kind::soft_cross_entropy>(); break;
    }
    return value;
  }

  template <Kind kind>
  double sum_of_outcomes() {
    double* values = scratch_.values;
    double value = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const auto here = math::outcome<kind>(values[i], scratch_.log_q[i], parameter_, problem_.b);
      value += here.value;
      values[i] = here.student;
      sum_terms_ += here.student;
    }
    if (!outside_ || is(Policy::drop)) return value;
    if (is(Policy::uniform)) {  // forward KL or soft cross-entropy: the tail's entries share a probability
      const double r = math::exp(log_tail_), count = static_cast<double>(outside_);
      const double mean_logit = sum_outside_ / count;
      const double mean_log_q = (whole_.of(mean_logit) - log2_total_) * log_2;
      even_share_ = r / count;
      sum_terms_ -= r;
      if constexpr (kind == Kind::soft_cross_entropy) return value - r * mean_log_q;
      return value + r * (log_tail_ - std::log(count) - mean_log_q);
    }
    const auto rest = math::outcome<kind>(log_tail_, log_q_rest_, parameter_, problem_.b);
    rest_term_ = rest.student;
    sum_terms_ += rest.student;
    return value + rest.value;
  }

  double renyi() {
    double* values = scratch_.values;
    const double a = parameter_;
    const bool rest = outside_ && !is(Policy::drop);
    const double rest_exponent = rest ? a * log_tail_ + (1 - a) * log_q_rest_ : nothing;
    double max = rest_exponent;
    for (int64_t i = 0; i < count_; ++i) {
      values[i] = a * values[i] + (1 - a) * scratch_.log_q[i];
      max = max < values[i] ? values[i] : max;
    }
    double sum = math::exp(rest_exponent - max);
    for (int64_t i = 0; i < count_; ++i) sum += math::exp(values[i] - max);
    const double log_affinity = max + std::log(sum);
    for (int64_t i = 0; i < count_; ++i) values[i] = -math::exp(values[i] - log_affinity);
    rest_term_ = rest ? -math::exp(rest_exponent - log_affinity) : 0;
    sum_terms_ = -1;
    return log_affinity / (a - 1);
  }

  // Sweep 2: writes the gradient.
  void gradients() const {
    const GradientRow<Real> gradient(problem_.grad_student, problem_.student_entries, scratch_.gradient, problem_,
                                     row_);
    const double upstream =
        static_cast<double>(per_row<Real>(problem_.grad_divergence, row_)) * student_.inverse_temperature;
    const double label_upstream =
        problem_.labels ? static_cast<double>(per_row<Real>(problem_.grad_cross_entropy, row_)) : 0;
    const bool label_apart = label_temperature_differs_ && label_upstream != 0;
    // What multiplies the probability of any id: of the rest it is 2^x / 2^total, of an entry exp(log_q).
    const double own = (label_apart ? 0 : label_upstream) - upstream * sum_terms_;
    const double rest =
        outside_ ? own * std::exp2(rest_shift_ - log2_total_) + upstream * rest_term_ / student_.sum : 0;
    const Real even = static_cast<Real>(-upstream * even_share_);
    const Real label_scale = static_cast<Real>(label_apart ? label_upstream * std::exp2(-label_log2_total_) : 0);
    const bool reading = label_apart || student_.masked || student_.softcap != Real(0);
    const bool direct = gradient.direct(reading);
    int64_t next = 0;
    for_blocks(problem_.vocab, [&](int64_t start, int64_t n) {
      alignas(64) Real logits[block_size], buffer[block_size];
      const Real* s = reading ? student_.load(start, n, logits) : nullptr;
      Real* out = direct ? gradient.at(start) : buffer;
      const double shift = student_.tempering.distance(scratch_.origins[start / block_size], student_.tempering.origin);
      const Real scale = static_cast<Real>(shift == 0 ? rest : rest * std::exp2(shift));
      const Real* kept = scratch_.exponentials + start;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = scale * kept[i] + even;
      for (; next < count_ && scratch_.ids[next] < start + n; ++next)
        out[scratch_.ids[next] - start] =
            static_cast<Real>(upstream * scratch_.values[next] + own * math::exp(scratch_.log_q[next]));
      if (label_apart) {
        alignas(64) Real softmax[block_size];
        exp2_block(s, n, untempered_, softmax);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] += label_scale * softmax[i];
      }
      if (label_upstream != 0) {
        const int64_t label = problem_.labels[row_] - start;
        if (label >= 0 && label < n) out[label] -= static_cast<Real>(label_upstream);
      }
      if (reading) through_clamp_and_softcap(student_, n, s, out);
      if (!direct) gradient.store(start, n, out);
    });
    gradient.finish(!student_.masked);
  }

  const SparseProblem& problem_;
  const Scratch<Real>& scratch_;
  int64_t row_;
  double parameter_;      // a of the divergence
  Stream<Real> student_;  // of what the teacher does not name
  bool label_temperature_differs_;
  int64_t count_ = 0, outside_ = 0;  // ids named and not
  double log_tail_ = nothing;        // the teacher's mass on the rest
  double log_q_rest_ = nothing;      // the student's
  Tempering<Real> whole_;            // relative to the largest logit of the whole row
  Tempering<Real> untempered_;       // the same at temperature 1
  double log2_total_ = 0;            // of the student's whole row, relative to that
  double label_log2_total_ = 0;      // the same at temperature 1
  double rest_shift_ = 0;            // from the origin of the stream to that of the whole row
  double sum_outside_ = 0;           // of the logits of the rest
  double label_sum_ = 0;             // sum exp(s - max) over the rest at temperature 1
  double sum_terms_ = 0;             // H_s
  double rest_term_ = 0;             // h_s of the rest as one outcome
  double even_share_ = 0;            // the teacher's probability of each id of the rest, if that is what it is
};

template <class Real>
bool run(SparseProblem& problem) {
  const int64_t bytes = Scratch<Real>::bytes(problem.vocab, problem.entries, problem.student_entries.counts);
  // Small rows go to a thread in groups, so that handing them out costs little.
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  int failed = 0;
  int64_t wrong_row = problem.rows;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
    const FlushSubnormals flush;
    void* memory = thread_scratch(bytes);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    const Scratch<Real> scratch(memory, problem.vocab, problem.entries);
    // All records are looked at before anything is written.
    if (problem.records) {
#pragma omp for schedule(static) reduction(min : wrong_row)
      for (int64_t row = 0; row < problem.rows; ++row) {
        double log_tail;
        if (memory && (!problem.active || problem.active[row]) && !decode(problem, scratch, row, log_tail))
          wrong_row = row < wrong_row ? row : wrong_row;
      }
    }
#pragma omp for schedule(dynamic, group)
    for (int64_t row = 0; row < problem.rows; ++row) {
      if (!memory || wrong_row < problem.rows) continue;
      if (problem.active && !problem.active[row]) {
        clear_row(problem, row);
      } else {
        SparseRow<Real>(problem, scratch, row).run();
      }
    }
    stream_fence();
  }
  problem.wrong_row = wrong_row;
  return !failed;
}

}  // namespace

bool sparse_divergence(SparseProblem& problem) {
  return problem.compute_double ? run<double>(problem) : run<float>(problem);
}

}  // namespace kd::KD_ISA
