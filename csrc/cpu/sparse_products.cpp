// The products that carry a sparse gradient of the logits, G [rows, vocab], back through a language-model
// head: to_hidden = G W and to_weight += G^T H.
//
// Both cut the hidden size into strips, packed, so narrow that one of thousands of rows stays in the
// second-level cache beside a block of the vocabulary: the weight is read once, its gradient is written
// once, and what an entry needs is near. While a row's entries in a block go by, its strip of the result
// is held in registers. A result's entries are summed in an order that does not depend on the threads.
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
typedef float Vector __attribute__((vector_size(vector_bytes), may_alias));

// The vectors of a result that are held in registers at a time, at most.
constexpr int most_vectors = vector_bytes == 64 ? 9 : 8;

// What a thread keeps in its second-level cache: rows of a strip of the result or of H, and of the weight.
constexpr int64_t tile_floats = 288 << 10, block_floats = 144 << 10;

// Entries of the vocabulary whose gradients a thread makes with one copy of H.
constexpr int64_t blocks_at_once = 4;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// sums[0 .. count) += sum_e values[e] * row (places[e] - first) of a table with `count` vectors per row.
template <int count>
void accumulate_vectors(const int32_t* places, int32_t first, const float* values, int64_t entries, const float* table,
                        float* result) {
  Vector sums[count];
  Vector* out = reinterpret_cast<Vector*>(result);
  for (int i = 0; i < count; ++i) sums[i] = out[i];
  for (int64_t e = 0; e < entries; ++e) {
    const Vector* row = reinterpret_cast<const Vector*>(table) + static_cast<int64_t>(places[e] - first) * count;
    const float value = values[e];
    for (int i = 0; i < count; ++i) sums[i] += value * row[i];
  }
  for (int i = 0; i < count; ++i) out[i] = sums[i];
}

using Accumulate = void (*)(const int32_t*, int32_t, const float*, int64_t, const float*, float*);

template <int count = most_vectors>
Accumulate accumulate_of(int64_t vectors) {
  if constexpr (count > 1)
    if (vectors < count) return accumulate_of<count - 1>(vectors);
  return accumulate_vectors<count>;
}

// How the hidden size is cut: into strips of whole vectors, the last one perhaps narrower and filled up with zeros.
struct Strips {
  int64_t size, count, width;
  Accumulate accumulate;

  explicit Strips(int64_t hidden_size) : size(hidden_size) {
    const int64_t vectors = divide_up(size, lanes), per_strip = divide_up(vectors, divide_up(vectors, most_vectors));
    count = divide_up(vectors, per_strip);
    width = per_strip * lanes;
    accumulate = accumulate_of(per_strip);
  }

  int64_t first(int64_t strip) const { return strip * width; }
  int64_t length(int64_t strip) const { return std::min(width, size - first(strip)); }

  // Copies a strip of `rows` rows from `row` on.
  void pack(const Matrix& matrix, int64_t row, int64_t rows, int64_t strip, float* packed) const {
    const int64_t begin = first(strip), filled = length(strip);
    for (int64_t i = 0; i < rows; ++i, packed += width) {
      convert_block(entry_address(matrix, row + i, begin), matrix.dtype, filled, packed);
      std::fill(packed + filled, packed + width, 0.0f);
    }
  }
};

// Where each block's entries begin in each row, [rows, blocks + 1].
struct BlockBegins {
  int64_t blocks, columns;
  std::unique_ptr<int64_t[]> begins;

  BlockBegins(const SparseProducts& problem, int64_t columns)
      : blocks(divide_up(problem.vocab, columns)),
        columns(columns),
        begins(new (std::nothrow) int64_t[static_cast<size_t>(problem.rows * (blocks + 1))]) {}

  void find(const SparseProducts& problem, int64_t row) {
    int64_t entry = problem.offsets[row];
    int64_t* of_row = begins.get() + row * (blocks + 1);
    for (int64_t block = 0; block < blocks; ++block) {
      while (entry < problem.offsets[row + 1] && problem.columns[entry] < block * columns) ++entry;
      of_row[block] = entry;
    }
    of_row[blocks] = problem.offsets[row + 1];
  }

  const int64_t* of(int64_t row, int64_t block) const { return begins.get() + row * (blocks + 1) + block; }
};

