// What the Python side hands to the family `relation`: see kdkernels/backends/cpu/relation.py.
#pragma once

#include "cpu/kernels.h"

namespace kd {

// One side: contiguous, widths multiples of `relation_width`.
struct RelationSide {
  const float* left = nullptr;   // [problems, rows, width]
  const float* right = nullptr;  // [problems, columns, width]
  int64_t width = 0;
  float scale = 1;
  float* to_left = nullptr;  // the gradients; null: not wanted
  float* to_right = nullptr;
};

constexpr int64_t relation_width = 16;

// Relations of which the values and, where wanted, the gradients are made in one go. `values` says how a row of scores
// becomes a value and a gradient: its arrays have one entry for each of the problems * rows rows.
struct RelationProblem {
  int64_t problems = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int threads = 1;
  RelationSide student;
  RelationSide teacher;
  const uint8_t* column_mask = nullptr;  // [problems, columns]; null: all
  const uint8_t* pair_mask = nullptr;    // [problems, rows, columns], or [rows, columns] if shared; null: all
  bool shared_pairs = false;
  bool causal = false;
  RowProblem values;
};

namespace baseline {
bool relation(const RelationProblem& problem);
}
namespace avx2 {
bool relation(const RelationProblem& problem);
}
namespace avx512 {
bool relation(const RelationProblem& problem);
}

}  // namespace kd
