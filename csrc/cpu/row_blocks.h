// A row is read and written in blocks that stay in the first-level cache, converted to the compute
// type on the way. So the arithmetic is written once, for float and double.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "cpu/kernels.h"
#include "math/elementary.h"
#include "math/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kd::KD_ISA {

constexpr int64_t block_size = 1024;

// body(start, length) for the blocks of a row, in their order.
template <class Body>
KD_INLINE void for_blocks(int64_t vocab, Body body) {
  for (int64_t start = 0; start < vocab; start += block_size) {
    const int64_t left = vocab - start;
    body(start, left < block_size ? left : block_size);
  }
}

// Logits are clamped here before anything else, so that a masked entry (-inf, or the lowest finite
// number) has probability 0 and every quantity stays finite. NaN stays NaN.
constexpr double logit_floor = -1e5;

// While it lives, arithmetic of this thread gives 0 in the place of subnormal numbers, which processors take a hundred times as
// long for. Low temperatures make them by the row: products of probabilities near 2^-126. Subnormal inputs are read as they are.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | flush_to_zero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned flush_to_zero = 0x8000;
  unsigned before_;
#else
 public:
  FlushSubnormals() {}  // not a trivial type, so that it may stand unused
#endif
};

// Converts `n` entries from `source` to `block`.
template <class Real>
inline void convert_block(const void* source, DType dtype, int64_t n, Real* __restrict block) {
  switch (dtype) {
    case DType::float32: {
      const float* x = static_cast<const float*>(source);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) block[i] = static_cast<Real>(x[i]);
      break;
    }
    case DType::bfloat16: {
      const uint16_t* x = static_cast<const uint16_t*>(source);
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(Real) == 4) {
        for (; i + 16 <= n; i += 16) {
          const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
          const __m512i wide = _mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, bits), 16);
          _mm512_storeu_ps(block + i, _mm512_castsi512_ps(wide));
        }
      }
#endif
      for (; i < n; ++i) block[i] = static_cast<Real>(bfloat_to_float(x[i]));
      break;
    }
    case DType::float16: {
      const uint16_t* x = static_cast<const uint16_t*>(source);
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(Real) == 4) {
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(block + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
      }
#endif
      for (; i < n; ++i) block[i] = static_cast<Real>(half_to_float(x[i]));
      break;
    }
    case DType::float64: {
      const double* x = static_cast<const double*>(source);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) block[i] = static_cast<Real>(x[i]);
      break;
    }
  }
}

// Writes `block` to `destination`, rounding to nearest even.
template <class Real>
inline void store_block(const Real* __restrict block, int64_t n, void* destination, DType dtype) {
  switch (dtype) {
    case DType::float32: {
      float* x = static_cast<float*>(destination);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(block[i]);
      break;
    }
    case DType::bfloat16: {
      uint16_t* x = static_cast<uint16_t*>(destination);
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(Real) == 4) {
        for (; i + 16 <= n; i += 16) {
          const __m512 value = _mm512_loadu_ps(block + i);
          const __m512i bits = _mm512_castps_si512(value);
          const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xFFFF, bits, 16), _mm512_set1_epi32(1));
          const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
          const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
          const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
          const __m512i high = _mm512_maskz_srli_epi32(0xFFFF, kept, 16);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + i), _mm512_maskz_cvtepi32_epi16(0xFFFF, high));
        }
      }
#endif
      for (; i < n; ++i) x[i] = float_to_bfloat(static_cast<float>(block[i]));
      break;
    }
    case DType::float16: {
      uint16_t* x = static_cast<uint16_t*>(destination);
      int64_t i = 0;
#if defined(__F16C__)
      if constexpr (sizeof(Real) == 4) {
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i), _mm256_cvtps_ph(_mm256_loadu_ps(block + i), 0));
      }
#endif
      for (; i < n; ++i) x[i] = float_to_half(static_cast<float>(block[i]));
      break;
    }
    case DType::float64: {
      double* x = static_cast<double*>(destination);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(block[i]);
      break;
    }
  }
}

