// Rows of logits as the threads of a block read and write them: some entries a thread and step, converted to the compute type.
#pragma once

#include "cuda/platform.cuh"
#include "math/half.h"
#include "problem.h"

namespace kd::cuda {

// Entries of a thread and step where speed counts: 16 bytes of the narrowest dtypes.
constexpr int most_entries = 8;

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

// A part of a row.
struct Span {
  int64_t begin;
  int64_t end;
};

// The part of a row that one of several blocks walks; it begins where the vectors of the row do.
__host__ __device__ __forceinline__ Span part_of_row(int64_t vocab, int blocks, int rank) {
  const int64_t vectors = (vocab + most_entries - 1) / most_entries;
  const int64_t length = (vectors + blocks - 1) / blocks * most_entries;
  const int64_t begin = rank * length, end = begin + length;
  return {begin < vocab ? begin : vocab, end < vocab ? end : vocab};
}

// Calls body(columns, whole) for all steps of this thread; `whole`: all entries lie in the span. Backwards, what was read last
// comes first: it is the likeliest still in a cache.
template <int entries, bool backwards = false, class Body>
__device__ __forceinline__ void for_steps(Span span, bool adjacent, Body body) {
  const int64_t threads = blockDim.x, thread = threadIdx.x;
  const int64_t length = threads * entries, size = span.end - span.begin, last = (size - 1) / length * length;
  for (int64_t done = 0; done < size; done += length) {
    const int64_t start = span.begin + (backwards ? last - done : done);
    const Columns columns =
        adjacent ? Columns{start + thread * entries, 1, span.end} : Columns{start + thread, threads, span.end};
    body(columns, columns.at(entries - 1) < span.end);
  }
}

template <int entries, bool backwards = false, class Body>
__device__ __forceinline__ void for_steps(int64_t vocab, bool adjacent, Body body) {
  for_steps<entries, backwards>(Span{0, vocab}, adjacent, body);
}

__host__ __device__ __forceinline__ int64_t dtype_bytes(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// The logits of a thread's step as they are stored: one vector of a half dtype, two of float.
struct Packed {
  uint4 vectors[2];
};

__host__ __device__ __forceinline__ int packed_vectors(DType dtype) { return dtype == DType::float32 ? 2 : 1; }

template <class Real>
struct Row {
  const char* data = nullptr;
  DType dtype = DType::float32;

  __device__ __forceinline__ Row(const Matrix& matrix, int64_t row)
      : data(static_cast<const char*>(matrix.data) + row * matrix.stride * dtype_bytes(matrix.dtype)),
        dtype(matrix.dtype) {}

  // The logits as stored; what lies outside the row reads as the floor.
  template <int entries>
  __device__ __forceinline__ void load(const Columns& columns, bool whole, Real* out) const {
    if constexpr (entries == most_entries) {
      if (whole && columns.step == 1) {
        load_vectors(columns.first, out);
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < entries; ++i)
      out[i] = columns.valid(i) ? load_one(columns.at(i)) : static_cast<Real>(logit_floor);
  }

  __device__ __forceinline__ Real load_one(int64_t column) const {
    if constexpr (sizeof(Real) == 8) {  // else no side is double
      if (dtype == DType::float64) return read_memory(reinterpret_cast<const double*>(data) + column);
    }
    switch (dtype) {
      case DType::float32: return static_cast<Real>(read_memory(reinterpret_cast<const float*>(data) + column));
      case DType::bfloat16:
        return static_cast<Real>(
            KD_ISA::bfloat_to_float(read_memory(reinterpret_cast<const uint16_t*>(data) + column)));
      default:
        return static_cast<Real>(KD_ISA::half_to_float(read_memory(reinterpret_cast<const uint16_t*>(data) + column)));
    }
  }

  __device__ __forceinline__ void load_vectors(int64_t column, Real* out) const {
    if (sizeof(Real) == 8 && dtype == DType::float64) {
#pragma unroll
      for (int i = 0; i < most_entries; ++i) out[i] = load_one(column + i);
    } else {
      unpack(load_packed_vectors(column), out);
    }
  }

  // As stored, of any dtype but double. What lies outside the row is zero bits.
  __device__ __forceinline__ Packed load_packed(const Columns& columns, bool whole) const {
    if (whole && columns.step == 1) return load_packed_vectors(columns.first);
    unsigned words[most_entries] = {};
#pragma unroll
    for (int i = 0; i < most_entries; ++i) {
      if (!columns.valid(i)) continue;
      if (dtype == DType::float32) {
        words[i] = read_memory(reinterpret_cast<const unsigned*>(data) + columns.at(i));
      } else {
        const unsigned bits = read_memory(reinterpret_cast<const uint16_t*>(data) + columns.at(i));
        words[i / 2] |= i % 2 ? bits << 16 : bits;
      }
    }
    return {{{words[0], words[1], words[2], words[3]}, {words[4], words[5], words[6], words[7]}}};
  }

  __device__ __forceinline__ void unpack(const Packed& packed, Real* out) const {
    const uint4 low = packed.vectors[0], high = packed.vectors[1];
    const unsigned words[most_entries] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < most_entries; ++i) out[i] = static_cast<Real>(KD_ISA::math::bit_cast<float>(words[i]));
      return;
    }
    const bool brain = dtype == DType::bfloat16;
#pragma unroll
    for (int i = 0; i < most_entries; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i % 2 ? words[i / 2] >> 16 : words[i / 2]);
      out[i] = static_cast<Real>(brain ? KD_ISA::bfloat_to_float(bits) : KD_ISA::half_to_float(bits));
    }
  }

