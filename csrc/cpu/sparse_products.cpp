// The products that carry a sparse gradient of the logits, G [rows, vocab], back through a language-model
// head: to_hidden = scale * G W and to_weight += scale * G^T H.
//
// Both walk the vocabulary in blocks whose part of the weight stays in the second-level cache, so the
// weight is read once and its gradient written once. A result's entries are summed in an order that
// depends neither on the threads nor on who does what: of to_hidden a thread owns rows, of to_weight
// columns of G. While an entry's vector is used, a part of the result is held in registers.
#include <algorithm>
#include <memory>
#include <new>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int lanes = vector_bytes / 4;
typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4)));

// The vectors of a result that are held in registers at a time.
constexpr int strip_vectors = vector_bytes == 64 ? 18 : 8;

// result[0 .. width) += sum_e values[e] * table[places[e] - first][0 .. width), over a strip of `count` vectors.
template <int count>
KD_INLINE void accumulate_strip(const int32_t* places, int32_t first, const float* values, int64_t entries,
                                const float* table, int64_t stride, float* result) {
  Vector sums[count];
  for (int i = 0; i < count; ++i) sums[i] = *reinterpret_cast<const Vector*>(result + i * lanes);
  for (int64_t e = 0; e < entries; ++e) {
    const float* row = table + (places[e] - first) * stride;
    const float value = values[e];
    for (int i = 0; i < count; ++i) sums[i] += value * *reinterpret_cast<const Vector*>(row + i * lanes);
  }
  for (int i = 0; i < count; ++i) *reinterpret_cast<Vector*>(result + i * lanes) = sums[i];
}

void accumulate(const int32_t* places, int32_t first, const float* values, int64_t entries, const float* table,
                int64_t stride, float* result, int64_t width) {
  int64_t start = 0;
  for (; start + strip_vectors * lanes <= width; start += strip_vectors * lanes)
    accumulate_strip<strip_vectors>(places, first, values, entries, table + start, stride, result + start);
  for (; start + 4 * lanes <= width; start += 4 * lanes)
    accumulate_strip<4>(places, first, values, entries, table + start, stride, result + start);
  for (; start + lanes <= width; start += lanes)
    accumulate_strip<1>(places, first, values, entries, table + start, stride, result + start);
  for (; start < width; ++start) {
    float sum = result[start];
    for (int64_t e = 0; e < entries; ++e) sum += values[e] * table[(places[e] - first) * stride + start];
    result[start] = sum;
  }
}

// The rows of a matrix from `first` on, as floats: where they are, or converted into `buffer`.
const float* as_floats(const Matrix& matrix, int64_t first, int64_t count, int64_t width, float* buffer,
                       int64_t& stride) {
  if (matrix.dtype == DType::float32) {
    stride = matrix.stride;
    return static_cast<const float*>(matrix.data) + first * matrix.stride;
  }
  stride = width;
  for (int64_t i = 0; i < count; ++i)
    convert_block(entry_address(matrix, first + i, 0), matrix.dtype, width, buffer + i * width);
  return buffer;
}

// How many rows of `width` floats may stay in the second-level cache beside as many of another matrix.
int64_t cached_rows(int64_t width, int64_t rows) {
  constexpr int64_t cached_floats = 256 << 10;
  return std::max<int64_t>(16, std::min(rows, cached_floats / width));
}

}  // namespace

