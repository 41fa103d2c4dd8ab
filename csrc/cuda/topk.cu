// The `topk` family on NVIDIA GPUs: a block per row.
//
// Top-k: a sweep counts how often each value of the highest bits of a logit occurs, which says where the k-th largest lies; a
// last sweep gathers what may be among the k and sums the exponentials of the rest. What was gathered is sorted on chip, and
// what comes behind the first k joins the rest. Where the highest bits leave more than fits there, further sweeps count the
// next ones, of the logits and at last of the ids, which tell equal logits apart. Nothing depends on the order of threads.
//
// Draws: one sweep sums the exponentials of segments of the row, then a warp per draw finds the segment and the id in it.
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sides.cuh"

namespace kd::cuda {
namespace {

constexpr int most_threads = 512;

// Entries of a thread and step.
template <class Real>
constexpr int entries_of = sizeof(Real) == 4 ? most_entries : 2;

// Unsigned integers in the order of the logits, 0 for those that are never named: at the floor, below it, and NaN.
__device__ __forceinline__ uint32_t ordered_key(float logit) {
  const uint32_t bits = math::bit_cast<uint32_t>(logit + 0.0f);  // -0 equals 0
  return logit > static_cast<float>(logit_floor) ? bits >> 31 ? ~bits : bits | 0x80000000u : 0u;
}
__device__ __forceinline__ uint64_t ordered_key(double logit) {
  const uint64_t bits = math::bit_cast<uint64_t>(logit + 0.0);
  return logit > logit_floor ? bits >> 63 ? ~bits : bits | 0x8000000000000000ull : 0ull;
}

// Trailing bits of a key that logits of a dtype do not use.
__device__ __forceinline__ int unused_bits(DType dtype) {
  return dtype == DType::bfloat16 ? 16 : dtype == DType::float16 ? 13 : 0;
}

// Which entries may be the k-th: those whose key lies between two others and, where all these are equal, whose rank from the
// last id on does.
template <class Key>
struct Bin {
  Key lowest = 1;  // masked entries have the key 0
  Key highest = ~Key(0);
  uint32_t lowest_rank = 0;
  uint32_t highest_rank = ~uint32_t(0);

  __device__ __forceinline__ bool holds(Key key, uint32_t rank) const {
    return key >= lowest && key <= highest && rank >= lowest_rank && rank <= highest_rank;
  }
  // Whether it holds an entry, or lies below it.
  __device__ __forceinline__ bool reached_by(Key key, uint32_t rank) const {
    return key > highest || (key >= lowest && rank >= lowest_rank);
  }
};

constexpr int digit_bits = 11;
constexpr int digits = 1 << digit_bits;

// Which bits of an entry a sweep counts: those from `shift` on.
struct Digit {
  bool of_rank;
  int shift;
};

template <class Key>
__device__ __forceinline__ int digit_of(Digit digit, Key key, uint32_t rank) {
  return static_cast<int>((digit.of_rank ? Key(rank) : key) >> digit.shift & (digits - 1));
}

// The bin of those entries whose digit this is.
template <class Key>
__device__ __forceinline__ Bin<Key> narrowed(Bin<Key> bin, Digit digit, int value) {
  if (digit.of_rank) {
    bin.lowest_rank |= static_cast<uint32_t>(value) << digit.shift;
    bin.highest_rank = bin.lowest_rank | ((uint32_t(1) << digit.shift) - 1);
  } else {
    const Key before = bin.lowest == 1 ? 0 : bin.lowest;
    const Key prefix = before | static_cast<Key>(value) << digit.shift;
    bin.lowest = prefix ? prefix : 1;
    bin.highest = prefix | ((Key(1) << digit.shift) - 1);
  }
  return bin;
}

template <class Real>
struct Entry {
  Real logit;
  int32_t id;
};

template <class Real>
__device__ __forceinline__ bool comes_before(Entry<Real> one, Entry<Real> other) {
  return one.logit > other.logit || (one.logit == other.logit && one.id < other.id);
}

// Entries of a row in the place of the results.
template <class Real>
struct StoredEntries {
  Real* logits;
  int64_t* ids;

  __device__ __forceinline__ Entry<Real> get(int64_t i) const { return {logits[i], static_cast<int32_t>(ids[i])}; }
  __device__ __forceinline__ void set(int64_t i, Entry<Real> entry) const {
    logits[i] = entry.logit, ids[i] = entry.id;
  }
};

template <class Real>
struct SharedEntries {
  SharedView<Entry<Real>> entries;

