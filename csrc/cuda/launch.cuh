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

// What the user can do about an error.
inline std::string way_out(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return "; this build has no kernels for the device: build with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native, or "
             "use "
             "backend='triton'";
    case cudaErrorInsufficientDriver:
      return "; update the driver, build with an older toolkit, or use backend='triton'";
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidConfiguration:
      return "; the device grants less shared memory or fewer registers than the kernel takes: use backend='triton' or "
             "'reference'";
    default: return "; an earlier kernel may be at fault (CUDA_LAUNCH_BLOCKING=1 finds it), or use backend='reference'";
  }
}

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   size_t shared_bytes, LaunchStream stream, Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? std::string() : std::string(name) + ": " + cudaGetErrorString(error) + way_out(error);
}

#endif

}  // namespace kd::cuda
