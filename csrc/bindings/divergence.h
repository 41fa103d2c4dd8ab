// How Python calls the families `divergence` and `token_statistics`.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

RowProblem sides(int threads, bool compute_double, int64_t rows, int64_t vocab, const Matrix& student,
                 const Matrix& teacher, const PerRow& student_temperature, const PerRow& teacher_temperature,
                 double student_softcap, double teacher_softcap, Address labels, Address active) {
  RowProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.student = student;
  problem.teacher = teacher;
  problem.student_temperature = student_temperature;
  problem.teacher_temperature = teacher_temperature;
  problem.student_softcap = student_softcap;
  problem.teacher_softcap = teacher_softcap;
  problem.labels = reinterpret_cast<const int64_t*>(labels);
  problem.active = reinterpret_cast<const uint8_t*>(active);
  return problem;
}

void divergence(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student, int64_t student_stride,
                int student_dtype, Address teacher, int64_t teacher_stride, int teacher_dtype,
                double student_temperature, Address student_temperatures, double teacher_temperature,
                Address teacher_temperatures, double student_softcap, double teacher_softcap, Address labels,
                Address active, int kind, double a, double b, Address divergence, Address cross_entropy,
                double grad_divergence, Address grad_divergences, double grad_cross_entropy,
                Address grad_cross_entropies, Address grad_student, int64_t grad_student_stride, Address grad_teacher,
                int64_t grad_teacher_stride, Address total, bool fresh_gradients, Address student_counts,
                Address student_summaries, Address teacher_counts, Address teacher_summaries, double tolerance,
                bool stochastic, uint64_t seed, int64_t first_row, Address parameters, Address targets,
                double target_weight, Address target_weights, double rest_weight, Address rest_weights) {
  RowProblem problem =
      sides(threads, compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.kind = kind;
  problem.a = a;
  problem.b = b;
  problem.parameters = reinterpret_cast<const void*>(parameters);
  problem.targets = reinterpret_cast<const int64_t*>(targets);
  problem.target_weight = per_row(target_weight, target_weights);
  problem.rest_weight = per_row(rest_weight, rest_weights);
  problem.divergence = reinterpret_cast<void*>(divergence);
  problem.cross_entropy = reinterpret_cast<void*>(cross_entropy);
  problem.grad_divergence = per_row(grad_divergence, grad_divergences);
  problem.grad_cross_entropy = per_row(grad_cross_entropy, grad_cross_entropies);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.grad_teacher = matrix(grad_teacher, grad_teacher_stride, teacher_dtype);
  std::unique_ptr<double[]> weighted(total ? new double[static_cast<size_t>(rows)] : nullptr);
  problem.weighted = weighted.get();
  problem.fresh_gradients = fresh_gradients;
  problem.student_entries = entry_lists(student_counts, student_summaries);
  problem.teacher_entries = entry_lists(teacher_counts, teacher_summaries);
  problem.entry_rule = {tolerance, stochastic, seed, first_row};
  launch(chosen().divergence, problem);
  if (!total) return;
  // In the order of the rows, so that it does not depend on the threads.
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += weighted[row];
  if (compute_double) {
    *reinterpret_cast<double*>(total) = sum;
  } else {
    *reinterpret_cast<float*>(total) = static_cast<float>(sum);
  }
}

void token_statistics(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student,
                      int64_t student_stride, int student_dtype, Address teacher, int64_t teacher_stride,
                      int teacher_dtype, double student_temperature, Address student_temperatures,
                      double teacher_temperature, Address teacher_temperatures, double student_softcap,
                      double teacher_softcap, Address labels, Address active, Address statistics, Address argmax) {
  RowProblem problem =
      sides(threads, compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.statistics = reinterpret_cast<void*>(statistics);
  problem.argmax = reinterpret_cast<int64_t*>(argmax);
  launch(chosen().token_statistics, problem);
}

void bind_divergence(py::module_& module) {
  module.def("divergence", &divergence);
  module.def("token_statistics", &token_statistics);
}

}  // namespace
}  // namespace kd
