// The `relation` family on the CPU: per problem, blocks of rows whose scores stay in the second-level cache are made, turned
// into their gradient by the family `divergence`, and multiplied with right and left while they are there.
//
// A thread owns problems, so that the sums over the rows have one order. All three products are the same small one: of up to
// 6 rows of numbers, anyhow strided, with rows of up to 4 vectors, the sums in registers.
#include "cpu/relation.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "math/platform.h"

namespace kd::KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t lanes = 16;
constexpr int most_rows = 6, most_vectors = 4;
#elif defined(__AVX__)
constexpr int64_t lanes = 8;
constexpr int most_rows = 6, most_vectors = 2;
#else
constexpr int64_t lanes = 4;
constexpr int most_rows = 3, most_vectors = 4;
#endif
typedef float Vector __attribute__((vector_size(lanes * 4), aligned(4)));

constexpr int64_t panel = most_vectors * lanes;  // columns of the scores whose right rows are packed together
constexpr int64_t block_bytes = 512 * 1024;      // of the scores of both sides
static_assert(relation_width % lanes == 0);

// Numbers a(i, k), and the rows b(k) they multiply.
struct Factors {
  const float* a;
  int64_t next_row;   // from a(i, k) to a(i + 1, k)
  int64_t next_term;  // from a(i, k) to a(i, k + 1)
  const float* b;
  int64_t b_stride;
};

struct Result {
  float* c;
  int64_t stride;
  float scale;
  bool add;  // to what is there
};

// c(i) = scale sum_k a(i, k) b(k), over `vectors` vectors.
template <int rows, int vectors>
KD_INLINE void small_product(const Factors& factors, int64_t terms, const Result& result) {
  Vector sums[rows][vectors] = {};
  for (int64_t k = 0; k < terms; ++k) {
    const float* a = factors.a + k * factors.next_term;
    const Vector* b = reinterpret_cast<const Vector*>(factors.b + k * factors.b_stride);
    for (int i = 0; i < rows; ++i)
      for (int v = 0; v < vectors; ++v) sums[i][v] += a[i * factors.next_row] * b[v];
  }
  for (int i = 0; i < rows; ++i) {
    Vector* c = reinterpret_cast<Vector*>(result.c + i * result.stride);
    for (int v = 0; v < vectors; ++v) c[v] = result.add ? c[v] + result.scale * sums[i][v] : result.scale * sums[i][v];
  }
}

template <int vectors>
void product_of_rows(int64_t rows, Factors factors, int64_t terms, Result result) {
  for (; rows >= most_rows; rows -= most_rows) {
    small_product<most_rows, vectors>(factors, terms, result);
    factors.a += most_rows * factors.next_row;
    result.c += most_rows * result.stride;
  }
  for (; rows > 0; --rows) {
    small_product<1, vectors>(factors, terms, result);
    factors.a += factors.next_row;
    result.c += result.stride;
  }
}

// The same for any width that is a multiple of `lanes`.
void product(int64_t rows, int64_t width, Factors factors, int64_t terms, Result result) {
  for (; width >= panel; width -= panel, factors.b += panel, result.c += panel)
    product_of_rows<most_vectors>(rows, factors, terms, result);
  for (; width > 0; width -= lanes, factors.b += lanes, result.c += lanes)
    product_of_rows<1>(rows, factors, terms, result);
}

int64_t padded(int64_t columns) { return (columns + panel - 1) / panel * panel; }

// The rows of right as columns, `panel` of them together, zeros behind the last: [columns / panel, width, panel].
void pack(const float* right, int64_t columns, int64_t width, float scale, float* packed) {
  for (int64_t start = 0; start < padded(columns); start += panel, packed += width * panel) {
    const int64_t count = std::min(panel, columns - start);
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t j = 0; j < count; ++j) packed[k * panel + j] = scale * right[(start + j) * width + k];
      for (int64_t j = count; j < panel; ++j) packed[k * panel + j] = 0;
    }
  }
}

struct Workspace {
  explicit Workspace(const RelationProblem& problem) {
    const int64_t stride = padded(problem.columns);
    const int64_t fitting = block_bytes / (2 * 4 * stride) / most_rows * most_rows;
    rows = std::min(problem.rows, std::max<int64_t>(most_rows, std::min<int64_t>(96, fitting)));
    const int64_t scores = rows * stride, student = stride * problem.student.width;
    const int64_t teacher = stride * problem.teacher.width;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, (2 * scores + student + teacher + 16) / 16 * 64)));
    float* next = memory.get();
    for (float** part : {&student_scores, &teacher_scores, &student_packed, &teacher_packed}) {
      *part = next;
      if (next) next += part == &student_packed ? student : scores;
    }
  }

  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::unique_ptr<float, Free> memory;
  int64_t rows = 0;  // of a block
  float *student_scores = nullptr, *teacher_scores = nullptr, *student_packed = nullptr, *teacher_packed = nullptr;
};

// A block of rows of one problem.
struct Block {
  int64_t problem;
  int64_t first;
  int64_t rows;
  int64_t columns;  // those that any of its rows may meet
};

