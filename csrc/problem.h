// What the Python side hands to the kernels: addresses, sizes and options, already checked.
#pragma once

#include <cstdint>

namespace kd {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// A row-major [rows, vocab] array. `data` may be null where a gradient is not wanted.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;  // elements from one row to the next
  DType dtype = DType::float32;
};

// One number for every row, or one number per row.
struct PerRow {
  const void* values = nullptr;  // of the compute type, or null
  double value = 0;
};

constexpr int max_sources = 4;

// How the logits of a side are made of those of several sources: see kdkernels/backends/rows.py. Numbers are of the
// compute type.
struct Composition {
  int sources = 1;  // with the side itself, at most max_sources
  Matrix others[max_sources - 1];
  double softcaps[max_sources - 1] = {};
  const void* coefficients = nullptr;  // [rows, sources]; null: ones
  const void* offsets = nullptr;       // [rows, sources]; null: a sum of logits
  const void* class_bias = nullptr;    // [vocab]
  const void* bounds = nullptr;        // [rows, 2]
  int replaced = 0;
  const int64_t* columns = nullptr;  // [rows, replaced]
  const void* values = nullptr;      // [rows, replaced]
};

// A gradient wanted as lists of its large entries, beside a number that every entry gets: in the storage of each row the
// columns, int32, and from the middle of what holds such pairs on, the values, float. See csrc/cpu/gradient_entries.h.
struct EntryLists {
  int32_t* counts = nullptr;    // [rows]: entries of each list, or -1 where the row is dense; null: no lists
  double* summaries = nullptr;  // [rows, 3]: squared norms of the gradient and of the error; the number
};

// The rows of a chunk whose gradient was wanted as lists.
struct EntryChunk {
  int64_t rows = 0;
  int64_t vocab = 0;
  Matrix storage;
  EntryLists lists;
};

// Which entries a list may leave out.
struct EntryRule {
  double tolerance = 0;
  bool stochastic = false;
  uint64_t seed = 0;
  int64_t first_row = 0;  // the number of this problem's first row among all rows
};

// Rows of the `divergence` and `token_statistics` families. Arrays whose element type is not said
// hold the compute type: double if either side is float64, else float.
struct RowProblem {
  int64_t rows = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  Matrix student;
  Matrix teacher;  // data may be null in token_statistics
  PerRow student_temperature;
  PerRow teacher_temperature;
  double student_softcap = 0;  // 0: none
  double teacher_softcap = 0;
  const int64_t* labels = nullptr;  // null: no hard-label term
  const uint8_t* active = nullptr;  // null: every row counts
  const Composition* student_composition = nullptr;
  const Composition* teacher_composition = nullptr;

  int kind = 0;
  double a = 0;
  double b = 0;
  const void* parameters = nullptr;  // [rows], in the place of a; null: a is that of every row
  const int64_t* targets = nullptr;  // [rows], the column that stands apart, -1: none; null: none in any row
  PerRow target_weight;
  PerRow rest_weight;

  void* divergence = nullptr;     // [rows]
  void* cross_entropy = nullptr;  // [rows] if labels
  PerRow grad_divergence;         // what the result gives to each value
  PerRow grad_cross_entropy;
  double* weighted = nullptr;  // [rows]: grad_divergence * divergence + grad_cross_entropy * cross_entropy
  void* total = nullptr;       // their sum, 0-d; null: not wanted
  Matrix grad_student;         // may share the storage of student
  Matrix grad_teacher;         // may share the storage of teacher
  EntryLists student_entries;  // of grad_student
  EntryLists teacher_entries;  // of grad_teacher
  EntryRule entry_rule;
  bool fresh_gradients = false;  // nobody has written them yet: their pages may be missing

  void* statistics = nullptr;  // [rows, statistics_count]; of divergences on a GPU, what one launch leaves to the next
  int64_t* argmax = nullptr;   // [rows, 2]
};

