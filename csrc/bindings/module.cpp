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

}  // namespace kd

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU kernels of kdkernels. Addresses and sizes are trusted: call through kdkernels.backends.cpu.";
  kd::bind_divergence(module);
  kd::bind_bernoulli(module);
  kd::bind_head_mass(module);
  kd::bind_sparse_divergence(module);
  kd::bind_gradient_entries(module);
  kd::bind_records(module);
  kd::bind_topk(module);
  kd::bind_pairwise_l1(module);
  kd::bind_sorted_l1(module);
  kd::bind_ranking(module);
  kd::bind_sinkhorn(module);
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