void make_scores(const RelationProblem& problem, const RelationSide& side, const Block& block, const float* packed,
                 float* scores) {
  const int64_t stride = padded(problem.columns);
  const float* left = side.left + (block.problem * problem.rows + block.first) * side.width;
  for (int64_t start = 0; start < block.columns; start += panel)
    product_of_rows<most_vectors>(block.rows, {left, side.width, 1, packed + start * side.width, panel}, side.width,
                                  {scores + start, stride, 1, false});
}

void hide_scores(const RelationProblem& problem, const Block& block, float* scores) {
  constexpr float hidden = -std::numeric_limits<float>::infinity();
  const int64_t columns = problem.columns;
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = scores + i * padded(columns);
    if (problem.column_mask) {
      const uint8_t* mask = problem.column_mask + block.problem * columns;
      for (int64_t j = 0; j < block.columns; ++j) row[j] = mask[j] ? row[j] : hidden;
    }
    if (problem.pair_mask) {
      const int64_t problems_before = problem.shared_pairs ? 0 : block.problem;
      const uint8_t* mask = problem.pair_mask + (problems_before * problem.rows + block.first + i) * columns;
      for (int64_t j = 0; j < block.columns; ++j) row[j] = mask[j] ? row[j] : hidden;
    }
    if (problem.causal)
      for (int64_t j = block.first + i + 1; j < block.columns; ++j) row[j] = hidden;
  }
}

void take_gradient(const RelationProblem& problem, const RelationSide& side, const Block& block, const float* scores) {
  const int64_t stride = padded(problem.columns), width = side.width;
  const int64_t offset = (block.problem * problem.rows + block.first) * width;
  const int64_t right = block.problem * problem.columns * width;
  if (side.to_left)
    product(block.rows, width, {scores, stride, 1, side.right + right, width}, block.columns,
            {side.to_left + offset, width, side.scale, false});
  if (side.to_right)
    product(block.columns, width, {scores, 1, stride, side.left + offset, width}, block.rows,
            {side.to_right + right, width, side.scale, true});
}

const float* numbers_from(const void* values, int64_t row) {
  return values ? static_cast<const float*>(values) + row : nullptr;
}

bool run_block(const RelationProblem& problem, const Block& block, const Workspace& workspace) {
  const bool with_teacher = problem.teacher.left != nullptr;
  const int64_t stride = padded(problem.columns), row = block.problem * problem.rows + block.first;
  make_scores(problem, problem.student, block, workspace.student_packed, workspace.student_scores);
  hide_scores(problem, block, workspace.student_scores);
  if (with_teacher) {
    make_scores(problem, problem.teacher, block, workspace.teacher_packed, workspace.teacher_scores);
    hide_scores(problem, block, workspace.teacher_scores);
  }
  const bool to_student = problem.student.to_left || problem.student.to_right;
  const bool to_teacher = problem.teacher.to_left || problem.teacher.to_right;
  RowProblem values = problem.values;
  values.rows = block.rows;
  values.vocab = block.columns;
  values.threads = 1;
  values.student = {workspace.student_scores, stride, DType::float32};
  values.teacher = {workspace.teacher_scores, with_teacher ? stride : 0, DType::float32};
  if (to_student) values.grad_student = values.student;
  if (to_teacher) values.grad_teacher = values.teacher;
  if (values.labels) values.labels += row;
  if (values.active) values.active += row;
  values.divergence = const_cast<float*>(numbers_from(values.divergence, row));
  values.cross_entropy = const_cast<float*>(numbers_from(values.cross_entropy, row));
  values.grad_divergence.values = numbers_from(values.grad_divergence.values, row);
  values.grad_cross_entropy.values = numbers_from(values.grad_cross_entropy.values, row);
  if (!divergence(values)) return false;
  if (to_student) take_gradient(problem, problem.student, block, workspace.student_scores);
  if (to_teacher) take_gradient(problem, problem.teacher, block, workspace.teacher_scores);
  return true;
}

bool run_problem(const RelationProblem& problem, int64_t place, const Workspace& workspace) {
  for (const auto& [side, packed] :
       {std::pair(&problem.student, workspace.student_packed), std::pair(&problem.teacher, workspace.teacher_packed)}) {
    const int64_t right = place * problem.columns * side->width;
    if (side->right) pack(side->right + right, problem.columns, side->width, side->scale, packed);
    if (side->to_right) std::fill_n(side->to_right + right, problem.columns * side->width, 0.0f);
  }
  if (!problem.teacher.left) std::fill_n(workspace.teacher_scores, padded(problem.columns), 0.0f);
  for (int64_t first = 0; first < problem.rows; first += workspace.rows) {
    const int64_t rows = std::min(workspace.rows, problem.rows - first);
    // A label may lie beyond what a row meets.
    const bool fewer = problem.causal && !problem.values.labels;
    if (!run_block(problem, {place, first, rows, fewer ? first + rows : problem.columns}, workspace)) return false;
  }
  return true;
}

}  // namespace

bool relation(const RelationProblem& problem) {
  std::atomic<bool> done{true};
#pragma omp parallel num_threads(problem.threads)
  {
    const Workspace workspace(problem);
    if (!workspace.memory) done = false;
#pragma omp for schedule(dynamic, 1)
    for (int64_t place = 0; place < problem.problems; ++place)
      if (done && !run_problem(problem, place, workspace)) done = false;
  }
  return done;
}

}  // namespace kd::KD_ISA
