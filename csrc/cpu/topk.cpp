// The `topk` family on the CPU: the largest logits of a row, and draws from its softmax.
#include <algorithm>
#include <limits>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

// A logit so low that its exponential is 0 whatever the origin of a stream, and every product with
// the scale is finite.
template <class Real>
Real vanishing_logit(double temperature) {
  return static_cast<Real>(2 * logit_floor - 1e4 * temperature);
}

// Floating-point numbers as integers of the same order; -0 comes right below 0.
inline int32_t ordered_key(float value) {
  const int32_t bits = math::bit_cast<int32_t>(value);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
inline int64_t ordered_key(double value) {
  const int64_t bits = math::bit_cast<int64_t>(value);
  return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF);
}
inline float from_ordered_key(int32_t key) { return math::bit_cast<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }
inline double from_ordered_key(int64_t key) { return math::bit_cast<double>(key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)); }

// Logits with their ids, in the order of the ids.
template <class Real>
struct Entries {
  Real* logits;
  int32_t* ids;

  Entries operator+(int64_t n) const { return {logits + n, ids + n}; }
};

// Entries above the threshold are appended to `above`, and `rest` gets `low` in their place; the
// others get there as they are in `values`. Without `ids` these count from first_id. NaN is not
// above. Returns how many were. `above` may be the very entries that are read, or lie before them.
template <class Real>
inline int64_t set_apart(const Real* logits, const int32_t* ids, int64_t first_id, int64_t n, Real threshold,
                         const Real* values, Real low, Entries<Real> above, Real* __restrict rest) {
  int64_t count = 0;
  constexpr int64_t group = 32;
  for (int64_t start = 0; start < n; start += group) {
    const int64_t end = n - start < group ? n : start + group;
#pragma omp simd
    for (int64_t i = start; i < end; ++i) rest[i] = logits[i] > threshold ? low : values[i];
    if (count_above(logits + start, end - start, threshold) == 0) continue;
    for (int64_t i = start; i < end; ++i) {
      const Real logit = logits[i];
      const int32_t id = ids ? ids[i] : static_cast<int32_t>(first_id + i);
      above.logits[count] = logit;
      above.ids[count] = id;
      count += logit > threshold;
    }
  }
  return count;
}

#if defined(__AVX512F__)
template <>
inline int64_t set_apart<float>(const float* logits, const int32_t* ids, int64_t first_id, int64_t n, float threshold,
                                const float* values, float low, Entries<float> above, float* __restrict rest) {
  const __m512 bound = _mm512_set1_ps(threshold), lowest = _mm512_set1_ps(low);
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1u);
    const __m512 logit = _mm512_maskz_loadu_ps(lanes, logits + i);
    const __m512 value = _mm512_maskz_loadu_ps(lanes, values + i);
    const __mmask16 found = _mm512_mask_cmp_ps_mask(lanes, logit, bound, _CMP_GT_OQ);
    _mm512_mask_storeu_ps(rest + i, lanes, _mm512_mask_mov_ps(value, found, lowest));
    if (found == 0) continue;
    const __m512i id = ids ? _mm512_maskz_loadu_epi32(lanes, ids + i)
                           : _mm512_add_epi32(places, _mm512_set1_epi32(static_cast<int32_t>(first_id + i)));
    const int number = __builtin_popcount(found);
    const __mmask16 first = static_cast<__mmask16>((1u << number) - 1u);
    _mm512_mask_storeu_ps(above.logits + count, first, _mm512_maskz_compress_ps(found, logit));
    _mm512_mask_storeu_epi32(above.ids + count, first, _mm512_maskz_compress_epi32(found, id));
    count += number;
  }
  return count;
}
#endif

