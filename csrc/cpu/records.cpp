// The `records` family on the CPU: batches of records, a token per iteration.
#include "math/records.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/kernels.h"

namespace kd::KD_ISA {
namespace {

constexpr float mass_slack = 0.05f;  // by how much log-probabilities of low precision may be too large

// An entry as one number that sorts by id.
uint64_t entry(int64_t id, float log_prob) {
  return static_cast<uint64_t>(id) << 32 | math::bit_cast<uint32_t>(log_prob);
}

// Sorts by the low `bits` bits of the ids; the result is where the function says.
uint64_t* sort_by_id(uint64_t* entries, uint64_t* spare, int64_t count, int bits) {
  constexpr int digit_bits = 6, digits = 1 << digit_bits;
  for (int shift = 0; shift < bits; shift += digit_bits) {
    int64_t places[digits] = {};
    for (int64_t i = 0; i < count; ++i) ++places[entries[i] >> (32 + shift) & (digits - 1)];
    int64_t place = 0;
    for (int64_t& next : places) place += std::exchange(next, place);
    for (int64_t i = 0; i < count; ++i) spare[places[entries[i] >> (32 + shift) & (digits - 1)]++] = entries[i];
    std::swap(entries, spare);
  }
  return entries;
}

// The entries of a row by ascending id: their number, or -1 if they are no truncated distribution.
int64_t gather(const RecordProblem& problem, int64_t row, int id_bits, uint64_t* entries, uint64_t* spare, int32_t* ids,
               float* log_probs) {
  const int64_t* given = problem.ids + row * problem.width;
  const float* values = problem.log_probs + row * problem.width;
  int64_t count = 0;
  bool valid = true, ascending = true;
  for (int64_t i = 0; i < problem.width; ++i) {
    if (given[i] == -1 || values[i] == -INFINITY) continue;
    valid &= given[i] >= 0 && given[i] < problem.vocab && values[i] <= mass_slack;
    entries[count] = entry(given[i], values[i]);
    ascending &= count == 0 || entries[count] >> 32 > entries[count - 1] >> 32;
    ++count;
  }
  if (!valid || count != problem.counts[row]) return -1;
  if (!ascending) entries = sort_by_id(entries, spare, count, id_bits);
  int64_t before = -1;
  for (int64_t i = 0; i < count; ++i) {
    ids[i] = static_cast<int32_t>(entries[i] >> 32);
    log_probs[i] = math::bit_cast<float>(static_cast<uint32_t>(entries[i]));
    valid &= ids[i] > before;
    before = ids[i];
  }
  return valid ? count : -1;
}

// The lowest row that a thread has found to be wrong.
class WrongRow {
 public:
  explicit WrongRow(int64_t rows) : row_(rows) {}

  void add(int64_t row) {
    int64_t lowest = row_.load();
    while (row < lowest && !row_.compare_exchange_weak(lowest, row)) {
    }
  }

  int64_t row() const { return row_.load(); }

 private:
  std::atomic<int64_t> row_;
};

}  // namespace

bool pack_records(RecordProblem& problem) {
  const math::RecordFormat format{problem.vocab, problem.bits};
  int id_bits = 0;
  while ((problem.vocab - 1) >> id_bits) ++id_bits;
  std::atomic<bool> memory{true};
  WrongRow wrong(problem.rows);
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(static)
  for (int64_t row = 0; row < problem.rows; ++row) {
    uint64_t* entries = static_cast<uint64_t*>(thread_scratch(problem.width * 24));
    if (!entries && problem.width > 0) {
      memory = false;
      continue;
    }
    uint64_t* spare = entries + problem.width;
    int32_t* ids = reinterpret_cast<int32_t*>(spare + problem.width);
    float* log_probs = reinterpret_cast<float*>(ids + problem.width);
    const int64_t count = gather(problem, row, id_bits, entries, spare, ids, log_probs);
    if (count < 0) {
      wrong.add(row);
    } else if (count > 0) {
      math::encode_record(ids, log_probs, problem.log_tail_mass[row], count, format,
                          problem.data + problem.offsets[row]);
    }
  }
  problem.wrong_row = wrong.row();
  return memory;
}

bool unpack_records(RecordProblem& problem) {
  const math::RecordFormat format{problem.vocab, problem.bits};
  std::atomic<bool> memory{true};
  WrongRow wrong(problem.rows);
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(static)
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t count = problem.counts[row];
    int32_t* ids = static_cast<int32_t*>(thread_scratch(count * 4));
    if (!ids && count > 0) {
      memory = false;
      continue;
    }
    int64_t* to_ids = problem.decoded_ids + row * problem.width;
    float* to_log_probs = problem.decoded_log_probs + row * problem.width;
    if (!math::decode_record(problem.data + problem.offsets[row], format, count, ids, to_log_probs,
                             problem.decoded_log_tail_mass + row)) {
      wrong.add(row);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) to_ids[i] = ids[i];
    std::fill(to_ids + count, to_ids + problem.width, int64_t{-1});
    std::fill(to_log_probs + count, to_log_probs + problem.width, -INFINITY);
  }
  problem.wrong_row = wrong.row();
  return memory;
}

}  // namespace kd::KD_ISA
