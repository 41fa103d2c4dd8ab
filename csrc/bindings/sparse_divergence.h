// How Python calls the family `sparse_divergence`; see bindings/divergence.h.
#pragma once

#include "bindings/divergence.h"

namespace kd {
namespace {

// The first row that is malformed, or the number of rows.
template <class Place, void (*run)(Place, SparseProblem&)>
int64_t sparse_divergence(Place place, bool compute_double, int64_t rows, int64_t vocab, Address student,
                          int64_t student_stride, int student_dtype, double student_temperature,
                          Address student_temperatures, double teacher_temperature, Address teacher_temperatures,
                          double student_softcap, Address labels, Address active, int kind, double a, double b,
                          int policy, int64_t entries, Address ids, int64_t id_stride, bool wide_ids, Address values,
                          int64_t value_stride, int value_dtype, Address constants, int constant_dtype, Address records,
                          Address offsets, Address counts, int64_t largest_count, int bits, Address divergence,
                          Address cross_entropy, Address grad_divergence, Address grad_cross_entropy,
                          Address grad_student, int64_t grad_student_stride, Address student_counts,
                          Address student_summaries, double tolerance, bool stochastic, uint64_t seed,
                          int64_t first_row, Address parameters, Address statistics) {
  SparseProblem problem;
  static_cast<RowProblem&>(problem) =
      sides(compute_double, rows, vocab, matrix(student, student_stride, student_dtype), Matrix(),
            per_row(student_temperature, student_temperatures), per_row(teacher_temperature, teacher_temperatures),
            student_softcap, 0, labels, active);
  problem.kind = kind;
  problem.a = a;
  problem.b = b;
  problem.parameters = reinterpret_cast<const void*>(parameters);
  problem.policy = static_cast<Policy>(policy);
  problem.entries = entries;
  problem.ids = reinterpret_cast<const void*>(ids);
  problem.id_stride = id_stride;
  problem.wide_ids = wide_ids;
  problem.values = matrix(values, value_stride, value_dtype);
  problem.constants = matrix(constants, 1, constant_dtype);
  problem.records = reinterpret_cast<const uint8_t*>(records);
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.counts = reinterpret_cast<const int32_t*>(counts);
  problem.bits = bits;
  if (records) problem.entries = largest_count;
  problem.divergence = reinterpret_cast<void*>(divergence);
  problem.cross_entropy = reinterpret_cast<void*>(cross_entropy);
  problem.grad_divergence = per_row(0, grad_divergence);
  problem.grad_cross_entropy = per_row(0, grad_cross_entropy);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.fresh_gradients = true;
  problem.statistics = reinterpret_cast<void*>(statistics);
  problem.student_entries = entry_lists(student_counts, student_summaries);
  problem.entry_rule = {tolerance, stochastic, seed, first_row};
  run(place, problem);
  return problem.wrong_row;
}

}  // namespace
}  // namespace kd
