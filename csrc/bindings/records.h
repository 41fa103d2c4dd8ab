// How Python calls what packs and unpacks records.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

RecordProblem records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts,
                      Address offsets, Address data) {
  RecordProblem problem;
  problem.rows = rows;
  problem.width = width;
  problem.vocab = vocab;
  problem.bits = bits;
  // Below this a second thread costs more than it brings.
  problem.threads = rows * width < 8192 ? 1 : threads;
  problem.counts = reinterpret_cast<const int32_t*>(counts);
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.data = reinterpret_cast<uint8_t*>(data);
  return problem;
}

// The first row that is malformed, or the number of rows.
int64_t launch(bool (*kernel)(RecordProblem&), RecordProblem& problem) {
  without_lock([&] { return kernel(problem); });
  return problem.wrong_row;
}

int64_t pack_records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts, Address offsets,
                     Address data, Address ids, Address log_probs, Address log_tail_mass) {
  RecordProblem problem = records(threads, rows, width, vocab, bits, counts, offsets, data);
  problem.ids = reinterpret_cast<const int64_t*>(ids);
  problem.log_probs = reinterpret_cast<const float*>(log_probs);
  problem.log_tail_mass = reinterpret_cast<const float*>(log_tail_mass);
  return launch(chosen().pack_records, problem);
}

int64_t unpack_records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts,
                       Address offsets, Address data, Address ids, Address log_probs, Address log_tail_mass) {
  RecordProblem problem = records(threads, rows, width, vocab, bits, counts, offsets, data);
  problem.decoded_ids = reinterpret_cast<int64_t*>(ids);
  problem.decoded_log_probs = reinterpret_cast<float*>(log_probs);
  problem.decoded_log_tail_mass = reinterpret_cast<float*>(log_tail_mass);
  return launch(chosen().unpack_records, problem);
}

void bind_records(py::module_& module) {
  module.def("pack_records", &pack_records);
  module.def("unpack_records", &unpack_records);
}

}  // namespace
}  // namespace kd