constexpr int statistics_count = 10;

// The products of a sparse gradient of the logits, in rows of entries by ascending column, with what made the logits: see
// csrc/cpu/sparse_products.cpp.
struct SparseProducts {
  int threads = 1;
  int64_t rows = 0;
  int64_t vocab = 0;
  int64_t hidden_size = 0;
  const int64_t* offsets = nullptr;  // [rows + 1]: where each row's entries begin
  const int32_t* columns = nullptr;
  const float* values = nullptr;
  const float* everywhere = nullptr;  // [hidden_size], added to every row of to_weight; null: nothing
  Matrix weight;                      // [vocab, hidden_size]
  const float* hidden = nullptr;      // [rows, hidden_size]
  int64_t hidden_stride = 0;
  float* to_hidden = nullptr;  // [rows, hidden_size], written; null: not wanted
  float* to_weight = nullptr;  // [vocab, hidden_size], added to; null: not wanted
};

// What stands for the vocabulary that a row of a sparse teacher does not name. The numbering is shared with
// kdkernels/backends/sparse_rows.py and triton_kernels/sparse_divergence.py.
enum class Policy : int { bucket = 0, renormalize = 1, uniform = 2, drop = 3, sampled = 4 };

// Rows of the `sparse_divergence` family. The teacher's matrix is not used; its temperature counts from the one that
// its entries were stored at. A packed teacher has records in place of ids, values and constants.
struct SparseProblem : RowProblem {
  Policy policy = Policy::bucket;
  int64_t entries = 0;        // a row, at most
  const void* ids = nullptr;  // [rows, entries]; those outside the vocabulary are no entries
  int64_t id_stride = 0;      // ids from one row to the next
  bool wide_ids = true;       // int64 rather than int32
  Matrix values;              // [rows, entries]: log-probabilities, or weights if sampled
  Matrix constants;           // [rows, 1]: log tail mass, or entropy if sampled; data may be null

  const uint8_t* records = nullptr;
  const int64_t* offsets = nullptr;  // [rows], where a record begins
  const int32_t* counts = nullptr;   // [rows], entries of each row, at most `entries`
  int bits = 0;

  int64_t wrong_row = 0;  // the result: the first row whose record is malformed, or `rows`
};

// Tokens of the `records` family, see math/records.h. Rows are tokens; all arrays are contiguous.
struct RecordProblem {
  int64_t rows = 0;
  int64_t width = 0;  // entries per row of ids and log-probabilities
  int64_t vocab = 0;
  int bits = 0;
  int threads = 1;

  const int32_t* counts = nullptr;   // [rows], entries of each row, at most width and vocab
  const int64_t* offsets = nullptr;  // [rows], where in data a record begins
  uint8_t* data = nullptr;

  // Packing: [rows, width] in any order, id -1 or log-probability -inf: no entry; [rows].
  const int64_t* ids = nullptr;
  const float* log_probs = nullptr;
  const float* log_tail_mass = nullptr;

  // Unpacking: the same, ids ascending.
  int64_t* decoded_ids = nullptr;
  float* decoded_log_probs = nullptr;
  float* decoded_log_tail_mass = nullptr;

  int64_t wrong_row = 0;      // the result: the first row that is malformed, or `rows`
  int32_t* faults = nullptr;  // [rows], in its place on a GPU: whether a row is malformed
};

// Rows of the `topk` family. Arrays whose element type is not said hold the compute type: double if
// the logits are float64, else float.
struct TopKProblem {
  int64_t rows = 0;
  int64_t vocab = 0;  // less than 2^31
  int threads = 1;
  bool compute_double = false;

  Matrix source;
  double temperature = 1;
  double softcap = 0;  // 0: none

  int64_t k = 0;                  // at most vocab
  int64_t* ids = nullptr;         // [rows, k], -1 where there is no entry
  void* log_probs = nullptr;      // [rows, k]
  void* log_tail_mass = nullptr;  // [rows]
};

