// How Python calls the families `divergence` and `token_statistics`: on the CPU and on GPUs, where `run` runs the kernel.
// `Place` says where: a number of threads, or a device and a stream.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/arguments.h"

namespace kd {
namespace {

// From (others, coefficients, offsets, class_bias, bounds, replaced, columns, values) with each other source as (address,
// stride, dtype, softcap); None: the logits are those of the side alone.
std::optional<Composition> composition(const py::object& parts) {
  if (parts.is_none()) return std::nullopt;
  const py::tuple given = parts;
  const auto numbers = [&](size_t index) { return reinterpret_cast<const void*>(given[index].cast<Address>()); };
  Composition found;
  for (const py::handle other : given[0]) {
    if (found.sources >= max_sources) throw py::value_error("too many sources");
    const auto [data, stride, dtype, softcap] = other.cast<std::tuple<Address, int64_t, int, double>>();
    found.softcaps[found.sources - 1] = softcap;
    found.others[found.sources - 1] = matrix(data, stride, dtype);
    ++found.sources;
  }
  found.coefficients = numbers(1);
  found.offsets = numbers(2);
  found.class_bias = numbers(3);
  found.bounds = numbers(4);
  found.replaced = given[5].cast<int>();
  found.columns = static_cast<const int64_t*>(numbers(6));
  found.values = numbers(7);
  return found;
}

const Composition* pointer(const std::optional<Composition>& composition) {
  return composition ? &*composition : nullptr;
}

RowProblem sides(bool compute_double, int64_t rows, int64_t vocab, const Matrix& student, const Matrix& teacher,
                 const PerRow& student_temperature, const PerRow& teacher_temperature, double student_softcap,
                 double teacher_softcap, Address labels, Address active) {
  RowProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
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

template <class Place, void (*run)(Place, RowProblem&)>
void divergence(Place place, bool compute_double, int64_t rows, int64_t vocab, Address student, int64_t student_stride,
                int student_dtype, Address teacher, int64_t teacher_stride, int teacher_dtype,
                double student_temperature, Address student_temperatures, double teacher_temperature,
                Address teacher_temperatures, double student_softcap, double teacher_softcap, Address labels,
                Address active, int kind, double a, double b, Address divergence, Address cross_entropy,
                double grad_divergence, Address grad_divergences, double grad_cross_entropy,
                Address grad_cross_entropies, Address grad_student, int64_t grad_student_stride, Address grad_teacher,
                int64_t grad_teacher_stride, Address total, Address statistics, bool fresh_gradients,
                Address student_counts, Address student_summaries, Address teacher_counts, Address teacher_summaries,
                double tolerance, bool stochastic, uint64_t seed, int64_t first_row, Address parameters,
                Address targets, double target_weight, Address target_weights, double rest_weight, Address rest_weights,
                const py::object& student_composition, const py::object& teacher_composition) {
  RowProblem problem =
      sides(compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  const auto of_student = composition(student_composition), of_teacher = composition(teacher_composition);
  problem.student_composition = pointer(of_student);
  problem.teacher_composition = pointer(of_teacher);
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
  problem.total = reinterpret_cast<void*>(total);
  problem.statistics = reinterpret_cast<void*>(statistics);
  problem.fresh_gradients = fresh_gradients;
  problem.student_entries = entry_lists(student_counts, student_summaries);
  problem.teacher_entries = entry_lists(teacher_counts, teacher_summaries);
  problem.entry_rule = {tolerance, stochastic, seed, first_row};
  run(place, problem);
}

template <class Place, void (*run)(Place, RowProblem&)>
void token_statistics(Place place, bool compute_double, int64_t rows, int64_t vocab, Address student,
                      int64_t student_stride, int student_dtype, Address teacher, int64_t teacher_stride,
                      int teacher_dtype, double student_temperature, Address student_temperatures,
                      double teacher_temperature, Address teacher_temperatures, double student_softcap,
                      double teacher_softcap, Address labels, Address active, Address statistics, Address argmax,
                      const py::object& student_composition, const py::object& teacher_composition) {
  RowProblem problem =
      sides(compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  const auto of_student = composition(student_composition), of_teacher = composition(teacher_composition);
  problem.student_composition = pointer(of_student);
  problem.teacher_composition = pointer(of_teacher);
  problem.statistics = reinterpret_cast<void*>(statistics);
  problem.argmax = reinterpret_cast<int64_t*>(argmax);
  run(place, problem);
}

}  // namespace
}  // namespace kd
