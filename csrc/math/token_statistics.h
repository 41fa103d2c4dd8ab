// The columns of RowProblem::statistics in the `token_statistics` family, on every device. Python names them in
// kdkernels/backends/rows.py.
#pragma once

#include "problem.h"

namespace kd {

enum StatisticsColumn {
  lse_student,
  lse_teacher,
  forward_kl,
  reverse_kl,
  entropy_student,
  entropy_teacher,
  max_student,
  max_teacher,
  label_student,
  label_teacher,
};
static_assert(label_teacher + 1 == statistics_count);

}  // namespace kd
