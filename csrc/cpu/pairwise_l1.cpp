// The `pairwise_l1` family on the CPU: sums over the vocabulary of |x - y| for every softmax row x of one side and y of
// the other, and their gradient.
//
// The vocabulary is cut into tiles that stay in the second-level cache. The probabilities of a tile are made once for all
// rows, then every pair of rows is summed, in blocks of rows that stay in registers.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "cpu/row_blocks.h"

namespace kd::KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t vector_bytes = 64;
#elif defined(__AVX__)
constexpr int64_t vector_bytes = 32;
#else
constexpr int64_t vector_bytes = 16;
#endif

template <class Real>
struct Lanes {
  typedef Real type __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t count = vector_bytes / sizeof(Real);
};
template <class Real>
using Vector = typename Lanes<Real>::type;

template <class Real>
KD_INLINE Vector<Real> load_vector(const Real* source) {
  Vector<Real> vector;
  std::memcpy(&vector, source, sizeof vector);
  return vector;
}

// -1, 0 or 1; of NaN it is NaN where the instruction set makes that free, else 0.
#if defined(__AVX512F__)
constexpr int32_t sign_table = static_cast<int32_t>(0xA9A9A822u);  // what each class of numbers becomes
KD_INLINE Vector<float> sign_of(Vector<float> x) {
  return _mm512_fixupimm_ps(_mm512_setzero_ps(), x, _mm512_set1_epi32(sign_table), 0);
}
KD_INLINE Vector<double> sign_of(Vector<double> x) {
  return _mm512_fixupimm_pd(_mm512_setzero_pd(), x, _mm512_set1_epi64(sign_table), 0);
}
KD_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return _mm512_fmadd_ps(x, y, z);
}
KD_INLINE Vector<double> multiply_add(Vector<double> x, Vector<double> y, Vector<double> z) {
  return _mm512_fmadd_pd(x, y, z);
}
#else
template <class V>
KD_INLINE V sign_of(V x) {
  const auto positive = x > V{}, negative = x < V{};
  const V one = V{} + 1;
  const auto bits =
      (positive & reinterpret_cast<decltype(positive)>(one)) | (negative & reinterpret_cast<decltype(positive)>(-one));
  return reinterpret_cast<V>(bits);
}
#if defined(__FMA__)
KD_INLINE Vector<float> multiply_add(Vector<float> x, Vector<float> y, Vector<float> z) {
  return _mm256_fmadd_ps(x, y, z);
}
KD_INLINE Vector<double> multiply_add(Vector<double> x, Vector<double> y, Vector<double> z) {
  return _mm256_fmadd_pd(x, y, z);
}
#else
template <class V>
KD_INLINE V multiply_add(V x, V y, V z) {
  return x * y + z;
}
#endif
#endif

template <class V>
KD_INLINE V magnitude(V x) {
  using Bits = decltype(x > x);
  return reinterpret_cast<V>(reinterpret_cast<Bits>(x) & ~reinterpret_cast<Bits>(-V{}));
}

template <class Real>
KD_INLINE Vector<Real> broadcast(Real number) {
  return number - Vector<Real>{};  // not a sum, which would turn -0 into 0 and take an instruction
}

template <class Real>
KD_INLINE double sum_of(Vector<Real> x) {
  alignas(64) Real parts[Lanes<Real>::count];
  std::memcpy(parts, &x, sizeof x);
  double sum = 0;
  for (Real part : parts) sum += static_cast<double>(part);
  return sum;
}

// While it lives, subnormal numbers count as 0 in this thread: arithmetic on them takes a hundred times longer, and
// probabilities that small have no weight.
class NoSubnormals {
#if defined(__SSE__)
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  NoSubnormals() {}
#endif
};

// Rows of a tile are this far apart; the odd vector keeps them off each other's places in the cache.
template <class Real>
constexpr int64_t padded(int64_t width) {
  return width + Lanes<Real>::count;
}

