// The CPU kernels as the bindings call them, and what they need of the process.
#pragma once

#include "problem.h"

namespace kd {

// A buffer of this thread, at least `bytes` long and aligned to 64; it is kept between calls.
// Null if there is no memory.
void* thread_scratch(int64_t bytes);

// Brings the pages of a large result that is about to be written into memory, which costs less at
// once than page by page. A hint: nothing happens where the system cannot, or where they are there.
void populate(void* data, int64_t bytes);

// One entry point per instruction set and family. False: out of memory.
#define KD_DECLARE_CPU_KERNELS(isa)                                               \
  namespace isa {                                                                 \
  bool divergence(const RowProblem& problem);                                     \
  bool bernoulli(const RowProblem& problem);                                      \
  bool head_mass(const HeadMassProblem& problem);                                 \
  bool token_statistics(const RowProblem& problem);                               \
  bool sparse_divergence(SparseProblem& problem);                                 \
  void collect_entries(const EntryChunk& chunk, int32_t* columns, float* values); \
  bool expand_entries(const EntryChunk& chunk, int threads);                      \
  bool sparse_products(const SparseProducts& problem);                            \
  bool pack_records(RecordProblem& problem);                                      \
  bool unpack_records(RecordProblem& problem);                                    \
  bool topk(const TopKProblem& problem);                                          \
  bool sample(const SampleProblem& problem);                                      \
  bool pairwise_normalisers(const PairNormalisers& problem);                      \
  bool pairwise_l1(const PairProblem& problem);                                   \
  bool sorted_l1(const SortedL1Problem& problem);                                 \
  bool plackett_luce(const RankingProblem& problem);                              \
  bool token_ranks(const RankProblem& problem);                                   \
  bool sinkhorn(const SinkhornProblem& problem);                                  \
  bool sinkhorn_gradient(const SinkhornGradientProblem& problem);                 \
  bool angle(const AngleProblem& problem);                                        \
  bool row_deviation(const DeviationProblem& problem);                            \
  }
KD_DECLARE_CPU_KERNELS(baseline)
KD_DECLARE_CPU_KERNELS(avx2)
KD_DECLARE_CPU_KERNELS(avx512)
#undef KD_DECLARE_CPU_KERNELS

}  // namespace kd
