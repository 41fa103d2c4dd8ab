// The `sparse_divergence` family on NVIDIA GPUs: dense students, teachers that name some ids of each row. Three launches.
//
// Sweep 1, a block per row, sums the exponentials of what is not named online, so that the mass of the rest is a sum of its
// own, exact also where it is next to nothing; a bit per column in shared memory tells what is named. Then a warp per row looks
// up the named logits and makes out the outcomes, a few per row, in double precision, as csrc/cpu/sparse_divergence.cpp does.
// It writes the values, and the gradients of the entries. Sweep 2 writes the gradients of the rest, which are multiples of
// exponentials, if any are wanted. The gradient may be written over the logits: what one launch overwrites no later one uses.
//
// Records are unpacked beforehand, and samples sorted by their ids, so that repeated ones are neighbours.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sides.cuh"

namespace kd::cuda {
namespace {

constexpr double log_floor = logit_floor;  // log-probabilities are clamped here, as logits are
constexpr double nothing = -1e30;          // the logarithm of the probability of what is not there
constexpr double hole = -1e30;             // stands for a logit that is left out

constexpr int most_threads = 256;
constexpr int outcome_threads = 128;
constexpr int word_bits = 32;
constexpr int64_t most_marked = 1 << 18;  // columns that have their bits in shared memory at a time: 32 KB

int64_t marked_at_once(int64_t vocab) {
  const int64_t words = (vocab + word_bits - 1) / word_bits;
  return words * word_bits < most_marked ? words * word_bits : most_marked;
}

// What one launch leaves to the next of a row.
enum Known {
  rest_max,         // of the student's rest: the largest logit
  rest_sum,         // of 2^x, x = (s - max) * scale
  rest_hard_sum,    // of exp(s - max)
  rest_sum_logits,  // where that is needed
  rest_factor,      // of 2^x in the gradient
  even_factor,      // added there: what the teacher's even share comes to
  hard_origin,      // the largest logit of the row
  hard_log_sum,     // log2 of the row's sum of exponentials at temperature 1, relative to that
  known_count,
};
static_assert(known_count == sparse_statistics);

__device__ __forceinline__ double log2_of(double x) { return math::log(x) * log2_e; }

// The entries of a row as they are stored.
struct Entries {
  const SparseProblem& problem;
  int64_t row;
  Row<double> values;

  __device__ __forceinline__ Entries(const SparseProblem& problem, int64_t row)
      : problem(problem), row(row), values(problem.values, row) {}

  __device__ __forceinline__ bool is(Policy policy) const { return problem.policy == policy; }

  // An id of the vocabulary, or -1.
  __device__ __forceinline__ int64_t stored_id(int64_t place) const {
    const int64_t index = row * problem.id_stride + place;
    const int64_t id = problem.wide_ids ? static_cast<const int64_t*>(problem.ids)[index]
                                        : static_cast<const int32_t*>(problem.ids)[index];
    return id >= 0 && id < problem.vocab ? id : -1;
  }

  // The same, but each id is at one place alone: the first of those that samples name repeatedly.
  __device__ __forceinline__ int64_t id(int64_t place) const {
    const int64_t found = stored_id(place);
    return is(Policy::sampled) && place > 0 && found == stored_id(place - 1) ? -1 : found;
  }

  // A log-probability, clamped; or the weight of all samples of the id, which are neighbours.
  __device__ __forceinline__ double value(int64_t place) const {
    double found = values.load_one(place);
    if (!is(Policy::sampled)) return found < log_floor ? log_floor : found;
    const int64_t id = stored_id(place);
    for (int64_t next = place + 1; next < problem.entries && stored_id(next) == id; ++next)
      found += values.load_one(next);
    return found;
  }

  // A number of the teacher for this row.
  __device__ __forceinline__ double constant() const { return Row<double>(problem.constants, row).load_one(0); }