// Vectors that the gradient's blocks are wide.
constexpr int64_t strip = 2;

template <class Real>
constexpr int64_t rounded_up(int64_t width) {
  constexpr int64_t step = strip * Lanes<Real>::count;
  return (width + step - 1) / step * step;
}

// A tile is as wide as fits the second-level cache beside its neighbour's data, and no wider than a lane can sum: beside a
// probability near 1 every small one that is added costs a rounding, so the lanes go to doubles after each tile.
template <class Real>
int64_t tile_width(int64_t rows) {
  constexpr int64_t bytes = 1 << 20, step = 64, most = 64 * Lanes<Real>::count;
  const int64_t fitting = bytes / (rows * static_cast<int64_t>(sizeof(Real))) / step * step;
  return std::min(most, std::max(step, fitting));
}

// out = exp((block - max) / temperature). The largest logit is subtracted first, so that its own
// exponential is exactly 1, and a softmax of one entry too. `relative` is a buffer.
template <class Real>
void exponentials(const Real* __restrict block, int64_t n, Real max, Real scale, Real* __restrict relative, Real* out,
                  const char* upcoming, int64_t upcoming_bytes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) relative[i] = block[i] - max;
  exp2_block(relative, n, Tempering<Real>{scale, 0}, out, upcoming, upcoming_bytes);
}

template <class Real>
Stream<Real> stream_of(const PairSide& side, int64_t row) {
  return Stream<Real>(side.logits, row, side.softcap, side.temperature);
}

// The probabilities of columns [column, column + n) of rows [first, first + count), padded with zeros; `masked`, if
// given, tells of each row whether some logit there counts as the floor. `buffer` has two rows of the tile.
template <class Real>
void make_probabilities(const PairSide& side, int64_t first, int64_t count, int64_t column, int64_t n, int64_t distance,
                        Real* tile, Real* buffer, uint8_t* masked) {
  Real* relative = buffer + distance;
  const Real* normalisers = static_cast<const Real*>(side.normalisers);
  const int64_t width = rounded_up<Real>(n);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    Real* __restrict out = tile + i * distance;
    const Stream<Real> stream = stream_of<Real>(side, row);
    Range<Real> range;
    const Real* block = stream.load(column, n, buffer, range);
    if (masked) masked[i] = range.min <= static_cast<Real>(logit_floor);
    // The next row's logits are on their way meanwhile.
    const bool more = i + 1 < count;
    exponentials(block, n, normalisers[2 * row], stream.tempering.scale, relative, out,
                 more ? entry_address(side.logits, row + 1, column) : nullptr,
                 more ? n * dtype_size(side.logits.dtype) : 0);
    const Real factor = 1 / normalisers[2 * row + 1];
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) out[v] *= factor;
    std::memset(out + n, 0, static_cast<size_t>(width - n) * sizeof(Real));
  }
}

// --- distances ------------------------------------------------------------------------------------------------------

// Rows and columns of a block of pairs in registers.
template <bool signs>
struct BlockShape {
#if defined(__AVX512F__)
  static constexpr int rows = 4, columns = signs ? 2 : 4;
#else
  static constexpr int rows = signs ? 2 : 4, columns = 2;
#endif
};

