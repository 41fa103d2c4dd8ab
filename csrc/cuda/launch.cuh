// Launching a kernel, with the error that kept it from running.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/platform.cuh"

namespace kd::cuda {

#if defined(KD_EMULATED)

using LaunchStream = void*;

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   size_t shared_bytes, LaunchStream, Arguments... arguments) {
  emulation::Launch launch;
  launch.kernel = name;
  launch.grid = {blocks, 1, 1};
  launch.block = {threads, 1, 1};
  launch.dynamic_shared_bytes = shared_bytes;
  launch.block_order_seed = 1;
  emulation::run(launch, [&] { kernel(arguments...); });
  return {};
}

#else

using LaunchStream = cudaStream_t;

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   size_t shared_bytes, LaunchStream stream, Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : std::string(name) + ": " + cudaGetErrorString(error);
}

#endif

}  // namespace kd::cuda
