// The `divergence` family on GPUs, as the bindings call it.
#pragma once

#include <string>

#include "problem.h"

namespace kd::cuda {

// Columns of the statistics that the forward hands to the backward.
constexpr int saved_statistics = 7;

// Each returns what kept it from running, or an empty text. `stream` is torch's current stream; nothing waits for it.
std::string divergence_forward(const RowProblem& problem, void* statistics, void* stream);
std::string divergence_backward(const RowProblem& problem, const void* statistics, void* stream);

}  // namespace kd::cuda