// Adds the sums over a tile of |x - y|, and of x sign(x - y) if asked for, of the pairs in a block.
template <class Real, bool signs, int rows, int columns>
inline void add_block(const Real* const (&x)[rows], const Real* const (&y)[columns], int64_t width, int64_t stride,
                      int64_t row_count, int64_t column_count, double* distance, double* mass) {
  Vector<Real> sums[rows][columns] = {}, masses[signs ? rows : 1][columns] = {};
  for (int64_t v = 0; v < width; v += Lanes<Real>::count) {
    Vector<Real> xs[rows];
    for (int r = 0; r < rows; ++r) xs[r] = load_vector(x[r] + v);
    for (int c = 0; c < columns; ++c) {
      const Vector<Real> ys = load_vector(y[c] + v);
      for (int r = 0; r < rows; ++r) {
        const Vector<Real> difference = xs[r] - ys;
        if constexpr (signs) {
          const Vector<Real> sign = sign_of(difference);
          sums[r][c] = multiply_add(difference, sign, sums[r][c]);
          masses[r][c] = multiply_add(xs[r], sign, masses[r][c]);
        } else {
          sums[r][c] += magnitude(difference);
        }
      }
    }
  }
  for (int r = 0; r < rows && r < row_count; ++r) {
    for (int c = 0; c < columns && c < column_count; ++c) {
      distance[r * stride + c] += static_cast<double>(sum_of<Real>(sums[r][c]));
      if constexpr (signs) mass[r * stride + c] += static_cast<double>(sum_of<Real>(masses[r][c]));
    }
  }
}

template <class Real, bool signs>
void add_tile(const Real* x, int64_t x_count, const Real* y, int64_t y_count, int64_t apart, int64_t width,
              double* distance, double* mass) {
  constexpr int rows = BlockShape<signs>::rows, columns = BlockShape<signs>::columns;
  for (int64_t i = 0; i < x_count; i += rows) {
    // Past the last row a block repeats it.
    const Real* xs[rows];
    for (int r = 0; r < rows; ++r) xs[r] = x + std::min(i + r, x_count - 1) * apart;
    for (int64_t j = 0; j < y_count; j += columns) {
      const Real* ys[columns];
      for (int c = 0; c < columns; ++c) ys[c] = y + std::min(j + c, y_count - 1) * apart;
      const int64_t place = i * y_count + j;
      add_block<Real, signs, rows, columns>(xs, ys, width, y_count, x_count - i, y_count - j, distance + place,
                                            mass + place);
    }
  }
}

// The pairs of up to `most_rows` rows of either side over a slice of the vocabulary are one task. How many slices there
// are depends on the sizes alone, so that the sums do not depend on the threads.
constexpr int64_t most_rows = 128;
constexpr int64_t enough_tasks = 32;

template <class Real>
struct Distances {
  const PairProblem& problem;
  int64_t n, m, blocks_x, blocks_y, units, width, tiles, slices;
  std::unique_ptr<double[]> partial;  // [units, slices, 2, most_x, most_y]
  int64_t most_x, most_y;

  explicit Distances(const PairProblem& problem) : problem(problem), n(problem.student.rows), m(problem.teacher.rows) {
    most_x = std::min(n, most_rows);
    most_y = std::min(m, most_rows);
    blocks_x = (n + most_rows - 1) / most_rows;
    blocks_y = (m + most_rows - 1) / most_rows;
    units = problem.problems * blocks_x * blocks_y;
    width = tile_width<Real>(most_x + most_y);
    tiles = (problem.vocab + width - 1) / width;
    slices = std::min(tiles, std::max<int64_t>(1, enough_tasks / units));
  }

  int64_t pairs() const { return most_x * most_y; }

  // Sums of a slice for the pairs of a unit: distances, then signed masses, in `sums`.
  template <bool signs>
  void add_slice(int64_t unit, int64_t slice, double* sums, Real* scratch) const {
    const int64_t b = unit / (blocks_x * blocks_y), i = unit / blocks_y % blocks_x * most_rows,
                  j = unit % blocks_y * most_rows;
    const int64_t x_count = std::min(most_rows, n - i), y_count = std::min(most_rows, m - j);
    const int64_t apart = padded<Real>(width);
    Real *x = scratch, *y = x + most_x * apart, *buffer = y + most_y * apart;
    std::memset(sums, 0, static_cast<size_t>(2 * pairs()) * sizeof(double));
    for (int64_t tile = tiles * slice / slices; tile < tiles * (slice + 1) / slices; ++tile) {
      const int64_t column = tile * width, count = std::min(width, problem.vocab - column);
      make_probabilities(problem.student, b * n + i, x_count, column, count, apart, x, buffer, nullptr);
      make_probabilities(problem.teacher, b * m + j, y_count, column, count, apart, y, buffer, nullptr);
      add_tile<Real, signs>(x, x_count, y, y_count, apart, rounded_up<Real>(count), sums, sums + pairs());
    }
  }

