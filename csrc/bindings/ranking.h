// How Python calls the family `ranking`.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

// Ids [rows, count] lie below the vocabulary's size.
void check_ids(const char* name, const int64_t* ids, int64_t rows, int64_t count, int64_t vocab) {
  for (int64_t i = 0; ids && i < rows * count; ++i)
    if (ids[i] >= vocab)
      throw py::value_error(std::string(name) + ": " + std::to_string(ids[i]) + " lies outside the vocabulary [0, " +
                            std::to_string(vocab) + ")");
}

void plackett_luce(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student,
                   int64_t student_stride, int student_dtype, double student_softcap, Address teacher,
                   int64_t teacher_stride, int teacher_dtype, double teacher_temperature, Address teacher_temperatures,
                   double teacher_softcap, Address labels, Address active, int64_t ranks, Address order,
                   Address weights, int64_t weight_stride, Address values, Address grad_values, Address grad_student,
                   int64_t grad_student_stride) {
  RankingProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.student = matrix(student, student_stride, student_dtype);
  problem.student_softcap = student_softcap;
  problem.teacher = matrix(teacher, teacher_stride, teacher_dtype);
  problem.teacher_temperature = per_row(teacher_temperature, teacher_temperatures);
  problem.teacher_softcap = teacher_softcap;
  problem.labels = reinterpret_cast<const int64_t*>(labels);
  problem.active = reinterpret_cast<const uint8_t*>(active);
  problem.ranks = ranks;
  problem.order = reinterpret_cast<const int64_t*>(order);
  problem.weights = reinterpret_cast<const void*>(weights);
  problem.weight_stride = weight_stride;
  problem.values = reinterpret_cast<void*>(values);
  problem.grad_values = per_row(1, grad_values);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  check_ids("order", problem.order, rows, ranks, vocab);
  check_labels(problem, problem.labels, 0);
  run(chosen().plackett_luce, problem);
}

void token_ranks(int threads, bool compute_double, int64_t rows, int64_t vocab, Address source, int64_t stride,
                 int dtype, int64_t count, Address ids, Address ranks) {
  RankProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.source = matrix(source, stride, dtype);
  problem.count = count;
  problem.ids = reinterpret_cast<const int64_t*>(ids);
  problem.ranks = reinterpret_cast<int64_t*>(ranks);
  check_ids("ids", problem.ids, rows, count, vocab);
  run(chosen().token_ranks, problem);
}

void bind_ranking(py::module_& module) {
  module.def("plackett_luce", &plackett_luce);
  module.def("token_ranks", &token_ranks);
}

}  // namespace
}  // namespace kd
