// The kernels built for each instruction set, and which of them this processor runs.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/relation.h"

namespace kd {
namespace {

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  bool (*divergence)(const RowProblem&);
  bool (*bernoulli)(const RowProblem&);
  bool (*head_mass)(const HeadMassProblem&);
  bool (*token_statistics)(const RowProblem&);
  bool (*sparse_divergence)(SparseProblem&);
  void (*collect_entries)(const EntryChunk&, int32_t*, float*);
  bool (*expand_entries)(const EntryChunk&, int);
  bool (*sparse_products)(const SparseProducts&);
  bool (*pack_records)(RecordProblem&);
  bool (*unpack_records)(RecordProblem&);
  bool (*topk)(const TopKProblem&);
  bool (*sample)(const SampleProblem&);
  bool (*pairwise_normalisers)(const PairNormalisers&);
  bool (*pairwise_l1)(const PairProblem&);
  bool (*sorted_l1)(const SortedL1Problem&);
  bool (*plackett_luce)(const RankingProblem&);
  bool (*token_ranks)(const RankProblem&);
  bool (*sinkhorn)(const SinkhornProblem&);
  bool (*sinkhorn_gradient)(const SinkhornGradientProblem&);
  bool (*angle)(const AngleProblem&);
  bool (*relation)(const RelationProblem&);
  bool (*row_deviation)(const DeviationProblem&);
};

#define KD_KERNELS(isa)                                                                                          \
  Kernels {                                                                                                      \
    #isa, isa::divergence, isa::bernoulli, isa::head_mass, isa::token_statistics, isa::sparse_divergence,        \
        isa::collect_entries, isa::expand_entries, isa::sparse_products, isa::pack_records, isa::unpack_records, \
        isa::topk, isa::sample, isa::pairwise_normalisers, isa::pairwise_l1, isa::sorted_l1, isa::plackett_luce, \
        isa::token_ranks, isa::sinkhorn, isa::sinkhorn_gradient, isa::angle, isa::relation, isa::row_deviation   \
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

}  // namespace
}  // namespace kd
