// The large entries of a row's gradient, as a list: what the loss head's products need of it when the
// caller tolerates an error.
//
// With g the row, E = |g|^2 and tolerance eps:
//   nearest     the smallest entries are replaced by their mean while their squares add up to at most
//               eps^2 E, so the error is at most eps |g|, and the sum of the row is kept: what is
//               small has a common sign more often than not, and the rows of a head's weight a common
//               direction, so that zeros instead of the mean would do several times the harm;
//   stochastic  an entry below t becomes +-t with probability |g_v| / t, else 0: the expectation is g,
//               and t is chosen so that the expected squared error, sum |g_v| (t - |g_v|) over the
//               entries below t, is at most eps^2 E.
// The threshold is found without sorting: a first one that is safe whatever the distribution
// (t^2 vocab <= eps^2 E, or t sum |g_v| <= eps^2 E), then a histogram of what lies above it.
#pragma once

#include <limits>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {

// A uniform number in [0, 2^32) of an entry, the same whoever asks: two rounds of a multiplicative hash.
KD_INLINE uint32_t random_bits(uint32_t row_key, uint32_t column) {
  uint32_t x = row_key ^ (column * 0x9E3779B9u);
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  x += row_key * 0x85EBCA6Bu;
  x ^= x >> 15;
  x *= 0x2C1B3C6Du;
  x ^= x >> 12;
  x *= 0x297A2D39u;
  return x ^ (x >> 15);
}

inline uint32_t row_key(uint64_t seed, uint64_t row) {
  uint64_t x = seed + 0x9E3779B97F4A7C15ull * (row + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

// Lists the entries whose magnitude exceeds `threshold`; -1 if there are more than `capacity`.
inline int64_t list_entries(const float* gradient, int64_t vocab, float threshold, int64_t capacity, int32_t* columns,
                            float* values) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 limit = _mm512_set1_ps(threshold);
  __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= vocab && count + 16 <= capacity; i += 16) {
    const __m512 g = _mm512_loadu_ps(gradient + i);
    const __mmask16 kept = _mm512_cmp_ps_mask(_mm512_abs_ps(g), limit, _CMP_GT_OQ);
    if (kept) {
      _mm512_storeu_si512(columns + count, _mm512_maskz_compress_epi32(kept, column));
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(kept, g));
      count += __builtin_popcount(kept);
    }
    column = _mm512_add_epi32(column, _mm512_set1_epi32(16));
  }
#endif
  for (; i < vocab; ++i) {
    if (!(std::fabs(gradient[i]) > threshold)) continue;
    if (count == capacity) return -1;
    columns[count] = static_cast<int32_t>(i);
    values[count++] = gradient[i];
  }
  return count;
}

// Sums over entries of a row.
struct Sums {
  double values = 0, magnitudes = 0, squares = 0;
};

// Sums over entries by magnitude, in eighths of octaves below 1.
struct Histogram {
  static constexpr int bins = 512, bins_per_octave = 8;
  static constexpr int first_key = 127 * bins_per_octave - bins + 1;
  Sums sums[bins];
  int64_t counts[bins] = {};

  static int bin_of(float x) {  // 0 <= x <= 1; the smallest share bin 0
    const int key = static_cast<int>(math::bit_cast<uint32_t>(x) >> 20) - first_key;
    return key < 0 ? 0 : (key >= bins ? bins - 1 : key);
  }

  // The lower edge of a bin.
  static double edge(int bin) {
    return bin ? static_cast<double>(math::bit_cast<float>(static_cast<uint32_t>(bin + first_key) << 20)) : 0;
  }

  Histogram(const float* values, int64_t count, float inverse_unit) {
    for (int64_t i = 0; i < count; ++i) {
      const double x = static_cast<double>(values[i]) * static_cast<double>(inverse_unit);
      const int bin = bin_of(std::fabs(values[i]) * inverse_unit);
      sums[bin].values += x;
      sums[bin].magnitudes += std::fabs(x);
      sums[bin].squares += x * x;
      ++counts[bin];
    }
  }
};

// The largest magnitude; NaN if an entry is not finite.
inline float largest_magnitude(const float* gradient, int64_t vocab) {
  float max = 0, check = 0;
#pragma omp simd reduction(max : max) reduction(+ : check)
  for (int64_t i = 0; i < vocab; ++i) {
    const float x = std::fabs(gradient[i]);
    max = max < x ? x : max;
    check += x * 0.0f;
  }
  return max + check;
}

// x up to `limit`, else 0. What is too small to count goes as well: its square would be subnormal, which processors are
// slow with. In integers, because compilers make jumps of conditions that a sum hangs on.
KD_INLINE float between(float x, float limit) {
  const uint32_t kept = static_cast<uint32_t>(x <= limit) & static_cast<uint32_t>(x >= 1e-15f);
  return math::bit_cast<float>(math::bit_cast<uint32_t>(x) & (0u - kept));
}

// The sums of x, |x| and x^2 over the entries, in units of 1 / inverse_unit, up to `limit` in magnitude.
KD_INLINE Sums sums_below(const float* __restrict gradient, int64_t n, float inverse_unit, float limit) {
  Sums total;
  for (int64_t start = 0; start < n; start += block_size) {
    const int64_t length = n - start < block_size ? n - start : block_size;
    const float* block = gradient + start;
    float values = 0, magnitudes = 0, squares = 0;
#pragma omp simd reduction(+ : values, magnitudes, squares)
    for (int64_t i = 0; i < length; ++i) {
      const float x = between(std::fabs(block[i]) * inverse_unit, limit);
      values += std::copysign(x, block[i]);
      magnitudes += x;
      squares += x * x;
    }
    total.values += values;
    total.magnitudes += magnitudes;
    total.squares += squares;
  }
  return total;
}

