// Divergences of rows that shared memory can hold.
#pragma once

#include "cuda/kernels.h"

namespace kd::cuda {

// Whether the current device has a kernel for the problem, and shared memory for its rows.
bool fits_on_chip(const RowProblem& problem);

// Values, and the gradients that are wanted, of a problem that fits.
std::string divergence_on_chip(const RowProblem& problem, void* stream);

}  // namespace kd::cuda
