// The `row_deviation` family: mean and standard deviation of each row of logits, and what a loss that takes the deviation for
// its temperature adds to the gradient. A row is read from memory once and then again from the caches.
#include <cmath>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

template <class Real>
KD_INLINE Real sum_of(const Real* block, int64_t n) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += block[i];
  return sum;
}

template <class Real>
KD_INLINE Real squares_about(const Real* block, int64_t n, Real mean) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += (block[i] - mean) * (block[i] - mean);
  return sum;
}

template <class Real>
KD_INLINE Real product_about(const Real* gradient, const Real* block, int64_t n, Real mean) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += gradient[i] * (block[i] - mean);
  return sum;
}

template <class Real>
KD_INLINE void subtract_about(Real* gradient, const Real* block, int64_t n, Real mean, Real factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gradient[i] -= factor * (block[i] - mean);
}

template <class Real>
struct Block {
  alignas(64) Real entries[block_size];
  const Real* load(const Matrix& matrix, int64_t row, int64_t start, int64_t n) {
    convert_block(entry_address(matrix, row, start), matrix.dtype, n, entries);
    return entries;
  }
};

template <class Real>
void moments_of(const DeviationProblem& problem, int64_t row) {
  Block<Real> block;
  double sum = 0, squares = 0;
  for_blocks(problem.vocab,
             [&](int64_t start, int64_t n) { sum += sum_of(block.load(problem.logits, row, start, n), n); });
  const Real mean = static_cast<Real>(sum / problem.vocab);
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    squares += squares_about(block.load(problem.logits, row, start, n), n, mean);
  });
  const double deviation = std::sqrt(squares / (problem.vocab > 1 ? problem.vocab - 1 : 1));
  static_cast<Real*>(problem.means)[row] = mean;
  static_cast<Real*>(problem.deviations)[row] =
      static_cast<Real>(deviation < problem.least ? problem.least : deviation);
}

template <class Real>
void gradient_of(const DeviationProblem& problem, int64_t row) {
  Block<Real> block, gradient;
  const Real mean = static_cast<const Real*>(problem.means)[row];
  const double deviation = static_cast<const Real*>(problem.deviations)[row];
  double product = 0;
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    product += product_about(gradient.load(problem.gradient, row, start, n), block.load(problem.logits, row, start, n),
                             n, mean);
  });
  const Real factor =
      static_cast<Real>(product / ((problem.vocab > 1 ? problem.vocab - 1 : 1) * deviation * deviation));
  for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
    gradient.load(problem.gradient, row, start, n);
    subtract_about(gradient.entries, block.load(problem.logits, row, start, n), n, mean, factor);
    store_block(gradient.entries, n, entry_address(problem.gradient, row, start), problem.gradient.dtype);
  });
}

template <class Real>
void run(const DeviationProblem& problem) {
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, 1)
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (problem.gradient.data) {
      gradient_of<Real>(problem, row);
    } else {
      moments_of<Real>(problem, row);
    }
  }
}

}  // namespace

bool row_deviation(const DeviationProblem& problem) {
  problem.compute_double ? run<double>(problem) : run<float>(problem);
  return true;
}

}  // namespace kd::KD_ISA
