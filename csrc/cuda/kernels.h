// The CUDA kernels as the bindings call them. Each puts its kernels into a stream of the current device and returns what kept
// it from doing so, or an empty text. Nothing waits and nothing is allocated, so that a graph can capture the calls.
#pragma once

#include <string>

#include "problem.h"

namespace kd::cuda {

// Columns of what the forward of a divergence leaves to its backward.
constexpr int saved_statistics = 9;

// Columns, double, of what the launches of a sparse divergence leave to each other.
constexpr int sparse_statistics = 8;

std::string divergence_forward(const RowProblem& problem, void* stream);
std::string divergence_backward(const RowProblem& problem, void* stream);
std::string divergence_fused(const RowProblem& problem, void* stream);  // values and the gradients that are wanted
std::string sparse_divergence(SparseProblem& problem, void* stream);
std::string token_statistics(const RowProblem& problem, void* stream);

std::string topk(const TopKProblem& problem, void* stream);
std::string sample(const SampleProblem& problem, void* stream);

// To pack, the entries of a row come by ascending id, those that are none behind them, and `data` holds zeros up to a whole
// number of words of 32 bits.
std::string pack_records(const RecordProblem& problem, void* stream);
std::string unpack_records(const RecordProblem& problem, void* stream);

std::string pairwise_normalisers(const PairNormalisers& problem, void* stream);
std::string pairwise_l1(const PairProblem& problem, void* stream);

// Vectors of doubles, as long as rows and columns together, that each problem has in its scratch.
constexpr int sinkhorn_vectors = 7, sinkhorn_gradient_vectors = 13;

std::string sinkhorn(const SinkhornProblem& problem, void* stream);
std::string sinkhorn_gradient(const SinkhornGradientProblem& problem, void* stream);

}  // namespace kd::cuda