  void store(int64_t unit, const double* sums) const {
    const int64_t b = unit / (blocks_x * blocks_y), i = unit / blocks_y % blocks_x * most_rows,
                  j = unit % blocks_y * most_rows;
    const int64_t x_count = std::min(most_rows, n - i), y_count = std::min(most_rows, m - j);
    void* const results[] = {problem.distance, problem.signed_mass};
    for (int which = 0; which < 2; ++which) {
      if (!results[which]) continue;
      for (int64_t r = 0; r < x_count; ++r) {
        Real* row = static_cast<Real*>(results[which]) + (b * n + i + r) * m + j;
        const double* from = sums + which * pairs() + r * y_count;
        for (int64_t c = 0; c < y_count; ++c) row[c] = static_cast<Real>(from[c]);
      }
    }
  }

  bool run() {
    if (slices > 1) {
      partial.reset(new (std::nothrow) double[static_cast<size_t>(units * slices * 2 * pairs())]);
      if (!partial) return false;
    }
    const int64_t apart = padded<Real>(width);
    const int64_t sums_bytes = (2 * pairs() * static_cast<int64_t>(sizeof(double)) + 63) / 64 * 64;
    const int64_t bytes = sums_bytes + (most_x + most_y + 2) * apart * static_cast<int64_t>(sizeof(Real));
    bool done = true;
#pragma omp parallel num_threads(problem.threads) reduction(&& : done)
    {
      const NoSubnormals guard;
      char* memory = static_cast<char*>(thread_scratch(bytes));
      done = memory != nullptr;
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < units * slices; ++task) {
        if (!memory) continue;
        const int64_t unit = task / slices, slice = task % slices;
        double* sums = partial ? partial.get() + task * 2 * pairs() : reinterpret_cast<double*>(memory);
        Real* scratch = reinterpret_cast<Real*>(memory + sums_bytes);
        if (problem.signed_mass) {
          add_slice<true>(unit, slice, sums, scratch);
        } else {
          add_slice<false>(unit, slice, sums, scratch);
        }
        if (!partial) store(unit, sums);
      }
      if (partial) {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; ++unit) {
          double* sums = partial.get() + unit * slices * 2 * pairs();
          for (int64_t slice = 1; slice < slices; ++slice) {
            const double* more = sums + slice * 2 * pairs();
            for (int64_t k = 0; k < 2 * pairs(); ++k) sums[k] += more[k];
          }
          store(unit, sums);
        }
      }
    }
    return done;
  }
};

// --- gradients ------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int gradient_rows = 4;
#else
constexpr int gradient_rows = 2;
#endif

// out_r = sum_j weights[j, r] sign(x_r - y_j), for `gradient_rows` rows and a strip of columns.
template <class Real>
inline void signed_sums(const Real* const (&x)[gradient_rows], const Real* y, int64_t count, int64_t apart,
                        const Real* weights, Real* const (&out)[gradient_rows]) {
  constexpr int64_t lanes = Lanes<Real>::count;
  Vector<Real> xs[gradient_rows][strip], sums[gradient_rows][strip] = {};
  for (int r = 0; r < gradient_rows; ++r)
    for (int s = 0; s < strip; ++s) xs[r][s] = load_vector(x[r] + s * lanes);
  for (int64_t j = 0; j < count; ++j) {
    const Real *row = y + j * apart, *factor = weights + j * gradient_rows;
    for (int s = 0; s < strip; ++s) {
      const Vector<Real> ys = load_vector(row + s * lanes);
      for (int r = 0; r < gradient_rows; ++r)
        sums[r][s] = multiply_add(sign_of(xs[r][s] - ys), broadcast(factor[r]), sums[r][s]);
    }
  }
  for (int r = 0; r < gradient_rows; ++r)
    for (int s = 0; s < strip; ++s) std::memcpy(out[r] + s * lanes, &sums[r][s], sizeof sums[r][s]);
}