// A strip of to_hidden, of `count` rows from `row` on.
bool strip_to_hidden(const SparseProducts& problem, const BlockBegins& begins, const Strips& strips, int64_t strip,
                     int64_t row, int64_t count) {
  float* sums = static_cast<float*>(thread_scratch((count + begins.columns) * strips.width * 4));
  if (!sums) return false;
  float* table = sums + count * strips.width;
  std::fill(sums, table, 0.0f);
  for (int64_t block = 0; block < begins.blocks; ++block) {
    const int64_t column = block * begins.columns;
    strips.pack(problem.weight, column, std::min(begins.columns, problem.vocab - column), strip, table);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* begin = begins.of(row + i, block);
      if (begin[0] < begin[1])
        strips.accumulate(problem.columns + begin[0], static_cast<int32_t>(column), problem.values + begin[0],
                          begin[1] - begin[0], table, sums + i * strips.width);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    std::copy_n(sums + i * strips.width, strips.length(strip),
                problem.to_hidden + (row + i) * problem.hidden_size + strips.first(strip));
  return true;
}

// Adds to the rows of to_weight from block `first` to `last`, with `tile` rows of H at a time.
bool blocks_to_weight(const SparseProducts& problem, const BlockBegins& begins, const Strips& strips, int64_t first,
                      int64_t last, int64_t tile) {
  const int64_t column = first * begins.columns, columns = std::min(last * begins.columns, problem.vocab) - column;
  int64_t most = 0;
  for (int64_t start = 0; start < problem.rows; start += tile) {
    int64_t found = 0;
    for (int64_t row = start; row < std::min(start + tile, problem.rows); ++row)
      found += *begins.of(row, last) - *begins.of(row, first);
    most = std::max(most, found);
  }
  char* memory = static_cast<char*>(thread_scratch((tile * strips.width + most) * 4 + (columns + 1 + most) * 8));
  if (!memory) return false;
  float* table = reinterpret_cast<float*>(memory);
  int64_t* ends = reinterpret_cast<int64_t*>(table + tile * strips.width);
  int32_t* rows = reinterpret_cast<int32_t*>(ends + columns + 1);
  float* values = reinterpret_cast<float*>(rows + most);
  Matrix hidden;
  hidden.data = const_cast<float*>(problem.hidden);
  hidden.stride = problem.hidden_stride;
  for (int64_t start = 0; start == 0 || start < problem.rows; start += tile) {
    const int64_t count = std::min(tile, problem.rows - start);
    // The tile's entries by column: `ends` are at first where the next entry of each goes, at last where each ends.
    const auto for_entries = [&](auto body) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t e = *begins.of(start + i, first), end = *begins.of(start + i, last); e < end; ++e)
          body(problem.columns[e] - column, static_cast<int32_t>(i), problem.values[e]);
    };
    std::fill(ends, ends + columns + 1, 0);
    for_entries([&](int64_t c, int32_t, float) { ++ends[c + 1]; });
    for (int64_t c = 0; c < columns; ++c) ends[c + 1] += ends[c];
    for_entries([&](int64_t c, int32_t row, float value) {
      rows[ends[c]] = row;
      values[ends[c]++] = value;
    });
    const bool everywhere = problem.everywhere && start == 0;
    for (int64_t strip = 0; strip < strips.count; ++strip) {
      strips.pack(hidden, start, count, strip, table);
      alignas(vector_bytes) float sums[most_vectors * lanes];
      for (int64_t c = 0, begin = 0; c < columns; begin = ends[c++]) {
        if (begin == ends[c] && !everywhere) continue;
        const int64_t length = strips.length(strip), place = strips.first(strip);
        std::fill(sums, sums + strips.width, 0.0f);
        if (everywhere) std::copy_n(problem.everywhere + place, length, sums);
        strips.accumulate(rows + begin, 0, values + begin, ends[c] - begin, table, sums);
        float* result = problem.to_weight + (column + c) * problem.hidden_size + place;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) result[i] += sums[i];
      }
    }
  }
  return true;
}

}  // namespace

bool sparse_products(const SparseProducts& problem) {
  const int64_t rows = problem.rows, threads = problem.threads;
  if (problem.hidden_size == 0) return true;
  const Strips strips(problem.hidden_size);
  const int64_t block_columns = std::min(problem.vocab, block_floats / strips.width);
  const int64_t cached_rows = tile_floats / strips.width;
  BlockBegins begins(problem, std::max<int64_t>(1, block_columns));
  if (!begins.begins) return false;
  const int64_t blocks = begins.blocks;
  // Every thread shall have something to do.
  const int64_t tiles = std::max(divide_up(rows, cached_rows), std::min(rows, divide_up(threads, strips.count)));
  const int64_t tile = tiles ? divide_up(rows, tiles) : 0;
  const int64_t at_once = std::max<int64_t>(1, std::min(blocks_at_once, blocks / (2 * threads)));
  int failed = 0;
#pragma omp parallel num_threads(problem.threads) if (problem.threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) begins.find(problem, row);
    if (problem.to_hidden) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tiles * strips.count; ++task) {
        const int64_t row = task / strips.count * tile, count = std::min(tile, rows - row);
        if (count > 0 && !strip_to_hidden(problem, begins, strips, task % strips.count, row, count)) {
#pragma omp atomic write
          failed = 1;
        }
      }
    }
    if (problem.to_weight) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t first = 0; first < blocks; first += at_once) {
        if (!blocks_to_weight(problem, begins, strips, first, std::min(first + at_once, blocks),
                              std::min(cached_rows, std::max<int64_t>(1, rows)))) {
#pragma omp atomic write
          failed = 1;
        }
      }
    }
  }
  return !failed;
}

}  // namespace kd::KD_ISA
