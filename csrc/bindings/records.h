// How Python calls what packs and unpacks records; see bindings/divergence.h.
#pragma once

#include "bindings/arguments.h"

namespace kd {
namespace {

RecordProblem records(int64_t rows, int64_t width, int64_t vocab, int bits, Address counts, Address offsets,
                      Address data, Address faults) {
  RecordProblem problem;
  problem.rows = rows;
  problem.width = width;
  problem.vocab = vocab;
  problem.bits = bits;
  problem.counts = reinterpret_cast<const int32_t*>(counts);
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.data = reinterpret_cast<uint8_t*>(data);
  problem.faults = reinterpret_cast<int32_t*>(faults);
  return problem;
}

// The first row that is malformed, or the number of rows. On a GPU `faults` say it later.
template <class Place, void (*run)(Place, RecordProblem&)>
int64_t pack_records(Place place, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts, Address offsets,
                     Address data, Address ids, Address log_probs, Address log_tail_mass, Address faults) {
  RecordProblem problem = records(rows, width, vocab, bits, counts, offsets, data, faults);
  problem.ids = reinterpret_cast<const int64_t*>(ids);
  problem.log_probs = reinterpret_cast<const float*>(log_probs);
  problem.log_tail_mass = reinterpret_cast<const float*>(log_tail_mass);
  run(place, problem);
  return problem.wrong_row;
}

template <class Place, void (*run)(Place, RecordProblem&)>
int64_t unpack_records(Place place, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts,
                       Address offsets, Address data, Address ids, Address log_probs, Address log_tail_mass,
                       Address faults) {
  RecordProblem problem = records(rows, width, vocab, bits, counts, offsets, data, faults);
  problem.decoded_ids = reinterpret_cast<int64_t*>(ids);
  problem.decoded_log_probs = reinterpret_cast<float*>(log_probs);
  problem.decoded_log_tail_mass = reinterpret_cast<float*>(log_tail_mass);
  run(place, problem);
  return problem.wrong_row;
}

}  // namespace
}  // namespace kd
