// The `divergence` family on rows that shared memory can hold: each logit is read from memory once, whatever is asked for, and
// each gradient is written once; it may be written over the logits.
//
// The blocks of a cluster (sm_90 and later; else a single block) keep a part of the row each, as it is stored. Its first sweep
// comes from memory, with online normalisers; a second one, if the divergence takes it, and the one for the gradients read
// what was kept. A thread keeps what it alone reads again, so that sweeps need no barriers: only sums do.
#include "cuda/divergence_on_chip.cuh"

#include "cuda/divergence_rows.cuh"
#include "cuda/launch.cuh"

namespace kd::cuda {
namespace {

// Of a block that has a multiprocessor to itself, and of one of several.
constexpr unsigned most_threads = 512, most_threads_beside_others = 256;

// Of shared memory that a kernel declares, at most.
constexpr int64_t declared_bytes = 1 << 10;

constexpr int entries = most_entries;
template <class Real>
using Side = Stream<Real, entries, false>;

// One side of a block's part of a row. Vectors of a warp that are read together are next to each other: no two of its threads
// ask the same bank.
struct KeptSide {
  SharedView<uint4> vectors;
  int steps;  // of all threads: how many vectors lie between the two of a step
  bool two;

  __device__ __forceinline__ void put(int step, const Packed& packed) const {
    vectors[step] = packed.vectors[0];
    if (two) vectors[steps + step] = packed.vectors[1];
  }

  __device__ __forceinline__ Packed get(int step) const {
    Packed packed = {};
    packed.vectors[0] = vectors[step];
    if (two) packed.vectors[1] = vectors[steps + step];
    return packed;
  }
};

// Reads a row from memory once and keeps it.
template <class Real>
struct SweepsOnChip {
  const Side<Real>& student;
  const Side<Real>& teacher;
  Span span;
  bool adjacent;
  KeptSide kept_student, kept_teacher;

  __device__ __forceinline__ bool left_out(const Columns& columns, bool whole, int i) const {
    return !whole && !columns.valid(i);
  }

  template <class Body>
  __device__ __forceinline__ void first(Body body) const {
    int step = static_cast<int>(threadIdx.x);
    for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
      const Packed packed_s = student.logits.row.load_packed(columns, whole);
      const Packed packed_t = teacher.logits.row.load_packed(columns, whole);
      kept_student.put(step, packed_s);
      kept_teacher.put(step, packed_t);
      unpack(packed_s, packed_t, columns, whole, body);
      step += static_cast<int>(blockDim.x);
    });
  }

  template <class Body>
  __device__ __forceinline__ void again(Body body) const {
    int step = static_cast<int>(threadIdx.x);
    for_steps<entries>(span, adjacent, [&](const Columns& columns, bool whole) {
      unpack(kept_student.get(step), kept_teacher.get(step), columns, whole, body);
      step += static_cast<int>(blockDim.x);
    });
  }

 private:
  template <class Body>
  __device__ __forceinline__ void unpack(const Packed& packed_s, const Packed& packed_t, const Columns& columns,
                                         bool whole, Body body) const {
    Real s[entries], t[entries];
    student.logits.unpack(packed_s, columns, whole, s);
    teacher.logits.unpack(packed_t, columns, whole, t);
    body(columns, whole, s, t);
  }
};