  // Calls body(id, place) for every id, over the lanes of a warp or the threads of a block.
  template <class Body>
  __device__ __forceinline__ void for_each(int64_t first, int64_t step, Body body) const {
    for (int64_t place = first; place < problem.entries; place += step) {
      const int64_t found = id(place);
      if (found >= 0) body(found, place);
    }
  }
};

// One outcome with log p and log q, for every kind that is a sum over outcomes.
__device__ __forceinline__ math::Outcome<double> outcome_of(Kind kind, double log_p, double log_q, double a, double b) {
  switch (kind) {
#define KD_CASE(name) \
  case Kind::name: return math::outcome<Kind::name>(log_p, log_q, a, b);
    KD_CASE(forward_kl)
    KD_CASE(reverse_kl)
    KD_CASE(jeffreys)
    KD_CASE(jsd)
    KD_CASE(skew_forward_kl)
    KD_CASE(skew_reverse_kl)
    KD_CASE(total_variation)
    KD_CASE(alpha)
    KD_CASE(alpha_beta)
    KD_CASE(soft_cross_entropy)
#undef KD_CASE
    default: return {};
  }
}

__device__ __forceinline__ double warp_total(double own) { return over_warp(own, Add<double>{}); }
__device__ __forceinline__ double warp_max(double own) { return over_warp(own, Largest<double>{}); }

// log sum exp of what the lanes have: an online state each, in base e.
__device__ __forceinline__ double warp_log_sum(Online<double> own) {
  const double max = warp_max(own.max);
  return max + math::log(warp_total(own.sum * math::exp(own.max - max)));
}

// The outcomes of a row, by a warp.
template <class Real>
struct Outcomes {
  const SparseProblem& problem;
  Entries entries;
  Stream<Real, 1, false> student;
  double* known;
  int64_t row;
  int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  Kind kind;
  double a, b;
  double scale;                    // log2(e) / temperature
  double inverse_temperature = 1;  // of the teacher
  double log_normaliser = 0;       // of its tempered entries
  double log_tail = nothing;       // of its mass on the rest
  int64_t outside = 0;             // ids that are not named
  double row_max = 0;              // of all logits of the row
  double log2_total = 0;           // of the student's exponentials, relative to that
  double log_affinity = 0;         // of a Renyi divergence

  __device__ __forceinline__ Outcomes(const SparseProblem& problem, int64_t row)
      : problem(problem),
        entries(problem, row),
        student(problem.student, row, problem.student_softcap, problem.student_temperature, nullptr),
        known(static_cast<double*>(problem.statistics) + row * known_count),
        row(row),
        a(problem.parameters ? static_cast<double>(static_cast<const Real*>(problem.parameters)[row]) : problem.a),
        b(problem.b),
        scale(static_cast<double>(student.scale)) {
    kind = kind_of_row(static_cast<Kind>(problem.kind), a);
  }

  template <class Body>
  __device__ __forceinline__ void for_each(Body body) const {
    entries.for_each(lane, warp_lanes, body);
  }

  __device__ __forceinline__ double logit(int64_t id) const {
    return static_cast<double>(student.logits.one(id, problem.vocab));
  }

  __device__ __forceinline__ double log_q(double logit) const {
    return ((logit - row_max) * scale - log2_total) * log_2;
  }

  __device__ __forceinline__ double log_p(int64_t place) const {
    return entries.value(place) * inverse_temperature - log_normaliser;
  }

  __device__ __forceinline__ double exponent(int64_t place, double log_q) const {
    return a * log_p(place) + (1 - a) * log_q;
  }

  // The teacher's side: how its entries are tempered, and the mass of the rest.
  __device__ __forceinline__ void temper() {
    const bool drop = entries.is(Policy::drop), sampled = entries.is(Policy::sampled);
    const bool tempered = entries.is(Policy::renormalize) || entries.is(Policy::uniform);
    const bool summed = !sampled && !drop && !problem.constants.data;
    double count = 0, mass = 0;
    for_each([&](int64_t, int64_t place) {
      count += 1;
      if (summed) mass += math::exp(entries.value(place));
    });
    outside = problem.vocab - static_cast<int64_t>(warp_total(count));
    if (sampled || drop || !outside) {
      if (!tempered) return;
    } else {
      if (summed) mass = warp_total(mass);
      log_tail = summed ? log1p(mass < 1 ? -mass : -1.0) : entries.constant();
      log_tail = log_tail < log_floor ? log_floor : log_tail;
    }
    if (!tempered) return;
    inverse_temperature = 1 / static_cast<double>(of_row<Real>(problem.teacher_temperature, row));
    if (entries.is(Policy::uniform) && outside) {
      const double log_count = math::log(static_cast<double>(outside));
      log_tail = (log_tail - log_count) * inverse_temperature + log_count;
    } else {
      log_tail = nothing;
    }
    Online<double> own{nothing, 0};
    for_each([&](int64_t, int64_t place) { own = merged<double>(own, {log_p(place), 1}, log2_e); });
    if (lane == 0 && log_tail > nothing) own = merged<double>(own, {log_tail, 1}, log2_e);
    log_normaliser = warp_log_sum(own);
    if (log_tail > nothing) log_tail -= log_normaliser;
  }

