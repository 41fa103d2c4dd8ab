// One side of a row: its logits, put together, softcapped and clamped as they are read, and the state of its softmax.
#pragma once

#include "cuda/reductions.cuh"
#include "cuda/rows.cuh"
#include "math/divergence.h"

namespace kd::cuda {

namespace math = KD_ISA::math;

constexpr double log2_e = 1.4426950408889634074;
constexpr double log_2 = 0.69314718055994530942;

// Stands for a masked entry while a composition is being put together: nothing that is added brings it back.
constexpr double masked_entry = -1e30;
constexpr double masked_below = -1e20;

template <class Real>
__device__ __forceinline__ Real capped(Real logit, Real softcap) {
  return softcap == Real(0) ? logit : softcap * math::tanh(logit / softcap);
}

template <class Real>
__device__ __forceinline__ Real floored(Real logit) {
  return logit < static_cast<Real>(logit_floor) ? static_cast<Real>(logit_floor) : logit;
}

// The logits of a row, clamped. If `composed`, they may be those of several sources: the same as csrc/cpu/compositions.cpp.
template <class Real, int entries, bool composed>
struct Logits {
  Row<Real> row;
  Real softcap;
  const Composition* composition = nullptr;  // null: the logits are those of the row
  int64_t number;

  __device__ __forceinline__ Logits(const Matrix& matrix, int64_t number, double softcap,
                                    const Composition* composition)
      : row(matrix, number), softcap(static_cast<Real>(softcap)), composition(composition), number(number) {}

  __device__ __forceinline__ void load(const Columns& columns, bool whole, Real* out) const {
    if constexpr (composed) {
      if (composition->sources) {
        load_composed(columns, whole, out);
        return;
      }
    }
    row.template load<entries>(columns, whole, out);
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] = floored(capped(out[i], softcap));
  }

  // The same of what `row.load_packed` loaded.
  __device__ __forceinline__ void unpack(const Packed& packed, const Columns& columns, bool whole, Real* out) const {
    static_assert(entries == most_entries && !composed);
    row.unpack(packed, out);
#pragma unroll
    for (int i = 0; i < entries; ++i)
      out[i] = whole || columns.valid(i) ? floored(capped(out[i], softcap)) : static_cast<Real>(logit_floor);
  }

  __device__ __forceinline__ Real one(int64_t column, int64_t vocab) const {
    if constexpr (composed) {
      if (composition->sources) {
        Real found[entries];
        load_composed({column, vocab, vocab}, false, found);
        return found[0];
      }
    }
    return floored(capped(row.load_one(column), softcap));
  }

 private:
  __device__ __forceinline__ const Real* numbers(const void* all) const {
    return all ? static_cast<const Real*>(all) + number * composition->sources : nullptr;
  }