  __device__ __forceinline__ Entry<Real> get(int64_t i) const { return entries[i]; }
  __device__ __forceinline__ void set(int64_t i, Entry<Real> entry) const { entries[i] = entry; }
};

// A bitonic network whose comparators all point the same way, so that it takes any number of entries: what lies past the end
// stays there. A barrier comes before and after it.
template <class Real, class Entries>
__device__ __forceinline__ void sort_entries(const Entries& entries, int64_t count) {
  const auto order = [&](int64_t i, int64_t j) {
    if (j >= count) return;
    const Entry<Real> one = entries.get(i), other = entries.get(j);
    if (comes_before(other, one)) entries.set(i, other), entries.set(j, one);
  };
  const int64_t threads = blockDim.x;
  for (int64_t length = 2; length < 2 * count; length *= 2) {
    for (int64_t stride = length / 2; stride; stride /= 2) {
      const bool mirrored = stride == length / 2;
      for (int64_t pair = threadIdx.x; 2 * (pair & -stride) < count; pair += threads) {
        const int64_t offset = pair & (stride - 1), start = 2 * (pair - offset);
        order(start + offset, mirrored ? start + length - 1 - offset : start + offset + stride);
      }
      __syncthreads();
    }
  }
}

// Sums of exponentials relative to their maximum, of which each thread has a part.
template <class Real>
struct Rest {
  Real scale;  // log2(e) / temperature
  Real max = static_cast<Real>(logit_floor);
  Real sum = 0;

  // Those that are -inf do not count.
  template <int entries>
  __device__ __forceinline__ void add(const Real* values) {
    Real highest = max;
#pragma unroll
    for (int i = 0; i < entries; ++i) highest = merged_max(highest, values[i]);
    sum *= math::exp2((max - highest) * scale);
    max = highest;
#pragma unroll
    for (int i = 0; i < entries; ++i) sum += math::exp2((values[i] - max) * scale);
  }
};

// What the block's threads share about the digit that was found.
enum Found { found_digit, found_above, found_inside, found_fields };

// Finds the digit that the `wanted`-th largest entry has, the lowest if there are fewer: writes it, how many entries have
// a larger one and how many have it. Barriers come before and after it.
__device__ __forceinline__ void find_digit(SharedView<int> counts, SharedView<int> scratch, SharedView<int> found,
                                           int64_t wanted) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int width = digits / threads, last = digits - 1 - thread * width;
  int own = 0;
  for (int i = 0; i < width; ++i) own += counts[last - i];
  int above = sum_up_to_thread(own, scratch) - own;
  const bool here = above < wanted && above + own >= wanted;
  const bool nowhere = thread == threads - 1 && above + own < wanted;
  if (!here && !nowhere) return;
  int digit = last;
  while (digit > last - width + 1 && above + counts[digit] < wanted) above += counts[digit--];
  found[found_digit] = digit;
  found[found_above] = above;
  found[found_inside] = counts[digit];
}

// After so many steps the entries that k others are known to exceed are no longer counted: most of a row is never counted.
constexpr int steps_before_bound = 4;

template <class Real, class Entries>
__device__ __forceinline__ void pick_row(const TopKProblem& problem, bool adjacent, const Entries& list, int64_t room) {
  using Key = decltype(ordered_key(Real(0)));
  constexpr int entries = entries_of<Real>;
  KD_SHARED(int, counts, digits);
  KD_SHARED(int, scratch, warp_lanes);
  KD_SHARED(int, found, found_fields);
  KD_SHARED(int, gathered, 1);
  KD_SHARED(Real, sums, warp_lanes);
  const int64_t row = blockIdx.x, vocab = problem.vocab, k = problem.k;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Row<Real> logits(problem.source, row);
  const Real softcap = static_cast<Real>(problem.softcap), temperature = static_cast<Real>(problem.temperature);
  const auto rank_of = [&](int64_t id) { return static_cast<uint32_t>(vocab - 1 - id); };

  Bin<Key> bin;
  int64_t above = 0, inside = vocab;
  Digit digit{false, static_cast<int>(8 * sizeof(Key))};
  while (above + inside > room) {
    if (!digit.of_rank && digit.shift == unused_bits(problem.source.dtype)) {
      digit = {true, 32 - __clz(static_cast<int>(vocab - 1))};
    }
    const int lowest_shift = digit.of_rank ? 0 : unused_bits(problem.source.dtype);
    digit.shift = digit.shift - digit_bits > lowest_shift ? digit.shift - digit_bits : lowest_shift;
    for (int i = thread; i < digits; i += threads) counts[i] = 0;
    __syncthreads();
    int least = 0, steps = inside == vocab ? 0 : steps_before_bound + 1;
    for_steps<entries>(vocab, adjacent, [&](const Columns& columns, bool whole) {
      if (steps++ == steps_before_bound) {
        __syncthreads();
        find_digit(counts, scratch, found, k);
        __syncthreads();
        least = found[found_digit];
      }
      Real block[entries];
      logits.template load<entries>(columns, whole, block);
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        const Key key = ordered_key(block[i]);
        const uint32_t rank = rank_of(columns.at(i));
        const int value = digit_of(digit, key, rank);
        if (value >= least && bin.holds(key, rank)) atomicAdd(KD_PLACE(counts[value]), 1);
      }
    });
    __syncthreads();
    find_digit(counts, scratch, found, k - above);
    __syncthreads();
    bin = narrowed(bin, digit, found[found_digit]);
    above += found[found_above], inside = found[found_inside];
  }

