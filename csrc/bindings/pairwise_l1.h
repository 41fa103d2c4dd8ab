// How Python calls the family `pairwise_l1`; see bindings/divergence.h.
#pragma once

#include "bindings/arguments.h"

namespace kd {
namespace {

template <class Place, void (*run)(Place, PairNormalisers&)>
void pairwise_normalisers(Place place, bool compute_double, int64_t rows, int64_t vocab, Address logits, int64_t stride,
                          int dtype, double temperature, double softcap, Address normalisers) {
  PairNormalisers problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.compute_double = compute_double;
  problem.logits = matrix(logits, stride, dtype);
  problem.temperature = temperature;
  problem.softcap = softcap;
  problem.normalisers = reinterpret_cast<void*>(normalisers);
  run(place, problem);
}

PairSide pair_side(int64_t rows, const Matrix& logits, double temperature, double softcap, Address normalisers,
                   const Matrix& gradient, Address centres) {
  return {rows,
          logits,
          temperature,
          softcap,
          reinterpret_cast<const void*>(normalisers),
          gradient,
          reinterpret_cast<const void*>(centres)};
}

// `Parts`: on a GPU the number of the vocabulary's parts, else nothing.
template <class Place, void (*run)(Place, PairProblem&), class... Parts>
void pairwise_l1(Place place, bool compute_double, int64_t problems, int64_t vocab, int64_t student_rows,
                 Address student, int64_t student_stride, int student_dtype, double student_temperature,
                 double student_softcap, Address student_normalisers, Address grad_student, int64_t grad_student_stride,
                 Address student_centres, int64_t teacher_rows, Address teacher, int64_t teacher_stride,
                 int teacher_dtype, double teacher_temperature, double teacher_softcap, Address teacher_normalisers,
                 Address grad_teacher, int64_t grad_teacher_stride, Address teacher_centres, Address distance,
                 Address signed_mass, Address grad, Parts... parts) {
  PairProblem problem;
  problem.problems = problems;
  problem.vocab = vocab;
  problem.compute_double = compute_double;
  problem.student =
      pair_side(student_rows, matrix(student, student_stride, student_dtype), student_temperature, student_softcap,
                student_normalisers, matrix(grad_student, grad_student_stride, student_dtype), student_centres);
  problem.teacher =
      pair_side(teacher_rows, matrix(teacher, teacher_stride, teacher_dtype), teacher_temperature, teacher_softcap,
                teacher_normalisers, matrix(grad_teacher, grad_teacher_stride, teacher_dtype), teacher_centres);
  problem.distance = reinterpret_cast<void*>(distance);
  problem.signed_mass = reinterpret_cast<void*>(signed_mass);
  problem.grad = reinterpret_cast<const void*>(grad);
  if constexpr (sizeof...(Parts) == 1) problem.parts = (parts, ...);
  run(place, problem);
}

}  // namespace
}  // namespace kd
