// Calling the CPU kernels: errors as exceptions, the lock released.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <type_traits>

#include "bindings/arguments.h"
#include "bindings/instruction_sets.h"

namespace kd {
namespace {

// `lowest`: the smallest of the labels that are allowed.
template <class Problem>
void check_labels(const Problem& problem, const int64_t* labels, int64_t lowest) {
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

// How much there is to do, in entries, and in how many pieces it falls at most.
struct Amount {
  int64_t entries;
  int64_t pieces;
};

template <class Problem>
Amount amount(const Problem& problem) {
  return {problem.rows * problem.vocab, problem.rows};
}

Amount amount(const RecordProblem& problem) { return {4 * problem.rows * problem.width, problem.rows}; }

Amount amount(const PairProblem& problem) {
  const int64_t n = problem.student.rows, m = problem.teacher.rows;
  return {problem.problems * (n + m + n * m / 8) * problem.vocab, problem.problems * n * m};
}

Amount transport_amount(const SinkhornProblem& problem) {
  return {4 * problem.batch * problem.rows * problem.columns, problem.batch};
}
Amount amount(const SinkhornProblem& problem) { return transport_amount(problem); }
Amount amount(const SinkhornGradientProblem& problem) { return transport_amount(problem); }

template <class Kernel, class Problem>
void run(Kernel kernel, Problem& problem) {
  const auto [entries, pieces] = amount(problem);
  // Below this a second thread costs more than it brings.
  if (entries < 32768) problem.threads = 1;
  if (pieces < problem.threads) problem.threads = pieces < 1 ? 1 : static_cast<int>(pieces);
  without_lock([&] { return kernel(problem); });
}

template <class Kernel, class Problem>
void launch(Kernel kernel, Problem& problem) {
  check_labels(problem, problem.labels, 0);
  check_labels(problem, problem.targets, -1);
  run(kernel, problem);
}

// A kernel of the instruction set in use, as the bindings of a family that GPUs have too call it.
template <auto kernel, class Problem>
void on_cpu(int threads, Problem& problem) {
  problem.threads = threads;
  if constexpr (std::is_base_of_v<RowProblem, Problem>) {
    launch(chosen().*kernel, problem);
  } else {
    run(chosen().*kernel, problem);
  }
}

}  // namespace
}  // namespace kd