  if (thread == 0) gathered[0] = 0;
  __syncthreads();
  Rest<Real> rest{static_cast<Real>(log2_e) / temperature};
  for_steps<entries>(vocab, adjacent, [&](const Columns& columns, bool whole) {
    Real block[entries];
    logits.template load<entries>(columns, whole, block);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      if (bin.reached_by(ordered_key(block[i]), rank_of(columns.at(i)))) {
        const int place = atomicAdd(KD_PLACE(gathered[0]), 1);
        list.set(place, {block[i] + Real(0), static_cast<int32_t>(columns.at(i))});
        block[i] = -INFINITY;
      } else {
        block[i] = columns.valid(i) ? floored(capped(block[i], softcap)) : -INFINITY;
      }
    }
    rest.template add<entries>(block);
  });
  __syncthreads();
  const int64_t count = gathered[0], named = count < k ? count : k;
  sort_entries<Real>(list, count);
  const auto effective = [&](int64_t place) { return floored(capped(list.get(place).logit, softcap)); };

  for (int64_t i = named + thread; i < count; i += threads) {
    const Real value = effective(i);
    rest.template add<1>(&value);
  }
  const BlockSums<Real> block{sums};
  const Real rest_max = block.max(rest.max);
  const Real rest_sum = block.total(rest.sum * math::exp2((rest.max - rest_max) * rest.scale));
  const Real top = named ? effective(0) : rest_max;
  Real named_sum = 0;
  for (int64_t i = thread; i < named; i += threads) named_sum += math::exp2((effective(i) - top) * rest.scale);
  const Real total = block.total(named_sum) + rest_sum * math::exp2((rest_max - top) * rest.scale);
  const Real log_total = math::log(total);
  const bool valid = total - total == Real(0);  // neither NaN nor infinite
  int64_t* const ids = problem.ids + row * k;
  Real* const log_probs = static_cast<Real*>(problem.log_probs) + row * k;
  for (int64_t i = thread; i < k; i += threads) {
    const bool there = valid && i < named;
    const Entry<Real> entry = there ? list.get(i) : Entry<Real>{0, -1};
    ids[i] = entry.id;
    log_probs[i] = there   ? (floored(capped(entry.logit, softcap)) - top) / temperature - log_total
                   : valid ? -static_cast<Real>(INFINITY)
                           : static_cast<Real>(NAN);
  }
  if (thread != 0) return;
  const Real log_rest =
      rest_sum > Real(0) ? (rest_max - top) / temperature + math::log(rest_sum) : -static_cast<Real>(INFINITY);
  static_cast<Real*>(problem.log_tail_mass)[row] = valid ? log_rest - log_total : static_cast<Real>(NAN);
}

// Entries that are sorted on chip.
constexpr int room_on_chip = 2048;

template <class Real>
__global__ void __launch_bounds__(most_threads) topk_kernel(TopKProblem problem, bool adjacent) {
  KD_SHARED(Entry<Real>, entries, room_on_chip);
  pick_row<Real>(problem, adjacent, SharedEntries<Real>{entries}, room_on_chip);
}

// More entries than that are sorted where the results will be.
template <class Real>
__global__ void __launch_bounds__(most_threads) long_topk_kernel(TopKProblem problem, bool adjacent) {
  const int64_t first = blockIdx.x * problem.k;
  const StoredEntries<Real> entries{static_cast<Real*>(problem.log_probs) + first, problem.ids + first};
  pick_row<Real>(problem, adjacent, entries, problem.k);
}

// The segments that draws are found by: as many as threads, at most.
constexpr int64_t warp_step = warp_lanes * most_entries;

