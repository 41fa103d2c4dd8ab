// Rows of logits as the threads of a block read and write them: eight entries a thread and step, converted to the compute type.
#pragma once

#include "problem.h"
#include "cuda/platform.cuh"
#include "math/half.h"

namespace kd::cuda {

constexpr int entries = 8;

// Logits are clamped here from below, see csrc/cpu/row_blocks.h.
constexpr double logit_floor = -1e5;

// Where a thread's entries of a step stand: next to each other where rows are aligned to 16 bytes, so that a load is one
// or two vectors; else as far apart as there are threads, so that the warp's loads are adjacent.
struct Columns {
  int64_t first;
  int64_t step;
  int64_t vocab;
  __device__ __forceinline__ int64_t at(int i) const { return first + i * step; }
  __device__ __forceinline__ bool valid(int i) const { return at(i) < vocab; }
};

// Calls body(columns, whole) for all steps of this thread; `whole`: all eight lie in the row.
template <class Body>
__device__ __forceinline__ void for_steps(int64_t vocab, bool adjacent, Body body) {
  const int64_t threads = blockDim.x, thread = threadIdx.x;
  for (int64_t start = 0; start < vocab; start += threads * entries) {
    const Columns columns = adjacent ? Columns{start + thread * entries, 1, vocab} : Columns{start + thread, threads, vocab};
    body(columns, columns.at(entries - 1) < vocab);
  }
}

__host__ __device__ __forceinline__ int64_t dtype_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

template <class Real>
struct Row {
  const char* data = nullptr;
  DType dtype = DType::float32;
  Real softcap = 0;

  __device__ __forceinline__ Row(const Matrix& matrix, int64_t row, double softcap)
      : data(static_cast<const char*>(matrix.data) + row * matrix.stride * dtype_bytes(matrix.dtype)),
        dtype(matrix.dtype),
        softcap(static_cast<Real>(softcap)) {}

  // The logits as stored; what lies outside the row reads as the floor.
  __device__ __forceinline__ void load(const Columns& columns, bool whole, Real* out) const {
    if (whole && columns.step == 1) {
      load_vectors(columns.first, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < entries; ++i) out[i] = columns.valid(i) ? load_one(columns.at(i)) : static_cast<Real>(logit_floor);
  }

  __device__ __forceinline__ Real load_one(int64_t column) const {
    switch (dtype) {
      case DType::float32: return static_cast<Real>(reinterpret_cast<const float*>(data)[column]);
      case DType::float64: return static_cast<Real>(reinterpret_cast<const double*>(data)[column]);
      case DType::bfloat16:
        return static_cast<Real>(KD_ISA::bfloat_to_float(reinterpret_cast<const uint16_t*>(data)[column]));
      default: return static_cast<Real>(KD_ISA::half_to_float(reinterpret_cast<const uint16_t*>(data)[column]));
    }
  }

  __device__ __forceinline__ void load_vectors(int64_t column, Real* out) const {
    if (dtype == DType::float32) {
      const float4* source = reinterpret_cast<const float4*>(data + column * 4);
#pragma unroll
      for (int i = 0; i < entries / 4; ++i) {
        const float4 four = source[i];
        out[4 * i] = four.x, out[4 * i + 1] = four.y, out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
      }
    } else if (dtype == DType::float64) {
#pragma unroll
      for (int i = 0; i < entries; ++i) out[i] = load_one(column + i);
    } else {
      const uint4 eight = *reinterpret_cast<const uint4*>(data + column * 2);
      const unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
      const bool brain = dtype == DType::bfloat16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint16_t low = static_cast<uint16_t>(words[i]), high = static_cast<uint16_t>(words[i] >> 16);
        out[2 * i] = static_cast<Real>(brain ? KD_ISA::bfloat_to_float(low) : KD_ISA::half_to_float(low));
        out[2 * i + 1] = static_cast<Real>(brain ? KD_ISA::bfloat_to_float(high) : KD_ISA::half_to_float(high));
      }
    }
  }
};

// A row of a gradient, in the dtype of its logits; nothing happens where it is not wanted.
template <class Real>
struct Stored {
  char* data = nullptr;
  DType dtype = DType::float32;

  __device__ __forceinline__ Stored(const Matrix& matrix, int64_t row)
      : data(matrix.data ? static_cast<char*>(matrix.data) + row * matrix.stride * dtype_bytes(matrix.dtype) : nullptr),
        dtype(matrix.dtype) {}

  __device__ __forceinline__ void store(const Columns& columns, bool whole, const Real* values) const {
    if (!data) return;
    if (whole && columns.step == 1 && dtype != DType::float64) {
      store_vectors(columns.first, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < entries; ++i)
      if (columns.valid(i)) store_one(columns.at(i), values[i]);
  }

  __device__ __forceinline__ uint16_t half_bits(Real value) const {
    const float x = static_cast<float>(value);
    return dtype == DType::bfloat16 ? KD_ISA::float_to_bfloat(x) : KD_ISA::float_to_half(x);
  }

  __device__ __forceinline__ void store_one(int64_t column, Real value) const {
    switch (dtype) {
      case DType::float32: reinterpret_cast<float*>(data)[column] = static_cast<float>(value); break;
      case DType::float64: reinterpret_cast<double*>(data)[column] = static_cast<double>(value); break;
      default: reinterpret_cast<uint16_t*>(data)[column] = half_bits(value);
    }
  }

  __device__ __forceinline__ void store_vectors(int64_t column, const Real* values) const {
    if (dtype == DType::float32) {
      float4* target = reinterpret_cast<float4*>(data + column * 4);
#pragma unroll
      for (int i = 0; i < entries / 4; ++i)
        target[i] = {static_cast<float>(values[4 * i]), static_cast<float>(values[4 * i + 1]),
                     static_cast<float>(values[4 * i + 2]), static_cast<float>(values[4 * i + 3])};
    } else {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = half_bits(values[2 * i]) | static_cast<unsigned>(half_bits(values[2 * i + 1])) << 16;
      *reinterpret_cast<uint4*>(data + column * 2) = {words[0], words[1], words[2], words[3]};
    }
  }
};

}  // namespace kd::cuda
