// The `token_statistics` family on the CPU: every per-token quantity in one sweep over the row.
#include "math/token_statistics.h"
#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

// The sums of one side besides its normaliser, in log 2 and relative to the origin of the stream.
template <class Real>
struct Side {
  Stream<Real> stream;
  double weighted = 0;  // sum exp(x) x
  double cross = 0;     // sum exp(x) (x - other side)
  int64_t argmax = 0;

  // Takes in the range of the next block; returns the shift of the origin.
  double advance(Range<Real> range, int64_t start, int64_t n, const Real* block) {
    if (range.max > stream.max || start == 0) {
      int64_t i = 0;
      while (i < n - 1 && block[i] != range.max) ++i;
      argmax = start + i;
    }
    const double old_sum = stream.sum;
    const double shift = stream.raise(range);
    if (shift != 0) weighted = (weighted + old_sum * shift) * std::exp2(shift);
    return shift;
  }

  double entropy() const { return stream.log_sum() - weighted / stream.sum * Stream<Real>::log_2; }
  double divergence() const { return cross / stream.sum * Stream<Real>::log_2; }
};

template <class Real>
void run_row(const RowProblem& problem, int64_t row) {
  Real* out = static_cast<Real*>(problem.statistics) + row * statistics_count;
  int64_t* argmax = problem.argmax + row * 2;
  if (problem.active && !problem.active[row]) {
    for (int i = 0; i < statistics_count; ++i) out[i] = 0;
    argmax[0] = argmax[1] = 0;
    return;
  }
  const bool pair = problem.teacher.data;
  Side<Real> student{{problem.student, row, problem.student_softcap, per_row<Real>(problem.student_temperature, row),
                      problem.student_composition}};
  Side<Real> teacher{{problem.teacher, row, problem.teacher_softcap, per_row<Real>(problem.teacher_temperature, row),
                      problem.teacher_composition}};
  alignas(64) Real student_buffer[block_size], teacher_buffer[block_size];
  alignas(64) Real student_exp[block_size], teacher_exp[block_size];
  for (int64_t start = 0; start < problem.vocab; start += block_size) {
    const int64_t n = problem.vocab - start < block_size ? problem.vocab - start : block_size;
    Range<Real> range;
    const Real* s = student.stream.load(start, n, student_buffer, range);
    const double old_student_sum = student.stream.sum, old_teacher_sum = teacher.stream.sum;
    const double student_shift = student.advance(range, start, n, s);
    const Tempering<Real> temper_s = student.stream.tempering;
    student.stream.exponentiate(s, start, n, problem.vocab, student_exp);
    Real student_weighted = 0;
    if (!pair) {
#pragma omp simd reduction(+ : student_weighted)
      for (int64_t i = 0; i < n; ++i) student_weighted += student_exp[i] * temper_s(s[i]);
    } else {
      const Real* t = teacher.stream.load(start, n, teacher_buffer, range);
      const double teacher_shift = teacher.advance(range, start, n, t);
      if (student_shift != 0 || teacher_shift != 0) {
        student.cross = (student.cross + old_student_sum * (student_shift - teacher_shift)) * std::exp2(student_shift);
        teacher.cross = (teacher.cross + old_teacher_sum * (teacher_shift - student_shift)) * std::exp2(teacher_shift);
      }
      const Tempering<Real> temper_t = teacher.stream.tempering;
      teacher.stream.exponentiate(t, start, n, problem.vocab, teacher_exp);
      Real teacher_weighted = 0, student_cross = 0, teacher_cross = 0;
#pragma omp simd reduction(+ : student_weighted, teacher_weighted, student_cross, teacher_cross)
      for (int64_t i = 0; i < n; ++i) {
        const Real x = temper_s(s[i]);
        const Real y = temper_t(t[i]);
        student_weighted += student_exp[i] * x;
        teacher_weighted += teacher_exp[i] * y;
        student_cross += student_exp[i] * (x - y);
        teacher_cross += teacher_exp[i] * (y - x);
      }
      teacher.weighted += teacher_weighted;
      student.cross += student_cross;
      teacher.cross += teacher_cross;
    }
    student.weighted += student_weighted;
  }
  const double nan = std::nan("");
  const int64_t label = problem.labels ? problem.labels[row] : 0;
  const double log_ratio = pair ? teacher.stream.log_sum() - student.stream.log_sum() : nan;
  out[lse_student] = static_cast<Real>(student.stream.log_normaliser());
  out[lse_teacher] = static_cast<Real>(pair ? teacher.stream.log_normaliser() : nan);
  out[forward_kl] = static_cast<Real>(pair ? teacher.divergence() - log_ratio : nan);
  out[reverse_kl] = static_cast<Real>(pair ? student.divergence() + log_ratio : nan);
  out[entropy_student] = static_cast<Real>(student.entropy());
  out[entropy_teacher] = static_cast<Real>(pair ? teacher.entropy() : nan);
  out[max_student] = student.stream.max;
  out[max_teacher] = pair ? teacher.stream.max : static_cast<Real>(nan);
  out[label_student] =
      static_cast<Real>(problem.labels ? student.stream.log_probability(student.stream.logit(label)) : nan);
  out[label_teacher] =
      static_cast<Real>(problem.labels && pair ? teacher.stream.log_probability(teacher.stream.logit(label)) : nan);
  argmax[0] = student.argmax;
  argmax[1] = teacher.argmax;
}

template <class Real>
void run(const RowProblem& problem) {
  const int64_t group = problem.vocab >= 16384 ? 1 : 16384 / problem.vocab + 1;
#pragma omp parallel for num_threads(problem.threads) if (problem.threads > 1) schedule(dynamic, group)
  for (int64_t row = 0; row < problem.rows; ++row) run_row<Real>(problem, row);
}

}  // namespace

bool token_statistics(const RowProblem& problem) {
  if (problem.compute_double) {
    run<double>(problem);
  } else {
    run<float>(problem);
  }
  return true;
}

}  // namespace kd::KD_ISA
