// How Python calls the family `relation`.
#pragma once

#include <algorithm>

#include "bindings/launching.h"
#include "cpu/relation.h"

namespace kd {
namespace {

RelationSide relation_side(Address left, Address right, int64_t width, double scale, Address to_left,
                           Address to_right) {
  const auto numbers = [](Address address) { return reinterpret_cast<float*>(address); };
  return {numbers(left), numbers(right), width, static_cast<float>(scale), numbers(to_left), numbers(to_right)};
}

void relation(int threads, int64_t problems, int64_t rows, int64_t columns, const py::tuple& student,
              const py::tuple& teacher, Address column_mask, Address pair_mask, bool shared_pairs, bool causal,
              int kind, double a, double b, Address labels, Address active, Address divergence, Address cross_entropy,
              Address grad_divergence, Address grad_cross_entropy) {
  const auto side = [](const py::tuple& given) {
    return relation_side(given[0].cast<Address>(), given[1].cast<Address>(), given[2].cast<int64_t>(),
                         given[3].cast<double>(), given[4].cast<Address>(), given[5].cast<Address>());
  };
  RelationProblem problem;
  problem.problems = problems;
  problem.rows = rows;
  problem.columns = columns;
  problem.threads = static_cast<int>(std::min<int64_t>(threads, problems));
  problem.student = side(student);
  problem.teacher = side(teacher);
  problem.column_mask = reinterpret_cast<const uint8_t*>(column_mask);
  problem.pair_mask = reinterpret_cast<const uint8_t*>(pair_mask);
  problem.shared_pairs = shared_pairs;
  problem.causal = causal;
  RowProblem& values = problem.values;
  values.rows = problems * rows;
  values.vocab = columns;
  values.kind = kind;
  values.a = a;
  values.b = b;
  values.student_temperature = per_row(1, 0);
  values.teacher_temperature = per_row(1, 0);
  values.labels = reinterpret_cast<const int64_t*>(labels);
  values.active = reinterpret_cast<const uint8_t*>(active);
  values.divergence = reinterpret_cast<void*>(divergence);
  values.cross_entropy = reinterpret_cast<void*>(cross_entropy);
  values.grad_divergence = per_row(0, grad_divergence);
  values.grad_cross_entropy = per_row(0, grad_cross_entropy);
  check_labels(values, values.labels, 0);
  without_lock([&] { return chosen().relation(problem); });
}

void bind_relation(py::module_& module) { module.def("relation", &relation); }

}  // namespace
}  // namespace kd
