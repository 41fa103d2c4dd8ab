// What every family needs to be called from Python: addresses as numbers, errors as exceptions, the lock released.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <new>
#include <string>

#include "bindings/instruction_sets.h"

namespace py = pybind11;

namespace kd {
namespace {

using Address = uintptr_t;

Matrix matrix(Address data, int64_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

PerRow per_row(double value, Address values) { return {reinterpret_cast<const void*>(values), value}; }

EntryLists entry_lists(Address counts, Address summaries) {
  return {reinterpret_cast<int32_t*>(counts), reinterpret_cast<double*>(summaries)};
}

// `lowest`: the smallest of the labels that are allowed.
void check_labels(const RowProblem& problem, const int64_t* labels, int64_t lowest) {
  if (!labels) return;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (problem.active && !problem.active[row]) continue;
    const int64_t label = labels[row];
    if (label < lowest || label >= problem.vocab)
      throw py::value_error("labels: token " + std::to_string(row) + " has label " + std::to_string(label) +
                            ", outside the vocabulary [0, " + std::to_string(problem.vocab) + ")");
  }
}

// Runs a kernel while other Python threads go on; kernels fail only for want of memory.
template <class Call>
void without_lock(const Call& call) {
  bool done;
  {
    py::gil_scoped_release release;
    done = call();
  }
  if (!done) throw std::bad_alloc();
}

template <class Kernel, class Problem>
void run(Kernel kernel, Problem& problem) {
  // Below this a second thread costs more than it brings.
  if (problem.rows * problem.vocab < 32768) problem.threads = 1;
  if (problem.rows < problem.threads) problem.threads = problem.rows < 1 ? 1 : static_cast<int>(problem.rows);
  without_lock([&] { return kernel(problem); });
}

template <class Kernel, class Problem>
void launch(Kernel kernel, Problem& problem) {
  check_labels(problem, problem.labels, 0);
  check_labels(problem, problem.targets, -1);
  run(kernel, problem);
}

}  // namespace
}  // namespace kd