  // A source's logits times its coefficient; what a positive coefficient takes from a masked entry is masked.
  __device__ __forceinline__ void scaled(int index, Real coefficient, const Columns& columns, bool whole,
                                         Real* out) const {
    const bool own = index == 0;
    const Row<Real> source = own ? row : Row<Real>(composition->others[index - 1], number);
    const Real cap = own ? softcap : static_cast<Real>(composition->softcaps[index - 1]);
    source.template load<entries>(columns, whole, out);
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const Real logit = floored(capped(out[i], cap));
      const bool masked = coefficient > Real(0) && logit <= static_cast<Real>(logit_floor);
      out[i] = masked ? static_cast<Real>(masked_entry) : coefficient * logit;
    }
  }

  __device__ __forceinline__ void weighted_sum(const Columns& columns, bool whole, Real* out) const {
    const Real* coefficients = numbers(composition->coefficients);
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] = 0;
    for (int index = 0; index < composition->sources; ++index) {
      const Real coefficient = coefficients ? coefficients[index] : Real(1);
      if (coefficient == Real(0)) continue;
      Real part[entries];
      scaled(index, coefficient, columns, whole, part);
#pragma unroll
      for (int i = 0; i < entries; ++i) out[i] += part[i];
    }
  }

  // log sum_i exp(c_i z_i + o_i), online over the sources.
  __device__ __forceinline__ void log_sum(const Columns& columns, bool whole, Real* out) const {
    const Real* coefficients = numbers(composition->coefficients);
    const Real* offsets = numbers(composition->offsets);
    Real sum[entries];
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] = static_cast<Real>(masked_entry), sum[i] = 0;
    for (int index = 0; index < composition->sources; ++index) {
      const Real offset = offsets[index];
      if (offset < static_cast<Real>(masked_entry)) continue;
      Real part[entries];
      scaled(index, coefficients ? coefficients[index] : Real(1), columns, whole, part);
#pragma unroll
      for (int i = 0; i < entries; ++i) {
        const Real x = part[i] + offset;
        const Real highest = merged_max(out[i], x);
        sum[i] = sum[i] * math::exp(lowered(out[i], highest)) + math::exp(lowered(x, highest));
        out[i] = highest;
      }
    }
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] += math::log(sum[i] > Real(0) || sum[i] != sum[i] ? sum[i] : Real(1));
  }

  // A difference of exponents, no lower than what still makes a number.
  static __device__ __forceinline__ Real lowered(Real x, Real highest) {
    const Real distance = x - highest;
    return distance < Real(-83) ? Real(-83) : distance;
  }

  __device__ __forceinline__ void load_composed(const Columns& columns, bool whole, Real* out) const {
    if (composition->offsets) {
      log_sum(columns, whole, out);
    } else {
      weighted_sum(columns, whole, out);
    }
    const Real* bias = static_cast<const Real*>(composition->class_bias);
    const Real* bounds = composition->bounds ? static_cast<const Real*>(composition->bounds) + 2 * number : nullptr;
#pragma unroll
    for (int i = 0; i < entries; ++i) {
      const int64_t column = columns.at(i);
      if (bias && columns.valid(i)) out[i] += bias[column];
      if (bounds) {
        const Real x = out[i] > bounds[1] ? bounds[1] : out[i];
        out[i] = x < bounds[0] && x > static_cast<Real>(masked_below) ? bounds[0] : x;
      }
      for (int entry = 0; entry < composition->replaced; ++entry)
        if (composition->columns[number * composition->replaced + entry] == column)
          out[i] = static_cast<const Real*>(composition->values)[number * composition->replaced + entry];
      out[i] = floored(out[i]);
    }
  }
};

// A side with its temperature and its online softmax, of which each thread has a part.
template <class Real, int entries, bool composed>
struct Stream {
  Logits<Real, entries, composed> logits;
  Real temperature;
  Real scale;  // log2(e) / temperature
  Real max = static_cast<Real>(logit_floor);
  Real sum = 0;      // of 2^((x - max) * scale)
  Real log_sum = 0;  // log2 of the row's sum

  __device__ __forceinline__ Stream(const Matrix& matrix, int64_t number, double softcap, const PerRow& temperatures,
                                    const Composition* composition)
      : logits(matrix, number, softcap, composition),
        temperature(of_row<Real>(temperatures, number)),
        scale(static_cast<Real>(log2_e) / temperature) {}

  // Raises the maximum to that of the step; returns by how much (log2, <= 0) what was relative to it falls.
  __device__ __forceinline__ Real raise(const Real* block) {
    Real highest = max;
#pragma unroll
    for (int i = 0; i < entries; ++i) highest = merged_max(highest, block[i]);
    const Real shift = (max - highest) * scale;
    max = highest;
    sum *= math::exp2(shift);
    return shift;
  }

  __device__ __forceinline__ Real exponent(Real logit) const { return (logit - max) * scale; }             // log2
  __device__ __forceinline__ Real log_probability(Real logit) const { return exponent(logit) - log_sum; }  // log2

  // From the gradient of a clamped and softcapped logit to that of the logit itself.
  __device__ __forceinline__ Real through_clamp_and_softcap(Real gradient, Real logit) const {
    if (logits.softcap != Real(0)) {
      const Real ratio = logit / logits.softcap;
      gradient *= Real(1) - ratio * ratio;
    }
    return logit <= static_cast<Real>(logit_floor) ? Real(0) : gradient;
  }
};

}  // namespace kd::cuda
