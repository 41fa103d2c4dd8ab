// How Python calls the family `bernoulli`.
#pragma once

#include "bindings/divergence.h"
#include "bindings/launching.h"

namespace kd {
namespace {

void bernoulli(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student, int64_t student_stride,
               int student_dtype, Address teacher, int64_t teacher_stride, int teacher_dtype,
               double student_temperature, Address student_temperatures, double teacher_temperature,
               Address teacher_temperatures, double student_softcap, double teacher_softcap, Address labels,
               Address active, int form, Address values, Address grad_values, Address grad_student,
               int64_t grad_student_stride, bool fresh_gradients) {
  RowProblem problem =
      sides(compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.kind = form;
  problem.divergence = reinterpret_cast<void*>(values);
  problem.grad_divergence = per_row(1, grad_values);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.fresh_gradients = fresh_gradients;
  problem.threads = threads;
  run(chosen().bernoulli, problem);
}

void bind_bernoulli(py::module_& module) { module.def("bernoulli", &bernoulli); }

}  // namespace
}  // namespace kd