struct SampleProblem {
  int64_t rows = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  Matrix source;
  double temperature = 1;
  double proposal_temperature = 1;  // of the distribution that is drawn from
  double softcap = 0;

  int64_t draws = 0;
  const double* uniforms = nullptr;  // [rows, draws], in [0, 1)
  int64_t* ids = nullptr;            // [rows, draws], -1 where nothing can be drawn
  void* weights = nullptr;           // [rows, draws]
  void* entropy = nullptr;           // [rows]
};

// Rows of the `pairwise_l1` family whose softmax is to be normalised.
struct PairNormalisers {
  int64_t rows = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  Matrix logits;
  double temperature = 1;
  double softcap = 0;  // 0: none
  void* normalisers =
      nullptr;  // [rows, 2], of the compute type: the largest logit, the sum of exponentials relative to it
};

// One side of the `pairwise_l1` family. Arrays whose element type is not said hold the compute type.
struct PairSide {
  int64_t rows = 0;  // per problem
  Matrix logits;     // [problems * rows, vocab]
  double temperature = 1;
  double softcap = 0;  // 0: none
  const void* normalisers = nullptr;

  Matrix gradient;                // may share the storage of logits; data may be null
  const void* centres = nullptr;  // [problems * rows]: the mean that the gradient takes off
};

// Pairs of rows: their distances, or with `grad` the gradients. Double if either side is float64, else float.
struct PairProblem {
  int64_t problems = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  PairSide student;
  PairSide teacher;

  void* distance = nullptr;     // [problems, student rows, teacher rows]
  void* signed_mass = nullptr;  // the same, of sum x sign(x - y); null: not wanted
  const void* grad = nullptr;   // the same: what the result gives to each distance
};

// Rows of the `sorted_l1` family. Arrays whose element type is not said hold the compute type: double if either side is
// float64, else float.
struct SortedL1Problem {
  int64_t rows = 0;
  int64_t vocab = 0;  // of both sides together, less than 2^31
  int threads = 1;
  bool compute_double = false;

  Matrix student;
  Matrix teacher;
  int64_t student_vocab = 0;
  int64_t teacher_vocab = 0;
  PerRow student_temperature;
  PerRow teacher_temperature;
  double student_softcap = 0;  // 0: none
  double teacher_softcap = 0;
  const uint8_t* active = nullptr;  // null: every row counts

  double error_bound = 0;
  void* values = nullptr;   // [rows]
  void* omitted = nullptr;  // [rows]
  PerRow grad_values;
  Matrix grad_student;  // may share the storage of student
  Matrix grad_teacher;  // may share the storage of teacher
};

// Rows of the `ranking` family. Arrays whose element type is not said hold the compute type: double if either side is
// float64, else float.
struct RankingProblem {
  int64_t rows = 0;
  int64_t vocab = 0;  // less than 2^31
  int threads = 1;
  bool compute_double = false;

  Matrix student;
  double student_softcap = 0;  // 0: none
  Matrix teacher;              // whose falling logits are the order; data may be null
  PerRow teacher_temperature;  // of the weights
  double teacher_softcap = 0;
  const int64_t* labels = nullptr;  // what comes first; null: nothing does
  const uint8_t* active = nullptr;  // null: every row counts

  int64_t ranks = 0;  // vocab with a teacher
  const int64_t* order =
      nullptr;  // [rows, ranks]: ids from the first rank on, -1 past the last one; null: the teacher's
  const void* weights = nullptr;  // [rows, ranks], rows weight_stride apart; null: the teacher's probabilities
  int64_t weight_stride = 0;

  void* values = nullptr;  // [rows]
  PerRow grad_values;
  Matrix grad_student;  // may share the storage of student; data may be null
};

