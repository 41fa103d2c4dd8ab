// How Python calls the family `row_deviation`.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

void row_deviation(int threads, bool compute_double, int64_t rows, int64_t vocab, Address logits, int64_t stride,
                   int dtype, double least, Address means, Address deviations, Address gradient,
                   int64_t gradient_stride) {
  DeviationProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.logits = matrix(logits, stride, dtype);
  problem.least = least;
  problem.means = reinterpret_cast<void*>(means);
  problem.deviations = reinterpret_cast<void*>(deviations);
  problem.gradient = matrix(gradient, gradient_stride, dtype);
  run(chosen().row_deviation, problem);
}

void bind_row_deviation(py::module_& module) { module.def("row_deviation", &row_deviation); }

}  // namespace
}  // namespace kd
