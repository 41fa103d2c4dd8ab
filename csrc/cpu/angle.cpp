// The `angle` family on the CPU: the smooth L1 distance of the cosines that a student's and a teacher's points make, over
// all triples, from the Gram matrices of the points.
//
// With the corner j, <e_i - e_j, e_k - e_j> is G_ik - G_jk + (G_jj - G_ij). A thread owns values of i: it goes through all
// corners, and row i of the gradient stays in the first-level cache. Sums do not depend on who does what.
#include <algorithm>

#include "cpu/kernels.h"
#include "math/platform.h"

namespace kd::KD_ISA {
namespace {

struct Corner {
  const double* ends;     // row i of the Gram matrix
  const double* corner;   // row j
  const double* lengths;  // the inverse distances from j
  double offset;          // G_jj - G_ij
  double length;          // the inverse distance of i from j
};

KD_INLINE Corner corner_of(const AngleSide& side, int64_t points, int64_t i, int64_t j) {
  const double* gram = side.gram;
  return {gram + i * points, gram + j * points, side.inverse_distances + j * points,
          gram[j * points + j] - gram[i * points + j], side.inverse_distances[i * points + j]};
}

struct Sums {
  double loss;
  double to_products;  // of the loss to the products <e_i - e_j, e_k - e_j>, over k
  double to_length;    // of the loss to the cosines, times these
};

// Triples (i, j, .), of which row i of the gradient gets its part.
KD_INLINE Sums add_triples(const Corner& student, const Corner& teacher, int64_t points, double* gradient) {
  double loss = 0, to_products = 0, to_length = 0;
#pragma omp simd reduction(+ : loss, to_products, to_length)
  for (int64_t k = 0; k < points; ++k) {
    const double lengths = student.lengths[k] * student.length;
    const double cosine = (student.ends[k] - student.corner[k] + student.offset) * lengths;
    const double other = (teacher.ends[k] - teacher.corner[k] + teacher.offset) * (teacher.lengths[k] * teacher.length);
    const double difference = cosine - other;
    const double low = difference < -1 ? -1 : difference;
    const double slope = low > 1 ? 1 : low;
    const double to_product = slope * lengths;
    loss += slope * (difference - 0.5 * slope);
    to_products += to_product;
    to_length += slope * cosine;
    gradient[k] += to_product;
  }
  return {loss, to_products, to_length};
}

}  // namespace

bool angle(const AngleProblem& problem) {
  const int64_t points = problem.points;
#pragma omp parallel for schedule(static) num_threads(problem.threads)
  for (int64_t i = 0; i < points; ++i) {
    double* gradient = problem.gradient + i * points;
    std::fill(gradient, gradient + points, 0.0);
    double loss = 0;
    for (int64_t place = 0; place < problem.corner_count; ++place) {
      const int64_t j = problem.corners[place];
      const Corner student = corner_of(problem.student, points, i, j);
      const Sums sums = add_triples(student, corner_of(problem.teacher, points, i, j), points, gradient);
      // Through the distance of i from j, whose square is a product itself: twice half of it, as (i, k) and as (k, i).
      const double through_length = sums.to_length * student.length * student.length;
      gradient[i] -= through_length;
      problem.sums[i * points + j] = sums.to_products - through_length;
      loss += sums.loss;
    }
    problem.losses[i] = loss;
  }
  return true;
}

}  // namespace kd::KD_ISA