// The k largest entries of a row while it streams by.
//
// A threshold that k entries exceed separates candidates from the rest, whose exponentials are
// summed relative to the threshold: so neither the rest's mass nor that of the named entries is ever
// a difference. When there are many candidates, the threshold rises and the losers join the rest.
template <class Real>
struct Selection {
  const TopKProblem& problem;
  Stream<Real> raw;   // without softcap: this is the order, in which saturated logits still differ
  Stream<Real> rest;  // its origin is the threshold
  Real threshold = static_cast<Real>(logit_floor);
  Real low;
  Entries<Real> candidates;
  int64_t count = 0;
  alignas(64) Real raw_buffer[block_size];
  alignas(64) Real buffer[block_size];
  alignas(64) Real rest_buffer[block_size];
  alignas(64) Real exp_buffer[block_size];

  Selection(const TopKProblem& problem, int64_t row, Entries<Real> candidates)
      : problem(problem),
        raw(problem.source, row, 0, problem.temperature),
        rest(problem.source, row, problem.softcap, problem.temperature),
        low(vanishing_logit<Real>(problem.temperature)),
        candidates(candidates) {
    raise_origin(rest);
  }

  // More candidates than this are not gathered before they are sorted out.
  static int64_t limit(int64_t k) { return 2 * k + 64; }
  static int64_t room(const TopKProblem& problem) { return std::min(limit(problem.k), problem.vocab) + block_size; }

  // A logit as the softmax sees it.
  Real effective(Real logit) const {
    if (problem.softcap == 0) return logit;
    const Matrix one{&logit, 0, sizeof(Real) == 4 ? DType::float32 : DType::float64};
    return static_cast<Real>(Stream<Real>(one, 0, problem.softcap, problem.temperature).logit(0));
  }

  void raise_origin(Stream<Real>& stream) const {
    const Real value = effective(threshold);
    stream.raise({value, value});
  }

  void read_row() {
    for (int64_t start = 0; start < problem.vocab; start += block_size) {
      const int64_t n = std::min(problem.vocab - start, block_size);
      Range<Real> range;
      const Real* logits = raw.load(start, n, raw_buffer, range);
      const Real* values = problem.softcap != 0 ? rest.load(start, n, buffer) : logits;
      if (range.max > threshold) {
        count += set_apart(logits, nullptr, start, n, threshold, values, low, candidates + count, rest_buffer);
        values = rest_buffer;
      }
      rest.exponentiate(values, start, n, problem.vocab, exp_buffer);
      if (count > limit(problem.k)) keep_largest();
    }
    if (count > problem.k) keep_largest();
    // Exponentials far below the threshold's underflow, which shows once they are most of the sum.
    constexpr Real dust = std::numeric_limits<Real>::min() / std::numeric_limits<Real>::epsilon() * Real(1 << 25);
    if (count < problem.vocab && rest.sum < static_cast<double>(dust)) sum_rest_again();
  }

  // Leaves k of more than k candidates: among equal ones, those of the lowest ids.
  void keep_largest() {
    // The k-th largest lies between the two; a zero has two keys.
    const Range<Real> range = range_of(candidates.logits, count);
    auto low_key = ordered_key(range.min) - 2;  // exceeded by k at least
    auto high_key = ordered_key(range.max);     // by fewer
    int64_t split = count;                      // up to here an entry need only exceed the lower of these
    while (true) {
      const auto middle_key = (low_key & high_key) + ((low_key ^ high_key) >> 1);
      if (middle_key == low_key) {  // the k-th is equal to the next
        const Real lower = from_ordered_key(low_key), upper = from_ordered_key(high_key);
        int64_t equal = problem.k - count_above(candidates.logits, count, upper);
        for (split = 0; equal > 0; ++split)
          equal -= candidates.logits[split] > lower && !(candidates.logits[split] > upper);
        break;
      }
      const int64_t exceeding = count_above(candidates.logits, count, from_ordered_key(middle_key));
      if (exceeding >= problem.k) {
        low_key = middle_key;
      } else {
        high_key = middle_key;
      }
      if (exceeding == problem.k) {
        high_key = low_key;
        break;
      }
    }
    threshold = from_ordered_key(high_key);
    raise_origin(rest);
    int64_t kept = partition(0, split, from_ordered_key(low_key), 0);
    kept = partition(split, count, threshold, kept);
    count = kept;
  }