template <class Real>
struct Gradients {
  const PairProblem& problem;
  int64_t n, m, width, tiles, apart;
  std::unique_ptr<Real[]> student_weights,
      teacher_weights;  // [problems, blocks, rows of the other side, gradient_rows]

  explicit Gradients(const PairProblem& problem) : problem(problem), n(problem.student.rows), m(problem.teacher.rows) {
    width = tile_width<Real>(n + m + std::max(n, m));
    tiles = (problem.vocab + width - 1) / width;
    apart = padded<Real>(width);
  }

  static int64_t blocks(int64_t rows) { return (rows + gradient_rows - 1) / gradient_rows; }

  // The upstream gradient in the order in which signed_sums reads it; a block past the last row repeats it.
  Real* pack(int64_t rows, int64_t others, int64_t row_step, int64_t other_step) const {
    const int64_t size = blocks(rows) * others * gradient_rows;
    Real* packed = new (std::nothrow) Real[static_cast<size_t>(problem.problems * size)];
    if (!packed) return nullptr;
    const Real* grad = static_cast<const Real*>(problem.grad);
    for (int64_t b = 0; b < problem.problems; ++b)
      for (int64_t k = 0; k < size; ++k) {
        const int64_t r = std::min(k / (others * gradient_rows) * gradient_rows + k % gradient_rows, rows - 1);
        packed[b * size + k] = grad[b * n * m + r * row_step + k / gradient_rows % others * other_step];
      }
    return packed;
  }

  void side_gradient(const PairSide& side, int64_t b, const Real* x, const Real* y, int64_t others, const Real* weights,
                     const uint8_t* masked, int64_t column, int64_t count, Real* sums, Real* buffer) const {
    const int64_t rows = side.rows;
    constexpr int64_t step = strip * Lanes<Real>::count;
    weights += b * blocks(rows) * others * gradient_rows;
    for (int64_t v = 0; v < count; v += step) {
      for (int64_t i = 0; i < rows; i += gradient_rows) {
        const Real* xs[gradient_rows];
        Real* out[gradient_rows];
        for (int r = 0; r < gradient_rows; ++r) {
          const int64_t row = std::min(i + r, rows - 1);
          xs[r] = x + row * apart + v;
          out[r] = sums + row * apart + v;
        }
        signed_sums<Real>(xs, y + v, others, apart, weights + i * others, out);
      }
    }
    const Real inverse = static_cast<Real>(1 / side.temperature);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = b * rows + i;
      const Real centre = static_cast<const Real*>(side.centres)[row];
      Real* __restrict gradient = sums + i * apart;
      const Real* __restrict probability = x + i * apart;
#pragma omp simd
      for (int64_t v = 0; v < count; ++v) gradient[v] = probability[v] * (gradient[v] - centre) * inverse;
      if (masked[i] || side.softcap != 0) {
        Stream<Real> stream = stream_of<Real>(side, row);
        const Real* block = stream.load(column, count, buffer);
        stream.masked = masked[i];
        through_clamp_and_softcap(stream, count, block, gradient);
      }
      store_block(gradient, count, entry_address(side.gradient, row, column), side.gradient.dtype);
    }
  }

  // A large gradient with a place of its own is new memory: its pages come at once, by all threads of the team, and not
  // one by one as tiles are written.
  void populate_gradient(const PairSide& side) const {
    const int64_t rows = problem.problems * side.rows, bytes = problem.vocab * dtype_size(side.gradient.dtype);
    if (!side.gradient.data || side.gradient.data == side.logits.data || rows * bytes < (4 << 20)) return;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; ++row) populate(entry_address(side.gradient, row, 0), bytes);
  }

  bool run() {
    const bool to_student = problem.student.gradient.data, to_teacher = problem.teacher.gradient.data;
    if (to_student) student_weights.reset(pack(n, m, m, 1));
    if (to_teacher) teacher_weights.reset(pack(m, n, 1, m));
    if ((to_student && !student_weights) || (to_teacher && !teacher_weights)) return false;
    const int64_t flag_bytes = (n + m + 63) / 64 * 64;
    const int64_t bytes = flag_bytes + (n + m + std::max(n, m) + 2) * apart * static_cast<int64_t>(sizeof(Real));
    bool done = true;
#pragma omp parallel num_threads(problem.threads) reduction(&& : done)
    {
      const NoSubnormals guard;
      char* memory = static_cast<char*>(thread_scratch(bytes));
      done = memory != nullptr;
      populate_gradient(problem.student);
      populate_gradient(problem.teacher);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < problem.problems * tiles; ++task) {
        if (!memory) continue;
        const int64_t b = task / tiles, column = task % tiles * width, count = std::min(width, problem.vocab - column);
        uint8_t* masked = reinterpret_cast<uint8_t*>(memory);
        Real* x = reinterpret_cast<Real*>(memory + flag_bytes);
        Real *y = x + n * apart, *sums = y + m * apart, *buffer = sums + std::max(n, m) * apart;
        make_probabilities(problem.student, b * n, n, column, count, apart, x, buffer, masked);
        make_probabilities(problem.teacher, b * m, m, column, count, apart, y, buffer, masked + n);
        if (to_student)
          side_gradient(problem.student, b, x, y, m, student_weights.get(), masked, column, count, sums, buffer);
        if (to_teacher)
          side_gradient(problem.teacher, b, y, x, n, teacher_weights.get(), masked + n, column, count, sums, buffer);
      }
    }
    return done;
  }
};