template <class Real, int number>
__global__ void __launch_bounds__(most_threads) on_chip_kernel(RowProblem problem, bool adjacent, int steps) {
  constexpr Kind kind = static_cast<Kind>(number);
  using Sums = ClusterSums<Real, most_sums>;
  static_assert((Sums::scratch_elements + most_sums) * sizeof(Real) <= declared_bytes);
  KD_SHARED(Real, scratch, Sums::scratch_elements);
  KD_SHARED(Real, published, most_sums);
  KD_DYNAMIC_SHARED(uint4, kept);
  const int64_t row = blockIdx.x / cluster_blocks();
  const Span span = part_of_row(problem.vocab, cluster_blocks(), cluster_rank());
  const bool writes = threadIdx.x == 0 && cluster_rank() == 0;
  if (problem.active && !problem.active[row]) {
    if (writes) write_nothing_of_row<Real>(problem, row);
    write_zero_gradients<Real, entries>(problem, row, span, adjacent);
    return;
  }
  Side<Real> student(problem.student, row, problem.student_softcap, problem.student_temperature, nullptr);
  Side<Real> teacher(problem.teacher, row, problem.teacher_softcap, problem.teacher_temperature, nullptr);
  // Now: once all have met in a sum, gradients may be written over it.
  const Real label_logit = writes && problem.labels ? logit_at_label<Real>(problem, row, student) : Real(0);
  const int of_student = packed_vectors(problem.student.dtype), of_teacher = packed_vectors(problem.teacher.dtype);
  const SweepsOnChip<Real> sweeps{student,
                                  teacher,
                                  span,
                                  adjacent,
                                  {kept, steps, of_student == 2},
                                  {kept + of_student * steps, steps, of_teacher == 2}};
  const auto sums = sums_of_row<kind, entries, Real>(problem, row, student, teacher, sweeps, Sums{scratch, published});
  if (writes) write_row<Real>(problem, row, student, teacher, sums, label_logit);
  if (!problem.grad_student.data && !problem.grad_teacher.data) return;
  const RowGradients<kind, entries, Real> gradients(problem, row, sums, student, teacher);
  sweeps.again([&](const Columns& columns, bool whole, const Real* s, const Real* t) {
    gradients.write(columns, whole, student, teacher, s, t);
  });
}

// How the blocks of a row share it out.
struct Shares {
  unsigned blocks = 0;  // 0: it does not fit
  unsigned threads = 0;
  int64_t steps = 0;  // of all threads of a block
  int64_t bytes = 0;  // of shared memory, of a block
};

Shares shares(const RowProblem& problem, unsigned blocks, unsigned threads) {
  const int64_t vectors = packed_vectors(problem.student.dtype) + packed_vectors(problem.teacher.dtype);
  const int64_t longest = part_of_row(problem.vocab, static_cast<int>(blocks), 0).end;
  threads = threads_for(longest, entries, threads);
  const int64_t step = static_cast<int64_t>(threads) * entries;
  const int64_t steps = (longest + step - 1) / step * threads;
  return {blocks, threads, steps, steps * vectors * static_cast<int64_t>(sizeof(uint4))};
}

// As few blocks as leave room for another row's on their multiprocessors, so that one reads while the other computes; where
// there is no such number, as few as hold the row. More where there are too few rows to keep the device busy.
Shares shares(const RowProblem& problem) {
  const bool clusters = has_clusters();
  const unsigned most = clusters ? 8 : 1;  // that every device with clusters grants
  const unsigned least =
      clusters ? static_cast<unsigned>(blocks_per_row(problem.rows, problem.vocab, multiprocessors())) : 1;
  const int64_t of_block = most_shared_bytes();
  const int64_t beside_another = (of_block + reserved_shared_bytes) / 2 - reserved_shared_bytes;
  for (unsigned blocks = least; blocks <= most; blocks *= 2) {
    const Shares found = shares(problem, blocks, most_threads_beside_others);
    if (found.bytes + declared_bytes <= beside_another) return found;
  }
  for (unsigned blocks = least; blocks <= most; blocks *= 2) {
    const Shares found = shares(problem, blocks, most_threads);
    if (found.bytes + declared_bytes <= of_block) return found;
  }
  return {};
}

template <class Real, int number>
std::string run(const RowProblem& problem, void* stream) {
  const char* const name = "divergence_on_chip";
  const Shares found = shares(problem);
  const std::string error = allow_all_shared_bytes(name, on_chip_kernel<Real, number>, declared_bytes);
  if (!error.empty()) return error;
  return launch(name, on_chip_kernel<Real, number>,
                Grid(static_cast<unsigned>(problem.rows) * found.blocks, 1, found.blocks), found.threads,
                static_cast<size_t>(found.bytes), static_cast<LaunchStream>(stream), problem, aligned_rows(problem),
                static_cast<int>(found.steps));
}

}  // namespace

bool fits_on_chip(const RowProblem& problem) {
  const bool general =
      problem.compute_double || problem.student_composition || problem.teacher_composition || problem.targets;
  return !general && shares(problem).blocks > 0;
}

std::string divergence_on_chip(const RowProblem& problem, void* stream) {
  switch (static_cast<Kind>(problem.kind)) {
#define KD_CASE(name) \
  case Kind::name: return run<float, static_cast<int>(Kind::name)>(problem, stream);
    KD_FOR_ALL_KINDS(KD_CASE)
#undef KD_CASE
  }
  return "divergence: no such kind";
}

}  // namespace kd::cuda
