// A row of a gradient on its way to memory: dense, or as a list of its large entries.
#pragma once

#include <initializer_list>

#include "cpu/gradient_entries.h"

namespace kd::KD_ISA {

// A row of a gradient, written block by block. It may share the storage of logits that are still being read. Where
// lists are wanted, the blocks gather in `scratch`, a row of its own, and `finish` lists them.
template <class Real>
class GradientRow {
 public:
  // A large gradient with a place of its own leaves the caches alone.
  GradientRow(const Matrix& matrix, const EntryLists& lists, Real* scratch, const RowProblem& problem, int64_t row)
      : matrix_(matrix),
        lists_(lists),
        scratch_(matrix.data && lists.counts ? scratch : nullptr),
        problem_(problem),
        row_(row),
        shared_(matrix.data == problem.student.data || matrix.data == problem.teacher.data) {
    constexpr int64_t cached_bytes = 4 << 20;
    streams_ = matrix.data && !scratch_ && sizeof(Real) == 4 && matrix.dtype == DType::float32 && !shared_ &&
               problem.rows * problem.vocab * 4 > cached_bytes;
    if (streams_ && problem.fresh_gradients) populate(entry_address(matrix, row, 0), problem.vocab * sizeof(Real));
  }

  bool wanted() const { return matrix_.data; }

  // Whether blocks may be computed where they belong, without a copy through a buffer; `reading`: while their logits
  // are read.
  bool direct(bool reading) const {
    if (scratch_) return true;
    const bool compute_type = matrix_.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64);
    return wanted() && compute_type && !streams_ && !(reading && shared_);
  }

  Real* at(int64_t start) const {
    return scratch_ ? scratch_ + start : reinterpret_cast<Real*>(entry_address(matrix_, row_, start));
  }

  void store(int64_t start, int64_t n, const Real* block) const {
    if (scratch_) {
      std::memcpy(scratch_ + start, block, static_cast<size_t>(n) * sizeof(Real));
      return;
    }
    if constexpr (sizeof(Real) == 4) {
      if (streams_) {
        stream_block(block, n, at(start));
        return;
      }
    }
    store_block(block, n, entry_address(matrix_, row_, start), matrix_.dtype);
  }

  // After the last block, when nothing of the row's logits is read any more. `keep_sum`: no entry's gradient must be 0.
  void finish(bool keep_sum) const {
    if constexpr (sizeof(Real) == 4) {
      if (!scratch_) return;
      char* storage = entry_address(matrix_, row_, 0);
      const int64_t capacity = problem_.vocab * dtype_size(matrix_.dtype) / 8;
      const int64_t count =
          select_entries(problem_.entry_rule, problem_.entry_rule.first_row + row_, scratch_, problem_.vocab, keep_sum,
                         capacity, reinterpret_cast<int32_t*>(storage),
                         reinterpret_cast<float*>(storage + 4 * capacity), lists_.summaries + 3 * row_);
      lists_.counts[row_] = static_cast<int32_t>(count);
      if (count < 0) store_block(scratch_, problem_.vocab, storage, matrix_.dtype);
    }
  }

 private:
  Matrix matrix_;
  EntryLists lists_;
  Real* scratch_;
  const RowProblem& problem_;
  int64_t row_;
  bool shared_, streams_;
};

// A row that does not count.
inline void clear_row(const RowProblem& problem, int64_t row) {
  const int64_t size = problem.compute_double ? 8 : 4;
  if (problem.divergence) std::memset(static_cast<char*>(problem.divergence) + row * size, 0, size);
  if (problem.weighted) problem.weighted[row] = 0;
  if (problem.cross_entropy) std::memset(static_cast<char*>(problem.cross_entropy) + row * size, 0, size);
  for (const EntryLists& lists : {problem.student_entries, problem.teacher_entries}) {
    if (!lists.counts) continue;
    lists.counts[row] = 0;
    for (int i = 0; i < 3; ++i) lists.summaries[3 * row + i] = 0;
  }
  for (const Matrix& gradient : {problem.grad_student, problem.grad_teacher})
    if (gradient.data) std::memset(entry_address(gradient, row, 0), 0, problem.vocab * dtype_size(gradient.dtype));
}

}  // namespace kd::KD_ISA