  // The divergence, and the sum of h_s, by all lanes; `rest_term`: h_s of the rest as one outcome; `even_share`: the
  // teacher's probability of each id of the rest.
  __device__ __forceinline__ double value(double log_q_rest, double& sum_terms, double& rest_term, double& even_share) {
    double value = 0;
    const bool has_rest = outside > 0 && !entries.is(Policy::drop);
    if (entries.is(Policy::sampled)) {
      for_each([&](int64_t id, int64_t place) {
        const double weight = entries.value(place);
        value -= weight * log_q(logit(id));
        sum_terms -= weight;
      });
      value = warp_total(value), sum_terms = warp_total(sum_terms);
      return problem.constants.data ? value - entries.constant() : value;
    }
    if (outside == problem.vocab && (entries.is(Policy::renormalize) || entries.is(Policy::drop))) {
      log_affinity = INFINITY;
      return 0;  // says nothing
    }
    if (kind == Kind::renyi) {
      Online<double> own{nothing, 0};
      for_each([&](int64_t id, int64_t place) {
        own = merged<double>(own, {exponent(place, log_q(logit(id))), 1}, log2_e);
      });
      const double rest_exponent = a * log_tail + (1 - a) * log_q_rest;
      if (lane == 0 && has_rest) own = merged<double>(own, {rest_exponent, 1}, log2_e);
      log_affinity = warp_log_sum(own);
      rest_term = has_rest ? -math::exp(rest_exponent - log_affinity) : 0;
      sum_terms = -1;
      return log_affinity / (a - 1);
    }
    for_each([&](int64_t id, int64_t place) {
      const auto here = outcome_of(kind, log_p(place), log_q(logit(id)), a, b);
      value += here.value;
      sum_terms += here.student;
    });
    value = warp_total(value), sum_terms = warp_total(sum_terms);
    if (!has_rest) return value;
    if (entries.is(Policy::uniform)) {  // forward KL or soft cross-entropy: the tail's entries share a probability
      const double r = math::exp(log_tail), count = static_cast<double>(outside);
      const double mean_log_q = log_q(known[rest_sum_logits] / count);
      even_share = r / count;
      sum_terms -= r;
      if (kind == Kind::soft_cross_entropy) return value - r * mean_log_q;
      return value + r * (log_tail - math::log(count) - mean_log_q);
    }
    const auto of_rest = outcome_of(kind, log_tail, log_q_rest, a, b);
    rest_term = of_rest.student;
    sum_terms += of_rest.student;
    return value + of_rest.value;
  }

  // h_s of an entry.
  __device__ __forceinline__ double term(int64_t place, double log_q) const {
    if (entries.is(Policy::sampled)) return -entries.value(place);
    if (kind == Kind::renyi) return -math::exp(exponent(place, log_q) - log_affinity);
    return outcome_of(kind, log_p(place), log_q, a, b).student;
  }

