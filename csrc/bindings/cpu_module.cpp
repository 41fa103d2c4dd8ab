// The extension module: raw addresses in, kernels run, nothing of torch linked.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>

#include "bindings/angle.h"
#include "bindings/bernoulli.h"
#include "bindings/divergence.h"
#include "bindings/gradient_entries.h"
#include "bindings/head_mass.h"
#include "bindings/pairwise_l1.h"
#include "bindings/ranking.h"
#include "bindings/records.h"
#include "bindings/relation.h"
#include "bindings/row_deviation.h"
#include "bindings/sinkhorn.h"
#include "bindings/sorted_l1.h"
#include "bindings/sparse_divergence.h"
#include "bindings/topk.h"

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

// A divergence with the scaled sum of its rows, if it is wanted.
void divergence_on_cpu(int threads, RowProblem& problem) {
  std::unique_ptr<double[]> weighted(problem.total ? new double[static_cast<size_t>(problem.rows)] : nullptr);
  problem.weighted = weighted.get();
  on_cpu<&Kernels::divergence>(threads, problem);
  if (!problem.total) return;
  // In the order of the rows, so that it does not depend on the threads.
  double sum = 0;
  for (int64_t row = 0; row < problem.rows; ++row) sum += weighted[static_cast<size_t>(row)];
  if (problem.compute_double) {
    *static_cast<double*>(problem.total) = sum;
  } else {
    *static_cast<float*>(problem.total) = static_cast<float>(sum);
  }
}

// The families that GPUs have in C++ too.
void bind_shared_families(py::module_& module) {
  module.def("divergence", &divergence<int, &divergence_on_cpu>);
  module.def("token_statistics", &token_statistics<int, &on_cpu<&Kernels::token_statistics, RowProblem>>);
  module.def("sparse_divergence", &sparse_divergence<int, &on_cpu<&Kernels::sparse_divergence, SparseProblem>>);
  module.def("topk", &topk<int, &on_cpu<&Kernels::topk, TopKProblem>>);
  module.def("sample", &sample<int, &on_cpu<&Kernels::sample, SampleProblem>>);
  module.def("pack_records", &pack_records<int, &on_cpu<&Kernels::pack_records, RecordProblem>>);
  module.def("unpack_records", &unpack_records<int, &on_cpu<&Kernels::unpack_records, RecordProblem>>);
  module.def("pairwise_normalisers",
             &pairwise_normalisers<int, &on_cpu<&Kernels::pairwise_normalisers, PairNormalisers>>);
  module.def("pairwise_l1", &pairwise_l1<int, &on_cpu<&Kernels::pairwise_l1, PairProblem>>);
  module.def("sinkhorn", &sinkhorn<int, &on_cpu<&Kernels::sinkhorn, SinkhornProblem>>);
  module.def("sinkhorn_gradient",
             &sinkhorn_gradient<int, &on_cpu<&Kernels::sinkhorn_gradient, SinkhornGradientProblem>>);
}

}  // namespace
}  // namespace kd

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of kdkernels. Addresses and sizes are trusted: call through kdkernels.backends.cpu.";
  kd::bind_shared_families(module);
  kd::bind_bernoulli(module);
  kd::bind_head_mass(module);
  kd::bind_gradient_entries(module);
  kd::bind_sorted_l1(module);
  kd::bind_ranking(module);
  kd::bind_angle(module);
  kd::bind_relation(module);
  kd::bind_row_deviation(module);
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