// Rows whose entries above some of them are to be counted.
struct RankProblem {
  int64_t rows = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  Matrix source;
  int64_t count = 0;             // ids per row
  const int64_t* ids = nullptr;  // [rows, count]; -1: none
  int64_t* ranks = nullptr;      // the same: -1 for none, vocab for a logit that is NaN
};

// Problems of the `sinkhorn` family, see kdkernels/backends/transport.py. Arrays are contiguous; those whose element type
// is not said hold the compute type: double or float.
struct SinkhornProblem {
  int64_t batch = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int threads = 1;
  bool compute_double = false;

  const void* cost = nullptr;               // [batch, rows, columns]
  const void* a = nullptr;                  // [batch, rows]
  const void* b = nullptr;                  // [batch, columns]
  const int64_t* row_lengths = nullptr;     // [batch]; null: no padding
  const int64_t* column_lengths = nullptr;  // [batch]
  const double* start = nullptr;            // [batch, columns]; null: zeros

  double epsilon = 1;
  double tolerance = 0;
  double row_reach = 0;  // infinite: balanced
  double column_reach = 0;
  double epsilon_start = 0;
  double epsilon_decay = 0.5;
  int64_t max_iterations = 0;

  // Written by the forward, read by the backward; the histories [batch, max_iterations, ..] may be null.
  double* f = nullptr;  // [batch, rows]
  double* g = nullptr;  // [batch, columns]
  int64_t* iterations = nullptr;
  double* f_history = nullptr;
  double* g_history = nullptr;

  // Written by the forward.
  void* distance = nullptr;
  void* value = nullptr;
  void* error = nullptr;
  int32_t* status = nullptr;
};

// In the order of GRADIENTS there.
enum class TransportGradient : int { envelope = 0, implicit = 1, unrolled = 2 };

struct SinkhornGradientProblem : SinkhornProblem {
  TransportGradient gradient = TransportGradient::envelope;
  double solver_tolerance = 0;

  const void* grad_distance = nullptr;  // [batch]; null: zeros
  const void* grad_value = nullptr;
  const double* grad_f = nullptr;  // [batch, rows]
  const double* grad_g = nullptr;

  void* grad_cost = nullptr;  // like cost; null: not wanted
  void* grad_a = nullptr;
  void* grad_b = nullptr;
};

// One side of the `angle` family: [points, points] both.
struct AngleSide {
  const double* gram = nullptr;
  const double* inverse_distances = nullptr;  // 0 where two points coincide
};

// Sums over triples of points i, j, k: j the corner, one of those listed. See csrc/cpu/angle.cpp.
struct AngleProblem {
  int64_t points = 0;
  int threads = 1;
  AngleSide student;
  AngleSide teacher;
  int64_t corner_count = 0;
  const int64_t* corners = nullptr;

  double* losses = nullptr;    // [points]: sums over j and k
  double* gradient = nullptr;  // [points, points]: to <e_i - e_j, e_k - e_j> of the student, sums over j
  double* sums = nullptr;      // [points, points]: the same for i and j, sums over k; of the corners alone
};

// Rows of the `head_mass` family: the teacher's most probable entries, and how far the student is from it on them. The
// divergence's fields are not used.
struct HeadMassProblem : RowProblem {
  PerRow mass;
  bool crossing = false;       // whether the entry that crosses the mass is of the head
  void* thresholds = nullptr;  // [rows]
  void* gaps = nullptr;        // [rows, 2], of the head and of the tail; null: no student
};

// Rows of the `row_deviation` family. Arrays whose element type is not said hold the compute type: double if the logits are
// float64, else float.
struct DeviationProblem {
  int64_t rows = 0;
  int64_t vocab = 0;
  int threads = 1;
  bool compute_double = false;

  Matrix logits;
  double least = 0;            // that a standard deviation can be
  void* means = nullptr;       // [rows]; written, or with a gradient read
  void* deviations = nullptr;  // [rows], likewise
  Matrix gradient;             // of the logits' dtype, changed in place; data may be null
};

}  // namespace kd