// Copies a block around the cache, for results nobody reads soon: the destination's lines need not be
// fetched first. Takes effect after stream_fence.
inline void stream_block(const float* __restrict block, int64_t n, float* __restrict destination) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i < n && reinterpret_cast<uintptr_t>(destination + i) % 64; ++i) destination[i] = block[i];
  for (; i + 16 <= n; i += 16) _mm512_stream_ps(destination + i, _mm512_loadu_ps(block + i));
#elif defined(__AVX__)
  for (; i < n && reinterpret_cast<uintptr_t>(destination + i) % 32; ++i) destination[i] = block[i];
  for (; i + 8 <= n; i += 8) _mm256_stream_ps(destination + i, _mm256_loadu_ps(block + i));
#endif
  for (; i < n; ++i) destination[i] = block[i];
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

constexpr int64_t dtype_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline char* entry_address(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<char*>(matrix.data) + (row * matrix.stride + column) * dtype_size(matrix.dtype);
}

template <class Real>
inline Real per_row(const PerRow& number, int64_t row) {
  return number.values ? static_cast<const Real*>(number.values)[row] : static_cast<Real>(number.value);
}

// The parameter a of the divergence in a row.
template <class Real>
inline double parameter_of(const RowProblem& problem, int64_t row) {
  return problem.parameters ? static_cast<double>(static_cast<const Real*>(problem.parameters)[row]) : problem.a;
}

template <class Real>
struct Range {
  Real min, max;
};

template <class Real>
inline Range<Real> range_of(const Real* block, int64_t n) {
  Real max = static_cast<Real>(logit_floor), min = -max;
#pragma omp simd reduction(max : max) reduction(min : min)
  for (int64_t i = 0; i < n; ++i) {
    max = max < block[i] ? block[i] : max;
    min = min > block[i] ? block[i] : min;
  }
  return {min, max};
}

// How many of a block are larger than the threshold; NaN is not.
template <class Real>
inline int64_t count_above(const Real* __restrict block, int64_t n, Real threshold) {
  std::conditional_t<sizeof(Real) == 4, int32_t, int64_t> count = 0;  // as wide as the numbers, for the vectoriser
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += block[i] > threshold;
  return count;
}

#if defined(__FP_FAST_FMAF)
KD_INLINE float fused_multiply_add(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
KD_INLINE double fused_multiply_add(double x, double y, double z) { return __builtin_fma(x, y, z); }
#endif

// Logits over a temperature, relative to an origin near their maximum and in units of log 2. The
// difference must not lose the digits that the logits have in common: a fused multiply-add rounds
// once, after subtracting; without one the logits are subtracted first.
template <class Real>
struct Tempering {
  Real scale = 1;   // log2(e) / temperature
  Real origin = 0;  // in the units of operator()'s result, or of the logits

#if defined(__FP_FAST_FMAF)
  static KD_INLINE Tempering at(Real max, Real scale) { return {scale, max * scale}; }
  // Spelled out: without optimisation the compiler would round twice.
  KD_INLINE Real operator()(Real logit) const { return fused_multiply_add(logit, scale, -origin); }
  double of(double logit) const { return logit * static_cast<double>(scale) - static_cast<double>(origin); }
  double distance(Real from, Real to) const { return static_cast<double>(from) - static_cast<double>(to); }
#else
  static KD_INLINE Tempering at(Real max, Real scale) { return {scale, max}; }
  KD_INLINE Real operator()(Real logit) const { return (logit - origin) * scale; }
  double of(double logit) const { return (logit - static_cast<double>(origin)) * static_cast<double>(scale); }
  double distance(Real from, Real to) const {
    return (static_cast<double>(from) - static_cast<double>(to)) * static_cast<double>(scale);
  }
#endif
  static KD_INLINE Tempering at_temperature_one(Real max) { return at(max, static_cast<Real>(1.4426950408889634074)); }

  // The tempered logit that `origin` stands for.
  double of_origin() const { return -of(0); }
};

// out = 2^tempering(block); returns the sum. While it computes, memory works: `upcoming`, as
// many bytes per entry as `block` was loaded from, is fetched for the next block.
template <class Real>
inline Real exp2_block(const Real* __restrict block, int64_t n, Tempering<Real> tempering, Real* __restrict out,
                       const char* upcoming = nullptr, int64_t upcoming_bytes = 0) {
  for (int64_t i = 0; i < upcoming_bytes; i += 64) __builtin_prefetch(upcoming + i, 0, 2);
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real e = math::exp2(tempering(block[i]));
    out[i] = e;
    sum += e;
  }
  return sum;
}