  // Appends the candidates in [begin, end) above a bound to the first `kept`; the others join the rest.
  int64_t partition(int64_t begin, int64_t end, Real bound, int64_t kept) {
    const Matrix row{candidates.logits, 0, sizeof(Real) == 4 ? DType::float32 : DType::float64};
    const Stream<Real> stream(row, 0, problem.softcap, problem.temperature);
    for (int64_t start = begin; start < end; start += block_size) {
      const int64_t n = std::min(end - start, block_size);
      const Entries<Real> block = candidates + start;
      kept += set_apart(block.logits, block.ids, 0, n, bound, stream.load(start, n, buffer), low, candidates + kept,
                        rest_buffer);
      rest.sum += exp2_block(rest_buffer, n, rest.tempering, exp_buffer);
    }
    return kept;
  }

  // The sum of the rest relative to its own maximum.
  void sum_rest_again() {
    const Real bound = threshold;
    Real highest = static_cast<Real>(logit_floor);
    for (int64_t start = 0; start < problem.vocab; start += block_size) {
      const int64_t n = std::min(problem.vocab - start, block_size);
      const Real* logits = raw.load(start, n, raw_buffer);
#pragma omp simd reduction(max : highest)
      for (int64_t i = 0; i < n; ++i) highest = logits[i] <= bound && logits[i] > highest ? logits[i] : highest;
    }
    threshold = highest;
    Stream<Real> again(problem.source, rest.row, problem.softcap, problem.temperature);
    raise_origin(again);
    for (int64_t start = 0; start < problem.vocab; start += block_size) {
      const int64_t n = std::min(problem.vocab - start, block_size);
      const Real* logits = raw.load(start, n, raw_buffer);
      const Real* values = problem.softcap != 0 ? again.load(start, n, buffer) : logits;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rest_buffer[i] = logits[i] > bound ? low : values[i];
      again.exponentiate(rest_buffer, start, n, problem.vocab, exp_buffer);
    }
    rest = again;
  }

  // Writes the result; `order` has room for the candidates.
  void finish(int64_t* ids, Real* log_probs, Real& log_tail_mass, std::pair<Real, int32_t>* order) const {
    for (int64_t i = 0; i < count; ++i) order[i] = {candidates.logits[i], candidates.ids[i]};
    std::sort(order, order + count, [](const auto& one, const auto& other) {
      return one.first > other.first || (one.first == other.first && one.second < other.second);
    });
    // In double precision, relative to the largest and with the exact temperature.
    const double top = static_cast<double>(count ? effective(order[0].first) : rest.max);
    const auto relative = [&](Real logit) { return (static_cast<double>(logit) - top) * rest.inverse_temperature; };
    const double rounded_away = static_cast<double>(rest.tempering(rest.max)) * Stream<Real>::log_2;
    const double log_rest = rest.log_sum() - rounded_away + relative(rest.max);
    double total = std::exp(log_rest);
    for (int64_t i = 0; i < count; ++i) total += std::exp(relative(effective(order[i].first)));
    const double log_total = std::log(total);
    const double nan = std::nan("");
    const bool valid = std::isfinite(log_total);
    const int64_t named = valid ? count : 0;
    for (int64_t i = 0; i < named; ++i) {
      ids[i] = order[i].second;
      log_probs[i] = static_cast<Real>(relative(effective(order[i].first)) - log_total);
    }
    std::fill(ids + named, ids + problem.k, -1);
    std::fill(log_probs + named, log_probs + problem.k,
              static_cast<Real>(valid ? -std::numeric_limits<double>::infinity() : nan));
    log_tail_mass = static_cast<Real>(valid ? log_rest - log_total : nan);
  }
};