__device__ __forceinline__ int64_t segment_length(int64_t vocab) {
  const int64_t share = (vocab + blockDim.x - 1) / blockDim.x;
  return (share + warp_step - 1) / warp_step * warp_step;
}

// A thread's part of the teacher's softmax, with what its entropy is made of, and the sum of the proposal's exponentials in
// the segment at hand. All are relative to the largest logit that the thread has seen. Masked entries have no mass at all,
// as small as it would be.
template <class Real>
struct Masses {
  Real scale;           // log2(e) / temperature
  Real proposal_scale;  // the same of the proposal
  bool tempered;        // whether the two differ
  Real max = static_cast<Real>(logit_floor);
  Real sum = 0;
  Real weighted = 0;  // of the exponentials times their exponents (log2)
  Real in_segment = 0;

  __device__ __forceinline__ void raise(Real highest) {
    const Real shift = (max - highest) * scale, factor = math::exp2(shift);
    weighted = (weighted + sum * shift) * factor;
    sum *= factor;
    in_segment *= math::exp2((max - highest) * proposal_scale);
    max = highest;
  }

  static __device__ __forceinline__ bool masked(Real logit) { return logit <= static_cast<Real>(logit_floor); }

  __device__ __forceinline__ Real proposal(Real logit, Real origin) const {
    return masked(logit) ? Real(0) : math::exp2((logit - origin) * proposal_scale);
  }

  template <int entries>
  __device__ __forceinline__ void add(const Real* logits) {
    Real highest = max;
#pragma unroll
    for (int i = 0; i < entries; ++i) highest = merged_max(highest, logits[i]);
    raise(highest);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const Real exponent = masked(logits[i]) ? Real(0) : (logits[i] - max) * scale;
      const Real mass = masked(logits[i]) ? Real(0) : math::exp2(exponent);
      sum += mass, weighted += mass * exponent;
      in_segment += tempered ? proposal(logits[i], max) : mass;
    }
  }
};

