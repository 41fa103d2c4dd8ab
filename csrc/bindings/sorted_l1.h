// How Python calls the family `sorted_l1`.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

void sorted_l1(int threads, bool compute_double, int64_t rows, int64_t student_vocab, int64_t teacher_vocab,
               Address student, int64_t student_stride, int student_dtype, Address teacher, int64_t teacher_stride,
               int teacher_dtype, double student_temperature, Address student_temperatures, double teacher_temperature,
               Address teacher_temperatures, double student_softcap, double teacher_softcap, Address active,
               double error_bound, Address values, Address omitted, Address grad_values, Address grad_student,
               int64_t grad_student_stride, Address grad_teacher, int64_t grad_teacher_stride) {
  SortedL1Problem problem;
  problem.rows = rows;
  problem.vocab = student_vocab + teacher_vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.student = matrix(student, student_stride, student_dtype);
  problem.teacher = matrix(teacher, teacher_stride, teacher_dtype);
  problem.student_vocab = student_vocab;
  problem.teacher_vocab = teacher_vocab;
  problem.student_temperature = per_row(student_temperature, student_temperatures);
  problem.teacher_temperature = per_row(teacher_temperature, teacher_temperatures);
  problem.student_softcap = student_softcap;
  problem.teacher_softcap = teacher_softcap;
  problem.active = reinterpret_cast<const uint8_t*>(active);
  problem.error_bound = error_bound;
  problem.values = reinterpret_cast<void*>(values);
  problem.omitted = reinterpret_cast<void*>(omitted);
  problem.grad_values = per_row(1, grad_values);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.grad_teacher = matrix(grad_teacher, grad_teacher_stride, teacher_dtype);
  run(chosen().sorted_l1, problem);
}

void bind_sorted_l1(py::module_& module) { module.def("sorted_l1", &sorted_l1); }

}  // namespace
}  // namespace kd