  // Everything: writes the values of the row, the gradients of its entries, and what sweep 2 needs.
  __device__ __forceinline__ void settle() {
    const bool hard_apart = problem.labels && student.temperature != Real(1);
    const double max = known[rest_max], sum = known[rest_sum];
    temper();
    double named_max = nothing;
    for_each([&](int64_t id, int64_t) { named_max = merged_max(named_max, logit(id)); });
    named_max = warp_max(named_max);
    row_max = merged_max(max, named_max);
    double named_sum = 0, named_hard_sum = 0;
    for_each([&](int64_t id, int64_t) {
      const double gap = logit(id) - row_max;
      named_sum += math::exp2(gap * scale);
      if (hard_apart) named_hard_sum += math::exp(gap);
    });
    // Before any lane writes: the label may be named.
    const int64_t label = problem.labels ? problem.labels[row] : -1;
    const bool labelled = label >= 0 && label < problem.vocab;
    const double label_gap = labelled ? logit(label) - row_max : 0;
    __syncwarp();
    const double rest_shift = (max - row_max) * scale;
    log2_total = log2_of(warp_total(named_sum) + sum * math::exp2(rest_shift));
    const double log_q_rest = outside ? (log2_of(sum) + rest_shift - log2_total) * log_2 : nothing;
    const double log2_hard =
        hard_apart ? log2_of(warp_total(named_hard_sum) + known[rest_hard_sum] * math::exp(max - row_max)) : log2_total;

    double sum_terms = 0, rest_term = 0, even_share = 0;
    const double divergence = value(log_q_rest, sum_terms, rest_term, even_share);
    if (lane == 0) {
      static_cast<Real*>(problem.divergence)[row] = static_cast<Real>(divergence);
      if (problem.labels)
        static_cast<Real*>(problem.cross_entropy)[row] =
            labelled ? static_cast<Real>((log2_hard - label_gap * (hard_apart ? log2_e : scale)) * log_2)
                     : static_cast<Real>(NAN);
    }
    const Stored<Real> gradient(problem.grad_student, row);
    if (!gradient.data) return;

    const double upstream =
        static_cast<double>(of_row<Real>(problem.grad_divergence, row)) / static_cast<double>(student.temperature);
    const double label_upstream =
        problem.labels ? static_cast<double>(of_row<Real>(problem.grad_cross_entropy, row)) : 0;
    // What multiplies the probability of any id, where that at temperature 1 is the same.
    const double own = (hard_apart ? 0 : label_upstream) - upstream * sum_terms;
    if (lane == 0) {
      known[rest_factor] = outside ? own * math::exp2(rest_shift - log2_total) + upstream * rest_term / sum : 0.0;
      known[even_factor] = -upstream * even_share;
      known[hard_origin] = row_max;
      known[hard_log_sum] = log2_hard;
    }
    for_each([&](int64_t id, int64_t place) {
      const double here = logit(id), log_probability = log_q(here);
      double found = upstream * term(place, log_probability) + own * math::exp(log_probability);
      if (hard_apart) found += label_upstream * math::exp2((here - row_max) * log2_e - log2_hard);
      if (id == label) found -= label_upstream;
      gradient.store_one(id, student.through_clamp_and_softcap(static_cast<Real>(found), static_cast<Real>(here)));
    });
  }
};

// Which columns are named, of those from `start` on that are marked at a time.
struct Marks {
  SharedView<unsigned> words;
  int64_t size;

  // By all threads.
  __device__ __forceinline__ void set(const Entries& entries, int64_t start) const {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size / word_bits; i += blockDim.x) words[i] = 0u;
    __syncthreads();
    for (int64_t place = threadIdx.x; place < entries.problem.entries; place += blockDim.x) {
      const int64_t column = entries.stored_id(place) - start;
      if (column >= 0 && column < size) atomicOr(KD_PLACE(words[column / word_bits]), 1u << (column % word_bits));
    }
    __syncthreads();
  }

  // A bit for each of a thread's columns of a step that is named, or not there.
  template <int entries>
  __device__ __forceinline__ unsigned left_out(const Columns& columns, bool whole, int64_t start) const {
    const int64_t first = columns.first - start;
    if (whole && columns.step == 1 && entries == most_entries)
      return words[first / word_bits] >> (first % word_bits) & ((1u << most_entries) - 1);
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const int64_t column = columns.at(i) - start;
      if (!columns.valid(i) || (words[column / word_bits] >> (column % word_bits) & 1u)) found |= 1u << i;
    }
    return found;
  }
};

