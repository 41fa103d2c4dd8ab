// How Python calls what handles lists of gradient entries.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

EntryChunk entry_chunk(int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype, Address counts,
                       Address summaries) {
  return {rows, vocab, matrix(storage, stride, dtype), entry_lists(counts, summaries)};
}

void collect_entries(int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype, Address counts,
                     Address summaries, Address columns, Address values) {
  py::gil_scoped_release release;
  chosen().collect_entries(entry_chunk(rows, vocab, storage, stride, dtype, counts, summaries),
                           reinterpret_cast<int32_t*>(columns), reinterpret_cast<float*>(values));
}

void expand_entries(int threads, int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype,
                    Address counts, Address summaries) {
  without_lock([&] {
    return chosen().expand_entries(entry_chunk(rows, vocab, storage, stride, dtype, counts, summaries), threads);
  });
}

void sparse_products(int threads, int64_t rows, int64_t vocab, int64_t hidden_size, Address offsets, Address columns,
                     Address values, Address weight, int64_t weight_stride, int weight_dtype, Address hidden,
                     int64_t hidden_stride, Address everywhere, Address to_hidden, Address to_weight) {
  SparseProducts problem;
  problem.threads = threads;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.hidden_size = hidden_size;
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.columns = reinterpret_cast<const int32_t*>(columns);
  problem.values = reinterpret_cast<const float*>(values);
  problem.weight = matrix(weight, weight_stride, weight_dtype);
  problem.hidden = reinterpret_cast<const float*>(hidden);
  problem.hidden_stride = hidden_stride;
  problem.everywhere = reinterpret_cast<const float*>(everywhere);
  problem.to_hidden = reinterpret_cast<float*>(to_hidden);
  problem.to_weight = reinterpret_cast<float*>(to_weight);
  without_lock([&] { return chosen().sparse_products(problem); });
}

void bind_gradient_entries(py::module_& module) {
  module.def("collect_entries", &collect_entries);
  module.def("expand_entries", &expand_entries);
  module.def("sparse_products", &sparse_products);
}

}  // namespace
}  // namespace kd
