// Logits made of those of several sources, block by block as they are read: see Composition in
// kdkernels/backends/rows.py.
#include <limits>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

// Stands for a masked entry while a block is being put together: nothing that is added brings it back.
constexpr double masked_entry = -1e30;
constexpr double masked_below = -1e20;

// sum += coefficient * block; `first`: the sum begins with it. What a positive coefficient takes from a masked entry
// is masked.
template <class Real, bool first, bool masking>
KD_INLINE void add_scaled(const Real* __restrict block, int64_t n, Real coefficient, Real* __restrict sum) {
  constexpr Real floor = static_cast<Real>(logit_floor), masked = static_cast<Real>(masked_entry);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real added = first ? coefficient * block[i] : sum[i] + coefficient * block[i];
    sum[i] = masking && block[i] <= floor ? masked : added;
  }
}

template <class Real, bool first>
KD_INLINE void add_source(const Real* block, Range<Real> range, int64_t n, Real coefficient, Real* sum) {
  if (coefficient > Real(0) && range.min <= static_cast<Real>(logit_floor)) {
    add_scaled<Real, first, true>(block, n, coefficient, sum);
  } else {
    add_scaled<Real, first, false>(block, n, coefficient, sum);
  }
}

// Reads the blocks of one row of a composition.
template <class Real>
struct ComposedRow {
  const Composition& composition;
  const Matrix& own;
  Real own_softcap;
  int64_t row;

  const Real* numbers(const void* all) const {
    return all ? static_cast<const Real*>(all) + row * composition.sources : nullptr;
  }

  const Real* source(int index, int64_t column, int64_t n, Real* buffer, Range<Real>& range) const {
    const Matrix& matrix = index ? composition.others[index - 1] : own;
    const Real softcap = index ? static_cast<Real>(composition.softcaps[index - 1]) : own_softcap;
    const char* upcoming = entry_address(matrix, row, column + n);
    if (index)  // what follows of the side's own row is fetched where its exponentials are made
      for (int64_t i = 0; i < n * dtype_size(matrix.dtype); i += 64) __builtin_prefetch(upcoming + i, 0, 2);
    return load_logits(matrix, row, softcap, column, n, buffer, range);
  }

  void weighted_sum(int64_t column, int64_t n, Real* sum) const {
    alignas(64) Real buffer[block_size];
    const Real* coefficients = numbers(composition.coefficients);
    bool first = true;
    for (int index = 0; index < composition.sources; ++index) {
      const Real coefficient = coefficients ? coefficients[index] : Real(1);
      if (coefficient == Real(0)) continue;
      Range<Real> range;
      const Real* block = source(index, column, n, buffer, range);
      if (first) {
        add_source<Real, true>(block, range, n, coefficient, sum);
      } else {
        add_source<Real, false>(block, range, n, coefficient, sum);
      }
      first = false;
    }
    if (first) std::memset(sum, 0, static_cast<size_t>(n) * sizeof(Real));
  }

  // log sum_i exp(c_i z_i + o_i), relative to the largest exponent of each entry.
  void log_sum(int64_t column, int64_t n, Real* out) const {
    alignas(64) Real exponents[max_sources][block_size];
    alignas(64) Real sum[block_size], powers[block_size];
    constexpr Real log2_e = static_cast<Real>(1.4426950408889634074);
    const Real* coefficients = numbers(composition.coefficients);
    const Real* offsets = numbers(composition.offsets);
    int used = 0;
    for (int index = 0; index < composition.sources; ++index) {
      if (!(offsets[index] > -std::numeric_limits<Real>::max()) && offsets[index] == offsets[index]) continue;
      Real* block = exponents[used];
      Range<Real> range;
      const Real* logits = source(index, column, n, sum, range);
      const Real coefficient = coefficients ? coefficients[index] : Real(1), offset = offsets[index];
      add_source<Real, true>(logits, range, n, coefficient, block);
      if (used == 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = block[i] += offset;
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const Real x = block[i] += offset;
          out[i] = out[i] < x ? x : out[i];
        }
      }
      ++used;
    }
    if (used == 0) {
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(masked_entry);
      return;
    }
    if (used == 1) return;
    for (int index = 0; index < used; ++index) {
      Real* block = exponents[index];
      constexpr Real least = Real(-120);  // 2^-120 of the largest is nothing
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Real distance = (block[i] - out[i]) * log2_e;
        block[i] = distance < least ? least : distance;
      }
      Real* terms = index == 0 ? sum : powers;
      exp2_block(block, n, Tempering<Real>{Real(1), Real(0)}, terms);
      if (index == 0) continue;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sum[i] += powers[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += math::log(sum[i]);
  }

  void add_class_bias(int64_t column, int64_t n, Real* block) const {
    const Real* bias = static_cast<const Real*>(composition.class_bias) + column;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) block[i] += bias[i];
  }

  void clip(int64_t n, Real* block) const {
    const Real* bounds = static_cast<const Real*>(composition.bounds) + 2 * row;
    const Real lowest = bounds[0], highest = bounds[1];
    constexpr Real masked = static_cast<Real>(masked_below);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Real x = block[i] > highest ? highest : block[i];
      block[i] = (x < lowest) & (x > masked) ? lowest : x;
    }
  }

  void replace(int64_t column, int64_t n, Real* block) const {
    const int64_t* columns = composition.columns + row * composition.replaced;
    const Real* values = static_cast<const Real*>(composition.values) + row * composition.replaced;
    for (int entry = 0; entry < composition.replaced; ++entry) {
      const int64_t place = columns[entry] - column;
      if (columns[entry] >= 0 && place >= 0 && place < n) block[place] = values[entry];
    }
  }

  void load(int64_t column, int64_t n, Real* block) const {
    if (composition.offsets) {
      log_sum(column, n, block);
    } else {
      weighted_sum(column, n, block);
    }
    if (composition.class_bias) add_class_bias(column, n, block);
    if (composition.bounds) clip(n, block);
    if (composition.columns) replace(column, n, block);
  }
};

}  // namespace

void load_composed(const Composition& composition, const Matrix& own, float own_softcap, int64_t row, int64_t column,
                   int64_t n, float* block) {
  ComposedRow<float>{composition, own, own_softcap, row}.load(column, n, block);
}

void load_composed(const Composition& composition, const Matrix& own, double own_softcap, int64_t row, int64_t column,
                   int64_t n, double* block) {
  ComposedRow<double>{composition, own, own_softcap, row}.load(column, n, block);
}

}  // namespace kd::KD_ISA