// The bits of a row go by in parts, each a row of columns of its own.
struct Parts {
  int64_t vocab;
  int64_t marked;

  __device__ __forceinline__ int64_t last() const { return (vocab - 1) / marked * marked; }

  // Calls body(columns, whole) for all steps of this thread in the part from `start` on.
  template <int entries, class Body>
  __device__ __forceinline__ void for_steps_of(int64_t start, bool adjacent, Body body) const {
    const int64_t length = vocab - start < marked ? vocab - start : marked;
    for_steps<entries>(length, adjacent, [&](const Columns& columns, bool whole) {
      body(Columns{columns.first + start, columns.step, vocab}, whole);
    });
  }
};

template <class Real, bool general>
__global__ void __launch_bounds__(most_threads) rest_kernel(SparseProblem problem, bool adjacent, int64_t marked) {
  constexpr int entries = general ? 1 : most_entries;
  constexpr Real to_binary = static_cast<Real>(log2_e);
  KD_DYNAMIC_SHARED(unsigned, words);
  KD_SHARED(Real, scratch, warp_lanes);
  KD_SHARED(double, double_scratch, warp_lanes);
  const BlockSums<Real> block{scratch};
  const int64_t row = blockIdx.x;
  if (problem.active && !problem.active[row]) return;
  Stream<Real, entries, false> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                       nullptr);
  const Entries named(problem, row);
  const Marks marks{words, marked};
  const Parts parts{problem.vocab, marked};
  const bool hard_apart = problem.labels && student.temperature != Real(1);
  const bool even = problem.policy == Policy::uniform;
  Real hard = 0;
  double sum_logits = 0;
  for (int64_t start = 0; start < problem.vocab; start += marked) {
    marks.set(named, start);
    parts.for_steps_of<entries>(start, adjacent, [&](const Columns& columns, bool whole) {
      Real s[entries];
      student.logits.load(columns, whole, s);
      const unsigned left_out = marks.template left_out<entries>(columns, whole, start);
      if (left_out) {
#pragma unroll
        for (int i = 0; i < entries; ++i)
          if (left_out >> i & 1u) s[i] = static_cast<Real>(hole);
      }
      const Real old_max = student.max;
      student.raise(s);
#pragma unroll
      for (int i = 0; i < entries; ++i) student.sum += math::exp2(student.exponent(s[i]));
      if (hard_apart) {
        hard *= math::exp2((old_max - student.max) * to_binary);
#pragma unroll
        for (int i = 0; i < entries; ++i) hard += math::exp2((s[i] - student.max) * to_binary);
      }
      if (even) {
        Real gaps = 0;
#pragma unroll
        for (int i = 0; i < entries; ++i) gaps += left_out >> i & 1u ? Real(0) : s[i] - student.max;
        sum_logits += static_cast<double>(gaps) +
                      static_cast<double>(student.max) * static_cast<double>(entries - __popc(left_out));
      }
    });
  }
  const Real max = block.max(student.max);
  const Real sum = block.total(student.sum * math::exp2((student.max - max) * student.scale));
  const Real hard_sum = hard_apart ? block.total(hard * math::exp2((student.max - max) * to_binary)) : Real(0);
  const double all_logits = even ? BlockSums<double>{double_scratch}.total(sum_logits) : 0;
  if (threadIdx.x != 0) return;
  double* const known = static_cast<double*>(problem.statistics) + row * known_count;
  known[rest_max] = static_cast<double>(max), known[rest_sum] = static_cast<double>(sum);
  known[rest_hard_sum] = static_cast<double>(hard_sum), known[rest_sum_logits] = all_logits;
}

template <class Real>
__global__ void __launch_bounds__(outcome_threads) outcomes_kernel(SparseProblem problem) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (outcome_threads / warp_lanes) + threadIdx.x / warp_lanes;
  if (row >= problem.rows) return;
  if (!problem.active || problem.active[row]) {
    Outcomes<Real>(problem, row).settle();
  } else if (threadIdx.x % warp_lanes == 0) {
    static_cast<Real*>(problem.divergence)[row] = 0;
    if (problem.labels) static_cast<Real*>(problem.cross_entropy)[row] = 0;
  }
}