template <class Real>
__global__ void __launch_bounds__(most_threads) sample_kernel(SampleProblem problem, bool adjacent) {
  constexpr int entries = entries_of<Real>;
  KD_SHARED(double, segment_sums, most_threads);
  KD_SHARED(double, cumulative, most_threads);
  KD_SHARED(Real, levels, most_threads);
  KD_SHARED(double, scan_scratch, warp_lanes);
  KD_SHARED(Real, sums, warp_lanes);
  const int64_t row = blockIdx.x, vocab = problem.vocab, draws = problem.draws;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_lanes, warp = thread / warp_lanes;
  const int warps = static_cast<int>(blockDim.x) / warp_lanes;
  const int64_t length = segment_length(vocab);
  const int segments = static_cast<int>((vocab + length - 1) / length);
  const Row<Real> logits(problem.source, row);
  const Real softcap = static_cast<Real>(problem.softcap);
  Masses<Real> masses{static_cast<Real>(log2_e) / static_cast<Real>(problem.temperature),
                      static_cast<Real>(log2_e) / static_cast<Real>(problem.proposal_temperature),
                      problem.temperature != problem.proposal_temperature};

  for (int segment = warp; segment < segments; segment += warps) {
    masses.in_segment = 0;
    const int64_t end = (segment + 1) * length < vocab ? (segment + 1) * length : vocab;
    for (int64_t start = segment * length; start < end; start += warp_lanes * entries) {
      const Columns columns =
          adjacent ? Columns{start + lane * entries, 1, end} : Columns{start + lane, warp_lanes, end};
      Real block[entries];
      logits.template load<entries>(columns, columns.at(entries - 1) < end, block);
#pragma unroll
      for (int i = 0; i < entries; ++i)
        block[i] = columns.valid(i) ? floored(capped(block[i], softcap)) : Real(logit_floor);
      masses.template add<entries>(block);
    }
    masses.raise(over_warp(masses.max, Largest<Real>{}));
    const Real sum = over_warp(masses.in_segment, Add<Real>{});
    if (lane == 0) segment_sums[segment] = sum, levels[segment] = masses.max;
  }
  const BlockSums<Real> block{sums};
  masses.raise(block.max(masses.max));
  const Real sum = block.total(masses.sum), weighted = block.total(masses.weighted);

  // Relative to the row's maximum, and added up.
  double own = 0;
  if (thread < segments) {
    const double level = static_cast<double>(levels[thread]) - static_cast<double>(masses.max);
    own = segment_sums[thread] * math::exp2(level * static_cast<double>(masses.proposal_scale));
    segment_sums[thread] = own;
  }
  cumulative[thread] = sum_up_to_thread(own, scan_scratch);
  __syncthreads();
  const double total = cumulative[segments - 1];

  const bool valid = total - total == 0 && sum - sum == Real(0);  // neither NaN nor infinite
  const bool drawable = valid && total > 0;
  int64_t* const ids = problem.ids + row * draws;
  Real* const weights = static_cast<Real*>(problem.weights) + row * draws;
  const Real nothing = valid ? Real(0) : static_cast<Real>(NAN);
  if (thread == 0)
    static_cast<Real*>(problem.entropy)[row] =
        drawable ? math::log(sum) - weighted / sum * static_cast<Real>(log_2) : nothing;
  if (!drawable) {
    for (int64_t i = thread; i < draws; i += blockDim.x) ids[i] = -1, weights[i] = nothing;
    return;
  }

  const int64_t run = length / warp_lanes;  // of a lane, in the segment of a draw
  const double log_ratio = math::log(total / static_cast<double>(sum));
  const double factor = 1 / problem.temperature - 1 / problem.proposal_temperature;
  for (int64_t draw = warp; draw < draws; draw += warps) {
    const double target = problem.uniforms[row * draws + draw] * total;
    int segment = 0, beyond = segments - 1;
    while (segment < beyond) {
      const int middle = (segment + beyond) / 2;
      if (cumulative[middle] > target) {
        beyond = middle;
      } else {
        segment = middle + 1;
      }
    }
    // By rounding the target may lie where there is no mass.
    while (segment > 0 && !(segment_sums[segment] > 0)) --segment;
    const double share = (target - (cumulative[segment] - segment_sums[segment])) / segment_sums[segment];

    const int64_t start = segment * length + lane * run, end = start + run < vocab ? start + run : vocab;
    const auto logit_at = [&](int64_t id) { return floored(capped(logits.load_one(id), softcap)); };
    // Relative to the segment's own maximum, so that something of it is left however small it is.
    Real highest = static_cast<Real>(logit_floor);
    for (int64_t id = start; id < end; ++id) highest = merged_max(highest, logit_at(id));
    highest = over_warp(highest, Largest<Real>{});
    const auto mass_at = [&](int64_t id) { return static_cast<double>(masses.proposal(logit_at(id), highest)); };
    double in_run = 0;
    for (int64_t id = start; id < end; ++id) in_run += mass_at(id);
    const double up_to_run = sum_up_to_lane(in_run);
    double left = share * __shfl_sync(full_warp, up_to_run, warp_lanes - 1);
    const unsigned past = __ballot_sync(full_warp, in_run > 0 && up_to_run > left);
    const unsigned positive = __ballot_sync(full_warp, in_run > 0);
    if (lane != (past ? __ffs(past) - 1 : warp_lanes - 1 - __clz(static_cast<int>(positive)))) continue;
    left -= up_to_run - in_run;
    int64_t drawn = start;
    for (int64_t id = start; id < end; ++id) {
      const double mass = mass_at(id);
      if (!(mass > 0)) continue;
      drawn = id;
      left -= mass;
      if (left < 0) break;
    }
    double ratio = 1;
    if (masses.tempered) {
      const double relative = static_cast<double>(logit_at(drawn)) - static_cast<double>(masses.max);
      ratio = math::exp(relative * factor + log_ratio);
    }
    ids[draw] = drawn;
    weights[draw] = static_cast<Real>(ratio / static_cast<double>(draws));
  }
}

template <class Problem>
std::string run(const char* name, void (*kernel)(Problem, bool), const Problem& problem, int entries, void* stream) {
  return launch(name, kernel, static_cast<unsigned>(problem.rows), threads_for(problem.vocab, entries, most_threads), 0,
                static_cast<LaunchStream>(stream), problem, aligned(problem.source));
}

template <class Real>
std::string topk_of(const TopKProblem& problem, void* stream) {
  const bool on_chip = problem.k <= room_on_chip;
  return run("topk", on_chip ? topk_kernel<Real> : long_topk_kernel<Real>, problem, entries_of<Real>, stream);
}

}  // namespace

std::string topk(const TopKProblem& problem, void* stream) {
  return problem.compute_double ? topk_of<double>(problem, stream) : topk_of<float>(problem, stream);
}

std::string sample(const SampleProblem& problem, void* stream) {
  if (problem.compute_double) return run("sample", sample_kernel<double>, problem, entries_of<double>, stream);
  return run("sample", sample_kernel<float>, problem, entries_of<float>, stream);
}

}  // namespace kd::cuda
