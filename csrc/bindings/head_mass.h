// How Python calls the family `head_mass`.
#pragma once

#include "bindings/divergence.h"
#include "bindings/launching.h"

namespace kd {
namespace {

void head_mass(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student, int64_t student_stride,
               int student_dtype, Address teacher, int64_t teacher_stride, int teacher_dtype,
               double student_temperature, Address student_temperatures, double teacher_temperature,
               Address teacher_temperatures, double student_softcap, double teacher_softcap, Address labels,
               Address active, double mass, Address masses, bool crossing, Address thresholds, Address gaps) {
  HeadMassProblem problem;
  static_cast<RowProblem&>(problem) =
      sides(compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.mass = per_row(mass, masses);
  problem.crossing = crossing;
  problem.thresholds = reinterpret_cast<void*>(thresholds);
  problem.gaps = reinterpret_cast<void*>(gaps);
  problem.threads = threads;
  run(chosen().head_mass, problem);
}

void bind_head_mass(py::module_& module) { module.def("head_mass", &head_mass); }

}  // namespace
}  // namespace kd
