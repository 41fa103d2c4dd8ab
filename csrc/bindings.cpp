// The extension module: raw addresses in, kernels run, nothing of torch linked.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/problem.h"

namespace py = pybind11;

namespace kd {

void* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    const int64_t rounded = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(rounded)));
    if (!memory) return nullptr;
    size = rounded;
  }
  return memory.get();
}

void populate(void* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t page = 4096;  // or a divisor of the real size, which the call then refuses
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#else
  (void)data, (void)bytes;
#endif
}

namespace {

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*divergence)(const RowProblem&);
  bool (*token_statistics)(const RowProblem&);
  bool (*sparse_divergence)(SparseProblem&);
  void (*collect_entries)(const EntryChunk&, int32_t*, float*);
  bool (*expand_entries)(const EntryChunk&, int);
  bool (*sparse_products)(const SparseProducts&);
  bool (*pack_records)(RecordProblem&);
  bool (*unpack_records)(RecordProblem&);
  bool (*topk)(const TopKProblem&);
  bool (*sample)(const SampleProblem&);
  void (*pairwise_normalisers)(const PairNormalisers&);
  bool (*pairwise_l1)(const PairProblem&);
  bool (*sorted_l1)(const SortedL1Problem&);
  bool (*sinkhorn)(const SinkhornProblem&);
  bool (*sinkhorn_gradient)(const SinkhornGradientProblem&);
};

#define KD_KERNELS(isa)                                                                                              \
  Kernels {                                                                                                          \
    #isa, isa::divergence, isa::token_statistics, isa::sparse_divergence, isa::collect_entries, isa::expand_entries, \
        isa::sparse_products, isa::pack_records, isa::unpack_records, isa::topk, isa::sample,                        \
        isa::pairwise_normalisers, isa::pairwise_l1, isa::sorted_l1, isa::sinkhorn, isa::sinkhorn_gradient           \
  }

bool processor_has(const std::string& isa) {
#if defined(KD_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "baseline";
}

const Kernels built[] = {
#if defined(KD_HAVE_X86_ISAS)
    KD_KERNELS(avx512), KD_KERNELS(avx2),
#endif
    KD_KERNELS(baseline)};

// The best instruction set of this processor, or the one KDKERNELS_CPU_ISA names.
const Kernels& choose() {
  const char* forced = std::getenv("KDKERNELS_CPU_ISA");
  if (forced && *forced) {
    std::string names;
    for (const Kernels& kernels : built) {
      if (kernels.name == std::string(forced)) {
        if (!processor_has(forced))
          throw std::runtime_error(std::string("KDKERNELS_CPU_ISA=") + forced + ": this processor lacks it");
        return kernels;
      }
      names += std::string(names.empty() ? "" : ", ") + kernels.name;
    }
    throw std::runtime_error(std::string("KDKERNELS_CPU_ISA=") + forced + " is not built; choose from " + names);
  }
  for (const Kernels& kernels : built)
    if (processor_has(kernels.name)) return kernels;
  throw std::runtime_error("no CPU kernels for this processor");
}

const Kernels& chosen() {
  static const Kernels& kernels = choose();
  return kernels;
}

using Address = uintptr_t;

Matrix matrix(Address data, int64_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

PerRow per_row(double value, Address values) { return {reinterpret_cast<const void*>(values), value}; }

EntryLists entry_lists(Address counts, Address summaries) {
  return {reinterpret_cast<int32_t*>(counts), reinterpret_cast<double*>(summaries)};
}

void check_labels(const RowProblem& problem) {
  if (!problem.labels) return;
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (problem.active && !problem.active[row]) continue;
    const int64_t label = problem.labels[row];
    if (label < 0 || label >= problem.vocab)
      throw py::value_error("labels: token " + std::to_string(row) + " has label " + std::to_string(label) +
                            ", outside the vocabulary [0, " + std::to_string(problem.vocab) + ")");
  }
}

template <class Kernel, class Problem>
void run(Kernel kernel, Problem& problem) {
  // Below this a second thread costs more than it brings.
  if (problem.rows * problem.vocab < 32768) problem.threads = 1;
  if (problem.rows < problem.threads) problem.threads = problem.rows < 1 ? 1 : static_cast<int>(problem.rows);
  bool done;
  {
    py::gil_scoped_release release;
    done = kernel(problem);
  }
  if (!done) throw std::bad_alloc();
}

