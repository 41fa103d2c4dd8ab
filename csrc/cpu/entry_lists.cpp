// What becomes of the lists that a chunk's rows left in their storage: see csrc/cpu/gradient_entries.h.
#include <algorithm>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {

namespace {

// How many pairs of a column and a value a row's storage holds; the values begin behind that many columns.
int64_t capacity_of(const EntryChunk& chunk) { return chunk.vocab * dtype_size(chunk.storage.dtype) / 8; }

}  // namespace

// Moves the lists to where they follow one another. A dense row is listed whole.
void collect_entries(const EntryChunk& chunk, int32_t* columns, float* values) {
  const int64_t capacity = capacity_of(chunk);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const char* storage = entry_address(chunk.storage, row, 0);
    const int64_t listed = chunk.lists.counts[row], count = listed < 0 ? chunk.vocab : listed;
    if (listed < 0) {
      for (int64_t i = 0; i < count; ++i) columns[i] = static_cast<int32_t>(i);
      convert_block(storage, chunk.storage.dtype, count, values);
    } else {
      std::memcpy(columns, storage, static_cast<size_t>(count) * 4);
      std::memcpy(values, storage + 4 * capacity, static_cast<size_t>(count) * 4);
    }
    columns += count;
    values += count;
  }
}

// Turns every list into the dense row it stands for. False: out of memory.
bool expand_entries(const EntryChunk& chunk, int threads) {
  const int64_t capacity = capacity_of(chunk);
  int failed = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t row = 0; row < chunk.rows; ++row) {
    const int64_t count = chunk.lists.counts[row];
    if (count < 0) continue;
    float* dense = static_cast<float*>(thread_scratch(chunk.vocab * 4));
    if (!dense) {
#pragma omp atomic write
      failed = 1;
      continue;
    }
    char* storage = entry_address(chunk.storage, row, 0);
    const int32_t* columns = reinterpret_cast<const int32_t*>(storage);
    const float* values = reinterpret_cast<const float*>(storage + 4 * capacity);
    const float everywhere = static_cast<float>(chunk.lists.summaries[3 * row + 2]);
    std::fill(dense, dense + chunk.vocab, everywhere);
    for (int64_t i = 0; i < count; ++i) dense[columns[i]] += values[i];
    store_block(dense, chunk.vocab, storage, chunk.storage.dtype);
  }
  return !failed;
}

}  // namespace kd::KD_ISA