template <class Real>
void normalise(const PairNormalisers& problem) {
#pragma omp parallel for num_threads(problem.threads) schedule(static)
  for (int64_t row = 0; row < problem.rows; ++row) {
    alignas(64) Real buffer[block_size];
    alignas(64) Real relative[block_size];
    alignas(64) Real made[block_size];
    const Stream<Real> stream(problem.logits, row, problem.softcap, problem.temperature);
    const Real scale = stream.tempering.scale;
    Real max = static_cast<Real>(logit_floor);
    double sum = 0;
    for_blocks(problem.vocab, [&](int64_t start, int64_t n) {
      Range<Real> range;
      const Real* block = stream.load(start, n, buffer, range);
      if (range.max > max) {
        sum *= std::exp2((static_cast<double>(max) - static_cast<double>(range.max)) * static_cast<double>(scale));
        max = range.max;
      }
      const int64_t left = std::min(block_size, problem.vocab - start - n);
      exponentials(block, n, max, scale, relative, made, entry_address(problem.logits, row, start + n),
                   left * dtype_size(problem.logits.dtype));
      // In double: beside the largest, which is 1, single precision would lose the others' digits.
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(made[i]);
    });
    Real* result = static_cast<Real*>(problem.normalisers) + 2 * row;
    result[0] = max;
    result[1] = static_cast<Real>(sum);
  }
}

}  // namespace

bool pairwise_normalisers(const PairNormalisers& problem) {
  if (problem.compute_double) {
    normalise<double>(problem);
  } else {
    normalise<float>(problem);
  }
  return true;
}

bool pairwise_l1(const PairProblem& problem) {
  if (problem.grad) return problem.compute_double ? Gradients<double>(problem).run() : Gradients<float>(problem).run();
  return problem.compute_double ? Distances<double>(problem).run() : Distances<float>(problem).run();
}

}  // namespace kd::KD_ISA