template <class Kernel, class Problem>
void launch(Kernel kernel, Problem& problem) {
  check_labels(problem);
  run(kernel, problem);
}

RowProblem sides(int threads, bool compute_double, int64_t rows, int64_t vocab, const Matrix& student,
                 const Matrix& teacher, const PerRow& student_temperature, const PerRow& teacher_temperature,
                 double student_softcap, double teacher_softcap, Address labels, Address active) {
  RowProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.student = student;
  problem.teacher = teacher;
  problem.student_temperature = student_temperature;
  problem.teacher_temperature = teacher_temperature;
  problem.student_softcap = student_softcap;
  problem.teacher_softcap = teacher_softcap;
  problem.labels = reinterpret_cast<const int64_t*>(labels);
  problem.active = reinterpret_cast<const uint8_t*>(active);
  return problem;
}

void divergence(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student, int64_t student_stride,
                int student_dtype, Address teacher, int64_t teacher_stride, int teacher_dtype,
                double student_temperature, Address student_temperatures, double teacher_temperature,
                Address teacher_temperatures, double student_softcap, double teacher_softcap, Address labels,
                Address active, int kind, double a, double b, Address divergence, Address cross_entropy,
                double grad_divergence, Address grad_divergences, double grad_cross_entropy,
                Address grad_cross_entropies, Address grad_student, int64_t grad_student_stride, Address grad_teacher,
                int64_t grad_teacher_stride, Address total, bool fresh_gradients, Address student_counts,
                Address student_summaries, Address teacher_counts, Address teacher_summaries, double tolerance,
                bool stochastic, uint64_t seed, int64_t first_row) {
  RowProblem problem =
      sides(threads, compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.kind = kind;
  problem.a = a;
  problem.b = b;
  problem.divergence = reinterpret_cast<void*>(divergence);
  problem.cross_entropy = reinterpret_cast<void*>(cross_entropy);
  problem.grad_divergence = per_row(grad_divergence, grad_divergences);
  problem.grad_cross_entropy = per_row(grad_cross_entropy, grad_cross_entropies);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.grad_teacher = matrix(grad_teacher, grad_teacher_stride, teacher_dtype);
  std::unique_ptr<double[]> weighted(total ? new double[static_cast<size_t>(rows)] : nullptr);
  problem.weighted = weighted.get();
  problem.fresh_gradients = fresh_gradients;
  problem.student_entries = entry_lists(student_counts, student_summaries);
  problem.teacher_entries = entry_lists(teacher_counts, teacher_summaries);
  problem.entry_rule = {tolerance, stochastic, seed, first_row};
  launch(chosen().divergence, problem);
  if (!total) return;
  // In the order of the rows, so that it does not depend on the threads.
  double sum = 0;
  for (int64_t row = 0; row < rows; ++row) sum += weighted[row];
  if (compute_double) {
    *reinterpret_cast<double*>(total) = sum;
  } else {
    *reinterpret_cast<float*>(total) = static_cast<float>(sum);
  }
}

void token_statistics(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student,
                      int64_t student_stride, int student_dtype, Address teacher, int64_t teacher_stride,
                      int teacher_dtype, double student_temperature, Address student_temperatures,
                      double teacher_temperature, Address teacher_temperatures, double student_softcap,
                      double teacher_softcap, Address labels, Address active, Address statistics, Address argmax) {
  RowProblem problem =
      sides(threads, compute_double, rows, vocab, matrix(student, student_stride, student_dtype),
            matrix(teacher, teacher_stride, teacher_dtype), per_row(student_temperature, student_temperatures),
            per_row(teacher_temperature, teacher_temperatures), student_softcap, teacher_softcap, labels, active);
  problem.statistics = reinterpret_cast<void*>(statistics);
  problem.argmax = reinterpret_cast<int64_t*>(argmax);
  launch(chosen().token_statistics, problem);
}

EntryChunk entry_chunk(int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype, Address counts,
                       Address summaries) {
  return {rows, vocab, matrix(storage, stride, dtype), entry_lists(counts, summaries)};
}

void collect_entries(int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype, Address counts,
                     Address summaries, Address columns, Address values) {
  py::gil_scoped_release release;
  chosen().collect_entries(entry_chunk(rows, vocab, storage, stride, dtype, counts, summaries),
                           reinterpret_cast<int32_t*>(columns), reinterpret_cast<float*>(values));
}

void expand_entries(int threads, int64_t rows, int64_t vocab, Address storage, int64_t stride, int dtype,
                    Address counts, Address summaries) {
  bool done;
  {
    py::gil_scoped_release release;
    done = chosen().expand_entries(entry_chunk(rows, vocab, storage, stride, dtype, counts, summaries), threads);
  }
  if (!done) throw std::bad_alloc();
}

void sparse_products(int threads, int64_t rows, int64_t vocab, int64_t hidden_size, Address offsets, Address columns,
                     Address values, Address weight, int64_t weight_stride, int weight_dtype, Address hidden,
                     int64_t hidden_stride, Address everywhere, Address to_hidden, Address to_weight) {
  SparseProducts problem;
  problem.threads = threads;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.hidden_size = hidden_size;
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.columns = reinterpret_cast<const int32_t*>(columns);
  problem.values = reinterpret_cast<const float*>(values);
  problem.weight = matrix(weight, weight_stride, weight_dtype);
  problem.hidden = reinterpret_cast<const float*>(hidden);
  problem.hidden_stride = hidden_stride;
  problem.everywhere = reinterpret_cast<const float*>(everywhere);
  problem.to_hidden = reinterpret_cast<float*>(to_hidden);
  problem.to_weight = reinterpret_cast<float*>(to_weight);
  bool done;
  {
    py::gil_scoped_release release;
    done = chosen().sparse_products(problem);
  }
  if (!done) throw std::bad_alloc();
}

// The first row that is malformed, or the number of rows.
int64_t sparse_divergence(int threads, bool compute_double, int64_t rows, int64_t vocab, Address student,
                          int64_t student_stride, int student_dtype, double student_temperature,
                          Address student_temperatures, double teacher_temperature, Address teacher_temperatures,
                          double student_softcap, Address labels, Address active, int kind, double a, double b,
                          int policy, int64_t entries, Address ids, int64_t id_stride, bool wide_ids, Address values,
                          int64_t value_stride, int value_dtype, Address constants, int constant_dtype, Address records,
                          Address offsets, Address counts, int64_t largest_count, int bits, Address divergence,
                          Address cross_entropy, Address grad_divergence, Address grad_cross_entropy,
                          Address grad_student, int64_t grad_student_stride, Address student_counts,
                          Address student_summaries, double tolerance, bool stochastic, uint64_t seed,
                          int64_t first_row) {
  SparseProblem problem;
  static_cast<RowProblem&>(problem) =
      sides(threads, compute_double, rows, vocab, matrix(student, student_stride, student_dtype), Matrix(),
            per_row(student_temperature, student_temperatures), per_row(teacher_temperature, teacher_temperatures),
            student_softcap, 0, labels, active);
  problem.kind = kind;
  problem.a = a;
  problem.b = b;
  problem.policy = static_cast<Policy>(policy);
  problem.entries = entries;
  problem.ids = reinterpret_cast<const void*>(ids);
  problem.id_stride = id_stride;
  problem.wide_ids = wide_ids;
  problem.values = matrix(values, value_stride, value_dtype);
  problem.constants = matrix(constants, 1, constant_dtype);
  problem.records = reinterpret_cast<const uint8_t*>(records);
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.counts = reinterpret_cast<const int32_t*>(counts);
  problem.bits = bits;
  if (records) problem.entries = largest_count;
  problem.divergence = reinterpret_cast<void*>(divergence);
  problem.cross_entropy = reinterpret_cast<void*>(cross_entropy);
  problem.grad_divergence = per_row(0, grad_divergence);
  problem.grad_cross_entropy = per_row(0, grad_cross_entropy);
  problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
  problem.fresh_gradients = true;
  problem.student_entries = entry_lists(student_counts, student_summaries);
  problem.entry_rule = {tolerance, stochastic, seed, first_row};
  launch(chosen().sparse_divergence, problem);
  return problem.wrong_row;
}

RecordProblem records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts,
                      Address offsets, Address data) {
  RecordProblem problem;
  problem.rows = rows;
  problem.width = width;
  problem.vocab = vocab;
  problem.bits = bits;
  // Below this a second thread costs more than it brings.
  problem.threads = rows * width < 8192 ? 1 : threads;
  problem.counts = reinterpret_cast<const int32_t*>(counts);
  problem.offsets = reinterpret_cast<const int64_t*>(offsets);
  problem.data = reinterpret_cast<uint8_t*>(data);
  return problem;
}