template <class Real>
bool pick_row(const TopKProblem& problem, int64_t row) {
  using Pair = std::pair<Real, int32_t>;
  const int64_t room = (Selection<Real>::room(problem) + 15) / 16 * 16;
  void* memory = thread_scratch(room * static_cast<int64_t>(sizeof(Real) + sizeof(int32_t) + sizeof(Pair)));
  if (!memory) return false;
  Pair* order = static_cast<Pair*>(memory);
  Real* logits = reinterpret_cast<Real*>(order + room);
  Selection<Real> selection(problem, row, {logits, reinterpret_cast<int32_t*>(logits + room)});
  selection.read_row();
  selection.finish(problem.ids + row * problem.k, static_cast<Real*>(problem.log_probs) + row * problem.k,
                   static_cast<Real*>(problem.log_tail_mass)[row], order);
  return true;
}

// A sum of exponentials by blocks of the vocabulary, which draws find their block by.
struct BlockSum {
  double sum;    // then the sums up to here
  double level;  // of the origin that the sum is relative to
};

// Draws by inverting the distribution function: first among the blocks, then among the runs of a
// block, then within the run.
template <class Real>
void draw(const SampleProblem& problem, int64_t row, BlockSum* sums, int32_t* order) {
  const bool tempered = problem.proposal_temperature != problem.temperature;
  Stream<Real> teacher(problem.source, row, problem.softcap, problem.temperature);
  Stream<Real> proposal(problem.source, row, problem.softcap, problem.proposal_temperature);
  // Low enough for both.
  const Real low = vanishing_logit<Real>(std::max(problem.temperature, problem.proposal_temperature));
  alignas(64) Real buffer[block_size], rest[block_size], powers[block_size];

  // Masked entries are never drawn: their exponentials are 0, not merely small.
  const auto load = [&](int64_t start, int64_t n, Range<Real>& range) {
    const Real* block = teacher.load(start, n, buffer, range);
    constexpr Real floor = static_cast<Real>(logit_floor);
    if (range.min > floor) return block;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rest[i] = block[i] <= floor ? low : block[i];
    return static_cast<const Real*>(rest);
  };

  double weighted = 0, level = 0;
  int64_t blocks = 0;
  for (int64_t start = 0; start < problem.vocab; start += block_size) {
    const int64_t n = std::min(problem.vocab - start, block_size);
    Range<Real> range;
    const Real* block = load(start, n, range);
    const double old_sum = teacher.sum;
    const double shift = teacher.raise(range);
    if (shift != 0) weighted = (weighted + old_sum * shift) * std::exp2(shift);
    level += proposal.raise(range);
    const double sum_before = teacher.sum;
    teacher.sum = 0;
    teacher.exponentiate(block, start, n, problem.vocab, powers);
    double block_sum = teacher.sum;
    teacher.sum += sum_before;
    const Tempering<Real> temper = teacher.tempering;
    Real block_weighted = 0;
#pragma omp simd reduction(+ : block_weighted)
    for (int64_t i = 0; i < n; ++i) block_weighted += powers[i] * temper(block[i]);
    weighted += block_weighted;
    if (tempered) block_sum = exp2_block(block, n, proposal.tempering, powers);
    proposal.sum += block_sum;
    sums[blocks++] = {block_sum, level};
  }

  const int64_t draws = problem.draws;
  int64_t* ids = problem.ids + row * draws;
  Real* weights = static_cast<Real*>(problem.weights) + row * draws;
  Real& entropy = static_cast<Real*>(problem.entropy)[row];
  const bool valid = std::isfinite(teacher.sum) && std::isfinite(proposal.sum);
  if (!valid || !(teacher.sum > 0 && proposal.sum > 0)) {  // NaN, or a vocabulary that is masked altogether
    const Real nothing = valid ? Real(0) : static_cast<Real>(std::nan(""));
    std::fill(ids, ids + draws, -1);
    std::fill(weights, weights + draws, nothing);
    entropy = nothing;
    return;
  }
  entropy = static_cast<Real>(teacher.log_sum() - weighted / teacher.sum * Stream<Real>::log_2);

  double total = 0;
  int64_t last = 0;  // block that can be drawn from
  for (int64_t block = 0; block < blocks; ++block) {
    const double sum = sums[block].sum * std::exp2(level - sums[block].level);
    if (sum > 0) last = block;
    sums[block].sum = total += sum;
  }
  const double* uniforms = problem.uniforms + row * draws;
  for (int64_t i = 0; i < draws; ++i) order[i] = static_cast<int32_t>(i);
  std::sort(order, order + draws, [&](int32_t one, int32_t other) { return uniforms[one] < uniforms[other]; });

  constexpr int64_t run = 32;
  double run_sums[block_size / run];
  int64_t block = 0, loaded = -1, start = 0, n = 0, last_run = 0;
  double block_total = 0;
  const Real* logits = nullptr;
  for (int64_t i = 0; i < draws; ++i) {
    const double target = uniforms[order[i]] * total;
    while (block < last && sums[block].sum <= target) ++block;
    if (block != loaded) {
      loaded = block;
      start = block * block_size;
      n = std::min(problem.vocab - start, block_size);
      Range<Real> range;
      logits = load(start, n, range);
      // Relative to the block's own maximum, so that something of it is left however small it is.
      exp2_block(logits, n, Tempering<Real>::at(range.max, proposal.tempering.scale), powers);
      block_total = 0;
      for (int64_t r = 0; r * run < n; ++r) {
        Real sum = 0;
        for (int64_t j = r * run; j < std::min(n, (r + 1) * run); ++j) sum += powers[j];
        run_sums[r] = static_cast<double>(sum);
        if (sum > 0) last_run = r;
        block_total += run_sums[r];
      }
    }
    const double before = block ? sums[block - 1].sum : 0;
    double left = (target - before) / (sums[block].sum - before) * block_total;
    int64_t r = 0;
    while (r < last_run && left >= run_sums[r]) left -= run_sums[r++];
    int64_t drawn = -1;
    for (int64_t j = r * run; j < std::min(n, (r + 1) * run); ++j) {
      if (!(powers[j] > 0)) continue;
      drawn = j;
      left -= static_cast<double>(powers[j]);
      if (left < 0) break;
    }
    double ratio = 1;
    if (tempered) {
      const double logit = static_cast<double>(logits[drawn]);
      ratio = std::exp(teacher.log_probability(logit) - proposal.log_probability(logit));
    }
    ids[order[i]] = start + drawn;
    weights[order[i]] = static_cast<Real>(ratio / static_cast<double>(draws));
  }
}

template <class Real>
bool sample_row(const SampleProblem& problem, int64_t row) {
  const int64_t blocks = (problem.vocab + block_size - 1) / block_size;
  void* memory = thread_scratch(blocks * static_cast<int64_t>(sizeof(BlockSum)) +
                                problem.draws * static_cast<int64_t>(sizeof(int32_t)));
  if (!memory) return false;
  BlockSum* sums = static_cast<BlockSum*>(memory);
  draw<Real>(problem, row, sums, reinterpret_cast<int32_t*>(sums + blocks));
  return true;
}

template <class Problem>
bool each_row(const Problem& problem, bool (*run_row)(const Problem&, int64_t)) {
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
  bool done = true;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, group) \
    reduction(&& : done)
  for (int64_t row = 0; row < problem.rows; ++row) done = run_row(problem, row) && done;
  return done;
}

}  // namespace

bool topk(const TopKProblem& problem) {
  return each_row(problem, problem.compute_double ? pick_row<double> : pick_row<float>);
}

bool sample(const SampleProblem& problem) {
  return each_row(problem, problem.compute_double ? sample_row<double> : sample_row<float>);
}

}  // namespace kd::KD_ISA