 private:
  __device__ __forceinline__ Packed load_packed_vectors(int64_t column) const {
    const uint4* source = reinterpret_cast<const uint4*>(data + column * dtype_bytes(dtype));
    Packed packed = {};
    packed.vectors[0] = read_memory(source);
    if (dtype == DType::float32) packed.vectors[1] = read_memory(source + 1);
    return packed;
  }
};

// A row of a gradient, in the dtype of its logits; nothing happens where it is not wanted.
template <class Real>
struct Stored {
  char* data = nullptr;  // null: not wanted
  DType dtype = DType::float32;

  __device__ __forceinline__ Stored(const Matrix& matrix, int64_t row)
      : data(matrix.data ? static_cast<char*>(matrix.data) + row * matrix.stride * dtype_bytes(matrix.dtype) : nullptr),
        dtype(matrix.dtype) {}

  template <int entries>
  __device__ __forceinline__ void store(const Columns& columns, bool whole, const Real* values) const {
    if (!data) return;
    if constexpr (entries == most_entries) {
      if (whole && columns.step == 1 && dtype != DType::float64) {
        store_vectors(columns.first, values);
        return;
      }
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
    if constexpr (sizeof(Real) == 8) {
      if (dtype == DType::float64) {
        write_memory(reinterpret_cast<double*>(data) + column, static_cast<double>(value));
        return;
      }
    }
    if (dtype == DType::float32) {
      write_memory(reinterpret_cast<float*>(data) + column, static_cast<float>(value));
    } else {
      write_memory(reinterpret_cast<uint16_t*>(data) + column, half_bits(value));
    }
  }

  __device__ __forceinline__ void store_vectors(int64_t column, const Real* values) const {
    if (dtype == DType::float32) {
      float4* target = reinterpret_cast<float4*>(data + column * 4);
#pragma unroll
      for (int i = 0; i < most_entries / 4; ++i)
        write_memory(target + i, float4{static_cast<float>(values[4 * i]), static_cast<float>(values[4 * i + 1]),
                                        static_cast<float>(values[4 * i + 2]), static_cast<float>(values[4 * i + 3])});
    } else {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = half_bits(values[2 * i]) | static_cast<unsigned>(half_bits(values[2 * i + 1])) << 16;
      write_memory(reinterpret_cast<uint4*>(data + column * 2), uint4{words[0], words[1], words[2], words[3]});
    }
  }
};

// How many threads walk a row: each has at least two steps to do.
inline unsigned threads_for(int64_t vocab, int entries = most_entries, unsigned most = 512) {
  unsigned threads = 32;
  while (threads < most && static_cast<int64_t>(threads) * entries * 2 < vocab) threads *= 2;
  return threads;
}

// How many blocks share a row: several where there are too few rows to keep the device busy, as long as each has enough to do.
inline int blocks_per_row(int64_t rows, int64_t vocab, int multiprocessors) {
  constexpr int most = 8;  // that every device with clusters grants
  constexpr int64_t shortest = 4096;
  int blocks = 1;
  while (blocks < most && rows * blocks * 2 <= 2 * multiprocessors && vocab >= shortest * blocks * 2) blocks *= 2;
  return blocks;
}

// Whether a thread may load and store 16 bytes at once from every row.
inline bool aligned(const Matrix& matrix) {
  const int64_t bytes = dtype_bytes(matrix.dtype);
  return !matrix.data || (reinterpret_cast<uint64_t>(matrix.data) % 16 == 0 && matrix.stride * bytes % 16 == 0);
}

template <class Real>
__device__ __forceinline__ Real of_row(const PerRow& per_row, int64_t row) {
  return per_row.values ? static_cast<const Real*>(per_row.values)[row] : static_cast<Real>(per_row.value);
}

}  // namespace kd::cuda