// The first row that is malformed, or the number of rows.
int64_t launch(bool (*kernel)(RecordProblem&), RecordProblem& problem) {
  bool done;
  {
    py::gil_scoped_release release;
    done = kernel(problem);
  }
  if (!done) throw std::bad_alloc();
  return problem.wrong_row;
}

int64_t pack_records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts, Address offsets,
                     Address data, Address ids, Address log_probs, Address log_tail_mass) {
  RecordProblem problem = records(threads, rows, width, vocab, bits, counts, offsets, data);
  problem.ids = reinterpret_cast<const int64_t*>(ids);
  problem.log_probs = reinterpret_cast<const float*>(log_probs);
  problem.log_tail_mass = reinterpret_cast<const float*>(log_tail_mass);
  return launch(chosen().pack_records, problem);
}

int64_t unpack_records(int threads, int64_t rows, int64_t width, int64_t vocab, int bits, Address counts,
                       Address offsets, Address data, Address ids, Address log_probs, Address log_tail_mass) {
  RecordProblem problem = records(threads, rows, width, vocab, bits, counts, offsets, data);
  problem.decoded_ids = reinterpret_cast<int64_t*>(ids);
  problem.decoded_log_probs = reinterpret_cast<float*>(log_probs);
  problem.decoded_log_tail_mass = reinterpret_cast<float*>(log_tail_mass);
  return launch(chosen().unpack_records, problem);
}

