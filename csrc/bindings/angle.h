// How Python calls the family `angle`.
#pragma once

#include "bindings/launching.h"

namespace kd {
namespace {

void angle(int threads, int64_t points, Address student_gram, Address student_inverse_distances, Address teacher_gram,
           Address teacher_inverse_distances, int64_t corner_count, Address corners, Address losses, Address gradient,
           Address sums) {
  const auto numbers = [](Address address) { return reinterpret_cast<const double*>(address); };
  AngleProblem problem;
  problem.points = points;
  // Below this a second thread costs more than it brings.
  problem.threads = points * points * corner_count < 65536 ? 1 : threads;
  problem.student = {numbers(student_gram), numbers(student_inverse_distances)};
  problem.teacher = {numbers(teacher_gram), numbers(teacher_inverse_distances)};
  problem.corner_count = corner_count;
  problem.corners = reinterpret_cast<const int64_t*>(corners);
  problem.losses = reinterpret_cast<double*>(losses);
  problem.gradient = reinterpret_cast<double*>(gradient);
  problem.sums = reinterpret_cast<double*>(sums);
  without_lock([&] { return chosen().angle(problem); });
}

void bind_angle(py::module_& module) { module.def("angle", &angle); }

}  // namespace
}  // namespace kd