#if defined(__AVX512DQ__)
// Half the instructions of the portable form: the fraction and the scaling by a power of two are
// one instruction each. The polynomial is a minimax fit on [0, 1], relative error 2e-9.
template <>
inline float exp2_block<float>(const float* __restrict block, int64_t n, Tempering<float> tempering,
                               float* __restrict out, const char* upcoming, int64_t upcoming_bytes) {
  const __m512 factor = _mm512_set1_ps(tempering.scale), shift = _mm512_set1_ps(tempering.origin);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    if (i * 4 < upcoming_bytes) __builtin_prefetch(upcoming + i * 4, 0, 2);
    const __mmask16 lanes = n - i >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - i)) - 1u);
    const __m512 x = _mm512_fmsub_ps(_mm512_maskz_loadu_ps(lanes, block + i), factor, shift);
    const __m512 r = _mm512_maskz_reduce_ps(lanes, x, _MM_FROUND_TO_NEG_INF);
    __m512 poly = _mm512_set1_ps(0.000216129159441f);
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(0.00124678461739f));
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(0.00967545159359f));
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(0.0554852806079f));
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(0.240229305554f));
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(0.693147044443f));
    poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(1.0f));
    const __m512 e = _mm512_maskz_scalef_ps(lanes, poly, x);
    _mm512_mask_storeu_ps(out + i, lanes, e);
    sum = _mm512_add_ps(sum, e);
  }
  alignas(64) float lane_sums[16];
  _mm512_store_ps(lane_sums, sum);
  float total = 0;
  for (float lane_sum : lane_sums) total += lane_sum;
  return total;
}
#endif

// `block`, clamped in `buffer` where that changes anything.
template <class Real>
KD_INLINE const Real* clamp_block(const Real* block, int64_t n, Real* buffer, Range<Real>& range) {
  range = range_of(block, n);
  constexpr Real floor = static_cast<Real>(logit_floor);
  if (range.min < floor) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = block[i] < floor ? floor : block[i];
    block = buffer;
  }
  return block;
}

// A block of a row of logits, softcapped and clamped: `buffer`, or the row itself where nothing need be done.
template <class Real>
KD_INLINE const Real* load_logits(const Matrix& matrix, int64_t row, Real softcap, int64_t column, int64_t n,
                                  Real* buffer, Range<Real>& range) {
  const void* source = entry_address(matrix, row, column);
  const Real* block = buffer;
  if (softcap == Real(0) && matrix.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64)) {
    block = static_cast<const Real*>(source);
  } else {
    convert_block(source, matrix.dtype, n, buffer);
    if (softcap != Real(0)) {
      const Real inverse = Real(1) / softcap, cap = softcap;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) buffer[i] = cap * math::tanh(buffer[i] * inverse);
    }
  }
  return clamp_block(block, n, buffer, range);
}

// The same of a composition, not yet clamped: in `block`. Out of line, see cpu/compositions.cpp.
void load_composed(const Composition& composition, const Matrix& own, float own_softcap, int64_t row, int64_t column,
                   int64_t n, float* block);
void load_composed(const Composition& composition, const Matrix& own, double own_softcap, int64_t row, int64_t column,
                   int64_t n, double* block);

// One side of a row: where its logits are, and the state of its softmax as the row streams by.
//
// The origin of the tempered logits follows the running maximum. It is rounded once and used
// everywhere, so the result does not depend on it.
template <class Real>
struct Stream {
  Matrix matrix;
  int64_t row;
  Real softcap;
  double inverse_temperature;
  const Composition* composition;             // null: the logits are those of the matrix
  Real max = static_cast<Real>(logit_floor);  // of the raw logits seen so far
  Tempering<Real> tempering;
  double sum = 0;       // of 2^tempering(x)
  bool masked = false;  // some entry lay below logit_floor