void topk(int threads, bool compute_double, int64_t rows, int64_t vocab, Address source, int64_t stride, int dtype,
          double temperature, double softcap, int64_t k, Address ids, Address log_probs, Address log_tail_mass) {
  TopKProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.source = matrix(source, stride, dtype);
  problem.temperature = temperature;
  problem.softcap = softcap;
  problem.k = k;
  problem.ids = reinterpret_cast<int64_t*>(ids);
  problem.log_probs = reinterpret_cast<void*>(log_probs);
  problem.log_tail_mass = reinterpret_cast<void*>(log_tail_mass);
  run(chosen().topk, problem);
}

void sample(int threads, bool compute_double, int64_t rows, int64_t vocab, Address source, int64_t stride, int dtype,
            double temperature, double proposal_temperature, double softcap, int64_t draws, Address uniforms,
            Address ids, Address weights, Address entropy) {
  SampleProblem problem;
  problem.rows = rows;
  problem.vocab = vocab;
  problem.threads = threads;
  problem.compute_double = compute_double;
  problem.source = matrix(source, stride, dtype);
  problem.temperature = temperature;
  problem.proposal_temperature = proposal_temperature;
  problem.softcap = softcap;
  problem.draws = draws;
  problem.uniforms = reinterpret_cast<const double*>(uniforms);
  problem.ids = reinterpret_cast<int64_t*>(ids);
  problem.weights = reinterpret_cast<void*>(weights);
  problem.entropy = reinterpret_cast<void*>(entropy);
  run(chosen().sample, problem);
}

void pairwise_normalisers(int threads, bool compute_double, int64_t rows, int64_t vocab, Address logits, int64_t stride,
                          int dtype, double temperature, double softcap, Address normalisers) {
  PairNormalisers problem;
  problem.rows = rows;
  problem.vocab = vocab;
  // Below this a second thread costs more than it brings.
  problem.threads = rows * vocab < 32768 ? 1 : threads;
  problem.compute_double = compute_double;
  problem.logits = matrix(logits, stride, dtype);
  problem.temperature = temperature;
  problem.softcap = softcap;
  problem.normalisers = reinterpret_cast<void*>(normalisers);
  py::gil_scoped_release release;
  chosen().pairwise_normalisers(problem);
}

PairSide pair_side(int64_t rows, const Matrix& logits, double temperature, double softcap, Address normalisers,
                   const Matrix& gradient, Address centres) {
  return {rows,
          logits,
          temperature,
          softcap,
          reinterpret_cast<const void*>(normalisers),
          gradient,
          reinterpret_cast<const void*>(centres)};
}