bool sparse_products(const SparseProducts& problem) {
  const int64_t rows = problem.rows, vocab = problem.vocab, width = problem.hidden_size;
  const int64_t block_columns = cached_rows(width, vocab), tile_rows = cached_rows(width, rows);
  const int64_t blocks = (vocab + block_columns - 1) / block_columns, tiles = (rows + tile_rows - 1) / tile_rows;
  const int64_t *offsets = problem.offsets, entries = rows ? offsets[rows] : 0;
  // Where each block's entries begin in each row.
  std::unique_ptr<int64_t[]> begins(new (std::nothrow) int64_t[static_cast<size_t>(rows * (blocks + 1))]);
  if (!begins) return false;
  int failed = 0;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      int64_t entry = offsets[row];
      for (int64_t block = 0; block <= blocks; ++block) {
        const int64_t end = block * block_columns;
        while (entry < offsets[row + 1] && problem.columns[entry] < end) ++entry;
        begins[row * (blocks + 1) + block] = block == blocks ? offsets[row + 1] : entry;
      }
    }
    const int64_t weight_floats = problem.weight.dtype == DType::float32 ? 0 : block_columns * width;
    char* memory = static_cast<char*>(thread_scratch((weight_floats + 64) * 4));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    // to_hidden: a thread's rows against one block of the weight after the other.
    if (problem.to_hidden && memory) {
      float* buffer = reinterpret_cast<float*>(memory);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < problem.threads; ++part) {
        // Rows in equal shares of entries.
        const auto share = [&](int64_t index) {
          return std::lower_bound(offsets, offsets + rows, entries * index / problem.threads) - offsets;
        };
        const int64_t first = part == 0 ? 0 : share(part), last = part + 1 == problem.threads ? rows : share(part + 1);
        for (int64_t row = first; row < last; ++row)
          std::memset(problem.to_hidden + row * width, 0, static_cast<size_t>(width) * 4);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t column = block * block_columns, count = std::min(block_columns, vocab - column);
          int64_t stride;
          const float* table = as_floats(problem.weight, column, count, width, buffer, stride);
          for (int64_t row = first; row < last; ++row) {
            const int64_t begin = begins[row * (blocks + 1) + block], end = begins[row * (blocks + 1) + block + 1];
            if (begin < end)
              accumulate(problem.columns + begin, static_cast<int32_t>(column), problem.values + begin, end - begin,
                         table, stride, problem.to_hidden + row * width, width);
          }
        }
      }
    }
  }
  if (failed) return false;
  if (!problem.to_weight) return true;
  // to_weight: a block's entries by tile of rows and by column, then one such group after the other.
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t column = block * block_columns, count = std::min(block_columns, vocab - column);
    if (problem.everywhere)
      for (int64_t c = column; c < column + count; ++c) {
        float* result = problem.to_weight + c * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) result[i] += problem.everywhere[i];
      }
    const int64_t groups = tiles * count;
    const auto for_entries = [&](auto body) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t* begin = begins.get() + row * (blocks + 1) + block;
        for (int64_t e = begin[0]; e < begin[1]; ++e)
          body(row / tile_rows * count + problem.columns[e] - column, row, problem.values[e]);
      }
    };
    int64_t found = 0;
    for (int64_t row = 0; row < rows; ++row)
      found += begins[row * (blocks + 1) + block + 1] - begins[row * (blocks + 1) + block];
    char* memory = static_cast<char*>(thread_scratch((groups + 1 + found) * 8));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    // At first where the next entry of each group goes, at last where each group ends.
    int64_t* ends = reinterpret_cast<int64_t*>(memory);
    int32_t* row_of = reinterpret_cast<int32_t*>(ends + groups + 1);
    float* values = reinterpret_cast<float*>(row_of + found);
    std::fill(ends, ends + groups + 1, 0);
    for_entries([&](int64_t group, int64_t, float) { ++ends[group + 1]; });
    for (int64_t group = 0; group < groups; ++group) ends[group + 1] += ends[group];
    for_entries([&](int64_t group, int64_t row, float value) {
      row_of[ends[group]] = static_cast<int32_t>(row);
      values[ends[group]++] = value;
    });
    for (int64_t group = 0, begin = 0; group < groups; begin = ends[group++])
      if (begin < ends[group])
        accumulate(row_of + begin, 0, values + begin, ends[group] - begin, problem.hidden, problem.hidden_stride,
                   problem.to_weight + (column + group % count) * width, width);
  }
  return !failed;
}

}  // namespace kd::KD_ISA
