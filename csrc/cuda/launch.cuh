// Launching a kernel, with the error that kept it from running.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/platform.cuh"

namespace kd::cuda {

#if defined(KD_EMULATED)

using LaunchStream = void*;

inline int64_t most_shared_bytes() { return 48 << 10; }

template <class Kernel>
std::string allow_shared_bytes(const char*, Kernel*, int64_t) {
  return {};
}

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

// Shared memory that a block can have on the current device.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Lets a kernel have that much of it besides what it declares; more than 48 KiB in all must be asked for.
template <class Kernel>
std::string allow_shared_bytes(const char* name, Kernel* kernel, int64_t bytes) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  return error == cudaSuccess ? std::string() : std::string(name) + ": " + cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   size_t shared_bytes, LaunchStream stream, Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : std::string(name) + ": " + cudaGetErrorString(error);
}

#endif

}  // namespace kd::cuda