void pairwise_l1(int threads, bool compute_double, int64_t problems, int64_t vocab, int64_t student_rows,
                 Address student, int64_t student_stride, int student_dtype, double student_temperature,
                 double student_softcap, Address student_normalisers, Address grad_student, int64_t grad_student_stride,
                 Address student_centres, int64_t teacher_rows, Address teacher, int64_t teacher_stride,
                 int teacher_dtype, double teacher_temperature, double teacher_softcap, Address teacher_normalisers,
                 Address grad_teacher, int64_t grad_teacher_stride, Address teacher_centres, Address distance,
                 Address signed_mass, Address grad) {
  PairProblem problem;
  problem.problems = problems;
  problem.vocab = vocab;
  // Below this a second thread costs more than it brings.
  problem.threads =
      problems * (student_rows + teacher_rows + student_rows * teacher_rows / 8) * vocab < 32768 ? 1 : threads;
  problem.compute_double = compute_double;
  problem.student =
      pair_side(student_rows, matrix(student, student_stride, student_dtype), student_temperature, student_softcap,
                student_normalisers, matrix(grad_student, grad_student_stride, student_dtype), student_centres);
  problem.teacher =
      pair_side(teacher_rows, matrix(teacher, teacher_stride, teacher_dtype), teacher_temperature, teacher_softcap,
                teacher_normalisers, matrix(grad_teacher, grad_teacher_stride, teacher_dtype), teacher_centres);
  problem.distance = reinterpret_cast<void*>(distance);
  problem.signed_mass = reinterpret_cast<void*>(signed_mass);
  problem.grad = reinterpret_cast<const void*>(grad);
  bool done;
  {
    py::gil_scoped_release release;
    done = chosen().pairwise_l1(problem);
  }

  void fill(SinkhornProblem & problem, int threads, bool compute_double, int64_t batch, int64_t rows, int64_t columns,
            Address cost, Address a, Address b, Address row_lengths, Address column_lengths, Address start,
            double epsilon, double tolerance, double row_reach, double column_reach, double epsilon_start,
            double epsilon_decay, int64_t max_iterations, Address f, Address g, Address iterations, Address f_history,
            Address g_history) {
    problem.batch = batch;
    problem.rows = rows;
    problem.columns = columns;
    // Below this a second thread costs more than it brings.
    problem.threads = batch * rows * columns < 8192 ? 1 : threads;
    problem.compute_double = compute_double;
    problem.cost = reinterpret_cast<const void*>(cost);
    problem.a = reinterpret_cast<const void*>(a);
    problem.b = reinterpret_cast<const void*>(b);
    problem.row_lengths = reinterpret_cast<const int64_t*>(row_lengths);
    problem.column_lengths = reinterpret_cast<const int64_t*>(column_lengths);
    problem.start = reinterpret_cast<const double*>(start);
    problem.epsilon = epsilon;
    problem.tolerance = tolerance;
    problem.row_reach = row_reach;
    problem.column_reach = column_reach;
    problem.epsilon_start = epsilon_start;
    problem.epsilon_decay = epsilon_decay;
    problem.max_iterations = max_iterations;
    problem.f = reinterpret_cast<double*>(f);
    problem.g = reinterpret_cast<double*>(g);
    problem.iterations = reinterpret_cast<int64_t*>(iterations);
    problem.f_history = reinterpret_cast<double*>(f_history);
    problem.g_history = reinterpret_cast<double*>(g_history);
  }

  void sinkhorn(int threads, bool compute_double, int64_t batch, int64_t rows, int64_t columns, Address cost, Address a,
                Address b, Address row_lengths, Address column_lengths, Address start, double epsilon, double tolerance,
                double row_reach, double column_reach, double epsilon_start, double epsilon_decay,
                int64_t max_iterations, Address f, Address g, Address iterations, Address f_history, Address g_history,
                Address distance, Address value, Address error, Address status) {
    SinkhornProblem problem;
    fill(problem, threads, compute_double, batch, rows, columns, cost, a, b, row_lengths, column_lengths, start,
         epsilon, tolerance, row_reach, column_reach, epsilon_start, epsilon_decay, max_iterations, f, g, iterations,
         f_history, g_history);
    problem.distance = reinterpret_cast<void*>(distance);
    problem.value = reinterpret_cast<void*>(value);
    problem.error = reinterpret_cast<void*>(error);
    problem.status = reinterpret_cast<int32_t*>(status);
    bool done;
    {
      py::gil_scoped_release release;
      done = chosen().sinkhorn(problem);
    }
    if (!done) throw std::bad_alloc();
  }

  void sorted_l1(int threads, bool compute_double, int64_t rows, int64_t student_vocab, int64_t teacher_vocab,
                 Address student, int64_t student_stride, int student_dtype, Address teacher, int64_t teacher_stride,
                 int teacher_dtype, double student_temperature, Address student_temperatures,
                 double teacher_temperature, Address teacher_temperatures, double student_softcap,
                 double teacher_softcap, Address active, double error_bound, Address values, Address omitted,
                 Address grad_values, Address grad_student, int64_t grad_student_stride, Address grad_teacher,
                 int64_t grad_teacher_stride) {
    SortedL1Problem problem;
    problem.rows = rows;
    problem.vocab = student_vocab + teacher_vocab;
    problem.threads = threads;
    problem.compute_double = compute_double;
    problem.student = matrix(student, student_stride, student_dtype);
    problem.teacher = matrix(teacher, teacher_stride, teacher_dtype);
    problem.student_vocab = student_vocab;
    problem.teacher_vocab = teacher_vocab;
    problem.student_temperature = per_row(student_temperature, student_temperatures);
    problem.teacher_temperature = per_row(teacher_temperature, teacher_temperatures);
    problem.student_softcap = student_softcap;
    problem.teacher_softcap = teacher_softcap;
    problem.active = reinterpret_cast<const uint8_t*>(active);
    problem.error_bound = error_bound;
    problem.values = reinterpret_cast<void*>(values);
    problem.omitted = reinterpret_cast<void*>(omitted);
    problem.grad_values = per_row(1, grad_values);
    problem.grad_student = matrix(grad_student, grad_student_stride, student_dtype);
    problem.grad_teacher = matrix(grad_teacher, grad_teacher_stride, teacher_dtype);
    run(chosen().sorted_l1, problem);
  }

  void sinkhorn_gradient(int threads, bool compute_double, int64_t batch, int64_t rows, int64_t columns, Address cost,
                         Address a, Address b, Address row_lengths, Address column_lengths, Address start,
                         double epsilon, double tolerance, double row_reach, double column_reach, double epsilon_start,
                         double epsilon_decay, int64_t max_iterations, Address f, Address g, Address iterations,
                         Address f_history, Address g_history, int gradient, double solver_tolerance,
                         Address grad_distance, Address grad_value, Address grad_f, Address grad_g, Address grad_cost,
                         Address grad_a, Address grad_b) {
    SinkhornGradientProblem problem;
    fill(problem, threads, compute_double, batch, rows, columns, cost, a, b, row_lengths, column_lengths, start,
         epsilon, tolerance, row_reach, column_reach, epsilon_start, epsilon_decay, max_iterations, f, g, iterations,
         f_history, g_history);
    problem.gradient = static_cast<TransportGradient>(gradient);
    problem.solver_tolerance = solver_tolerance;
    problem.grad_distance = reinterpret_cast<const void*>(grad_distance);
    problem.grad_value = reinterpret_cast<const void*>(grad_value);
    problem.grad_f = reinterpret_cast<const double*>(grad_f);
    problem.grad_g = reinterpret_cast<const double*>(grad_g);
    problem.grad_cost = reinterpret_cast<void*>(grad_cost);
    problem.grad_a = reinterpret_cast<void*>(grad_a);
    problem.grad_b = reinterpret_cast<void*>(grad_b);
    bool done;
    {
      py::gil_scoped_release release;
      done = chosen().sinkhorn_gradient(problem);
    }
    if (!done) throw std::bad_alloc();
  }

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of kdkernels. Addresses and sizes are trusted: call through kdkernels.backends.cpu.";
  module.def("divergence", &kd::divergence);
  module.def("token_statistics", &kd::token_statistics);
  module.def("sparse_divergence", &kd::sparse_divergence);
  module.def("collect_entries", &kd::collect_entries);
  module.def("expand_entries", &kd::expand_entries);
  module.def("sparse_products", &kd::sparse_products);
  module.def("pack_records", &kd::pack_records);
  module.def("unpack_records", &kd::unpack_records);
  module.def("topk", &kd::topk);
  module.def("sample", &kd::sample);
  module.def("pairwise_normalisers", &kd::pairwise_normalisers);
  module.def("pairwise_l1", &kd::pairwise_l1);
  module.def("sorted_l1", &kd::sorted_l1);
  module.def("sinkhorn", &kd::sinkhorn);
  module.def("sinkhorn_gradient", &kd::sinkhorn_gradient);
  module.def("isa", [] { return kd::chosen().name; }, "Instruction set of the kernels in use.");
  module.def(
      "isas",
      [] {
        py::list names;
        for (const kd::Kernels& kernels : kd::built)
          if (kd::processor_has(kernels.name)) names.append(kernels.name);
        return names;
      },
      "Instruction sets that are built and that this processor has, best first.");
}