template <class Real, bool general>
__global__ void __launch_bounds__(most_threads) gradient_kernel(SparseProblem problem, bool adjacent, int64_t marked) {
  constexpr int entries = general ? 1 : most_entries;
  constexpr Real to_binary = static_cast<Real>(log2_e);
  KD_DYNAMIC_SHARED(unsigned, words);
  const int64_t row = blockIdx.x;
  const Stored<Real> gradient(problem.grad_student, row);
  if (problem.active && !problem.active[row]) {
    for_steps<entries>(problem.vocab, adjacent, [&](const Columns& columns, bool whole) {
      const Real zeros[entries] = {};
      gradient.template store<entries>(columns, whole, zeros);
    });
    return;
  }
  Stream<Real, entries, false> student(problem.student, row, problem.student_softcap, problem.student_temperature,
                                       nullptr);
  const Entries named(problem, row);
  const Marks marks{words, marked};
  const Parts parts{problem.vocab, marked};
  const double* const known = static_cast<const double*>(problem.statistics) + row * known_count;
  const Real factor = static_cast<Real>(known[rest_factor]), share = static_cast<Real>(known[even_factor]);
  const Real origin = static_cast<Real>(known[hard_origin]), log_hard = static_cast<Real>(known[hard_log_sum]);
  const bool hard_apart = problem.labels && student.temperature != Real(1);
  const Real label_factor = problem.labels ? of_row<Real>(problem.grad_cross_entropy, row) : Real(0);
  const int64_t label = problem.labels ? problem.labels[row] : -1;
  student.max = static_cast<Real>(known[rest_max]);
  for (int64_t start = 0; start < problem.vocab; start += marked) {
    marks.set(named, start);
    parts.for_steps_of<entries>(start, adjacent, [&](const Columns& columns, bool whole) {
      Real s[entries], out[entries];
      student.logits.load(columns, whole, s);
      const unsigned left_out = marks.template left_out<entries>(columns, whole, start);
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        out[i] = factor * math::exp2(student.exponent(s[i])) + share;
        if (hard_apart) out[i] += label_factor * math::exp2((s[i] - origin) * to_binary - log_hard);
        if (columns.at(i) == label) out[i] -= label_factor;
        out[i] = student.through_clamp_and_softcap(out[i], s[i]);
      }
      if (left_out) {
#pragma unroll
        for (int i = 0; i < entries; ++i)
          if (!(left_out >> i & 1u)) gradient.store_one(columns.at(i), out[i]);
      } else {
        gradient.template store<entries>(columns, whole, out);
      }
    });
  }
}

template <class Real, bool general>
std::string run(const SparseProblem& problem, void* stream_address) {
  const auto stream = static_cast<LaunchStream>(stream_address);
  const auto rows = static_cast<unsigned>(problem.rows);
  const unsigned threads = threads_for(problem.vocab, general ? 1 : most_entries, most_threads);
  const int64_t marked = marked_at_once(problem.vocab);
  const size_t shared = static_cast<size_t>(marked / word_bits) * sizeof(unsigned);
  const bool adjacent = !general && aligned(problem.student) && aligned(problem.grad_student);
  std::string error = launch("sparse_divergence: rest", rest_kernel<Real, general>, rows, threads, shared, stream,
                             problem, adjacent, marked);
  constexpr unsigned rows_at_once = outcome_threads / warp_lanes;
  if (error.empty())
    error = launch("sparse_divergence: outcomes", outcomes_kernel<Real>, (rows + rows_at_once - 1) / rows_at_once,
                   outcome_threads, 0, stream, problem);
  if (error.empty() && problem.grad_student.data)
    error = launch("sparse_divergence: gradient", gradient_kernel<Real, general>, rows, threads, shared, stream,
                   problem, adjacent, marked);
  return error;
}

}  // namespace

std::string sparse_divergence(SparseProblem& problem, void* stream) {
  problem.wrong_row = problem.rows;  // none: records are unpacked beforehand
  if (!problem.rows) return {};
  return problem.compute_double ? run<double, true>(problem, stream) : run<float, false>(problem, stream);
}

}  // namespace kd::cuda