  static constexpr double log2_e = 1.4426950408889634074;
  static constexpr double log_2 = 0.69314718055994530942;

  Stream(const Matrix& matrix, int64_t row, double softcap, double temperature,
         const Composition* composition = nullptr)
      : matrix(matrix),
        row(row),
        softcap(static_cast<Real>(softcap)),
        inverse_temperature(1 / temperature),
        composition(composition),
        tempering(Tempering<Real>::at(max, static_cast<Real>(log2_e / temperature))) {}

  // A block of logits, put together, softcapped and clamped: `buffer`, or the row itself where nothing need be done.
  const Real* load(int64_t column, int64_t n, Real* buffer, Range<Real>& range) const {
    if (composition) {
      load_composed(*composition, matrix, softcap, row, column, n, buffer);
      return clamp_block(buffer, n, buffer, range);
    }
    return load_logits(matrix, row, softcap, column, n, buffer, range);
  }

  // Replaces a block by the exponentials of its entries, in `out`, and adds them to the sum.
  void exponentiate(const Real* block, int64_t column, int64_t n, int64_t vocab, Real* out) {
    const int64_t left = vocab - column - n;
    const char* upcoming = entry_address(matrix, row, column + n);
    sum += exp2_block(block, n, tempering, out, upcoming,
                      (left < block_size ? left : block_size) * dtype_size(matrix.dtype));
  }

  const Real* load(int64_t column, int64_t n, Real* buffer) const {
    Range<Real> range;
    return load(column, n, buffer, range);
  }

  // What stands where a logit is left out: so far below the floor that nothing of it remains, whatever the maximum.
  Real hole() const { return static_cast<Real>(2 * logit_floor - 1100 / static_cast<double>(tempering.scale)); }

  double logit(int64_t column) const {
    Real buffer = 0;
    return static_cast<double>(*load(column, 1, &buffer));
  }

  // Raises the origin to a new maximum; returns by how much (in log 2, <= 0) what was relative to it falls.
  double raise(Range<Real> block) {
    masked = masked || block.min <= static_cast<Real>(logit_floor);
    if (!(block.max > max)) return 0;
    const Real old_origin = tempering.origin;
    max = block.max;
    tempering = Tempering<Real>::at(max, tempering.scale);
    const double shift = tempering.distance(old_origin, tempering.origin);
    sum *= std::exp2(shift);
    return shift;
  }

  double log_sum() const { return std::log(sum); }
  double log_normaliser() const { return tempering.of_origin() * log_2 + log_sum(); }

  // log softmax at one logit.
  double log_probability(double logit) const { return tempering.of(logit) * log_2 - log_sum(); }

  // out = log softmax of a block of logits.
  void log_probabilities(const Real* block, int64_t n, Real* out) const {
    const Tempering<Real> temper = tempering;
    const Real log_total = static_cast<Real>(log_sum());
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = temper(block[i]) * Real(log_2) - log_total;
  }
};

// From the gradient of a block of clamped logits, which `block` holds, to that of the logits themselves.
template <class Real>
inline void through_clamp_and_softcap(const Stream<Real>& stream, int64_t n, const Real* block, Real* gradient) {
  if (stream.masked) {
    constexpr Real floor = static_cast<Real>(logit_floor);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) gradient[i] = block[i] <= floor ? Real(0) : gradient[i];
  }
  if (stream.softcap != Real(0)) {
    const Real inverse = Real(1) / stream.softcap;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Real ratio = block[i] * inverse;
      gradient[i] *= Real(1) - ratio * ratio;
    }
  }
}

// Every entry of a row becomes the value.
template <class Real>
inline void fill_row(const Matrix& matrix, int64_t vocab, int64_t row, Real value) {
  if (!matrix.data) return;
  alignas(64) Real block[block_size];
  std::fill(block, block + std::min(vocab, block_size), value);
  for_blocks(vocab,
             [&](int64_t start, int64_t n) { store_block(block, n, entry_address(matrix, row, start), matrix.dtype); });
}

}  // namespace kd::KD_ISA