// A row in units of about its largest entry, so that no square underflows.
struct ScaledRow {
  float* gradient;
  int64_t vocab;
  float unit, inverse_unit;

  // The sums over the entries up to `limit` in magnitude.
  Sums below(float limit) const { return sums_below(gradient, vocab, inverse_unit, limit); }

  int64_t list_above(double limit, int64_t capacity, int32_t* columns, float* values) const {
    return list_entries(gradient, vocab, static_cast<float>(limit) * unit, capacity, columns, values);
  }
};

inline int64_t select_nearest(const ScaledRow& row, double budget, bool keep_sum, int64_t capacity, int32_t* columns,
                              float* values, double& error, float& mean) {
  const double safe = std::sqrt(budget / static_cast<double>(row.vocab));
  const int64_t count = row.list_above(safe, capacity, columns, values);
  if (count < 0) return -1;
  const Histogram listed(values, count, row.inverse_unit);
  const Sums small = row.below(static_cast<float>(safe));
  double sum = small.values;
  error = small.squares;
  int64_t left_out = row.vocab - count;
  int first = 0;
  for (; first < Histogram::bins && error + listed.sums[first].squares <= budget; ++first) {
    error += listed.sums[first].squares;
    sum += listed.sums[first].values;
    left_out += listed.counts[first];
  }
  if (keep_sum && left_out) {
    mean = static_cast<float>(sum / static_cast<double>(left_out)) * row.unit;
    error -= sum * sum / static_cast<double>(left_out);
    error = error < 0 ? 0 : error;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i];
    columns[kept] = columns[i];
    values[kept] = value - mean;
    kept += Histogram::bin_of(std::fabs(value) * row.inverse_unit) >= first;
  }
  return kept;
}

// Rounds the entries below `limit` to 0 or to +-limit. Returns the squared norm of the change.
inline double round_stochastically(const ScaledRow& row, float limit, uint32_t key) {
  const float inverse_limit = 1 / limit;
  float* gradient = row.gradient;
  double error = 0;
  for (int64_t start = 0; start < row.vocab; start += block_size) {
    const int64_t end = row.vocab - start < block_size ? row.vocab : start + block_size;
    float block_error = 0;
#pragma omp simd reduction(+ : block_error)
    for (int64_t i = start; i < end; ++i) {
      const float g = gradient[i], magnitude = std::fabs(g), probability = magnitude * inverse_limit;
      // Of 2^31 equally likely numbers, which fit a signed integer.
      const int32_t draw = static_cast<int32_t>(random_bits(key, static_cast<uint32_t>(i)) >> 1);
      const int32_t bar = static_cast<int32_t>((probability < 0.9999999f ? probability : 0.9999999f) * 2147483648.0f);
      const float rounded = draw < bar ? (g < 0 ? -limit : limit) : 0.0f;
      const float kept = probability < 0.9999999f ? rounded : g;
      const float change = std::fabs(kept - g) * row.inverse_unit;
      const float counted = between(change, 2.0f);
      block_error += counted * counted;
      gradient[i] = kept;
    }
    error += block_error;
  }
  return error;
}

inline int64_t select_stochastic(const ScaledRow& row, const Sums& all, double budget, uint32_t key, int64_t capacity,
                                 int32_t* columns, float* values, double& error) {
  const double safe = budget / all.magnitudes;
  const int64_t count = row.list_above(safe, capacity, columns, values);
  if (count < 0) return -1;
  const Histogram listed(values, count, row.inverse_unit);
  // Of what lies below the threshold.
  Sums small = row.below(static_cast<float>(safe));
  double threshold = safe;
  for (int bin = 0; bin < Histogram::bins; ++bin) {
    const double edge = Histogram::edge(bin);
    if (edge > safe) {
      if (edge * small.magnitudes - small.squares > budget) break;
      threshold = edge;
    }
    small.magnitudes += listed.sums[bin].magnitudes;
    small.squares += listed.sums[bin].squares;
  }
  error = round_stochastically(row, static_cast<float>(threshold) * row.unit, key);
  return list_entries(row.gradient, row.vocab, 0.0f, capacity, columns, values);
}

// Lists what a row of a gradient must keep. Returns the number of entries, or -1 where the row must stay dense: if it
// is not finite, or the list longer than `capacity`. The row may be rounded in place. `summary`: the squared norms of
// the row and of the error, and what every entry of the row gets beside the list. `keep_sum`: whether that may be other than 0.
inline int64_t select_entries(const EntryRule& rule, int64_t row, float* gradient, int64_t vocab, bool keep_sum,
                              int64_t capacity, int32_t* columns, float* values, double* summary) {
  summary[0] = summary[1] = summary[2] = 0;
  const float max = largest_magnitude(gradient, vocab);
  if (max == 0) return 0;
  if (!(max < std::numeric_limits<float>::max())) return -1;
  const float unit = max < 1e-37f ? 1e-37f : max;
  const ScaledRow scaled{gradient, vocab, unit, 1 / unit};
  const Sums all = scaled.below(2);
  // The sums are rounded; what is promised holds all the same.
  const double budget = rule.tolerance * rule.tolerance * all.squares * (1 - 1e-4);
  double error = 0;
  float mean = 0;
  const int64_t count = rule.stochastic
                            ? select_stochastic(scaled, all, budget, row_key(rule.seed, static_cast<uint64_t>(row)),
                                                capacity, columns, values, error)
                            : select_nearest(scaled, budget, keep_sum, capacity, columns, values, error, mean);
  const double square = static_cast<double>(unit) * static_cast<double>(unit);
  summary[0] = all.squares * square;
  summary[1] = error * square;
  summary[2] = static_cast<double>(mean);
  return count;
}

}  // namespace kd::KD_ISA
