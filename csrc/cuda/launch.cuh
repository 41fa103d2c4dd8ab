// Launching a kernel, with the error that kept it from running.
#pragma once

#include <cstddef>
#include <string>

#include "cuda/platform.cuh"

namespace kd::cuda {

// Shared memory of every block that the system keeps to itself.
constexpr int64_t reserved_shared_bytes = 1 << 10;

// How many blocks: `x` by `y`; `cluster` of them, next to each other along x, may read each other's shared memory.
struct Grid {
  unsigned x;
  unsigned y = 1;
  unsigned cluster = 1;
  Grid(unsigned x, unsigned y = 1, unsigned cluster = 1) : x(x), y(y), cluster(cluster) {}
};

#if defined(KD_EMULATED)

using LaunchStream = void*;

// A small device, so that tests see rows shared by blocks.
inline int multiprocessors() { return 8; }
inline bool has_clusters() { return emulation::device().clusters; }
inline int64_t most_shared_bytes() { return emulation::device().most_shared_bytes; }

template <class Kernel>
std::string allow_all_shared_bytes(const char*, Kernel*, int64_t) {
  return {};
}

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), Grid grid, unsigned threads, size_t shared_bytes,
                   LaunchStream, Arguments... arguments) {
  emulation::Launch launch;
  launch.kernel = name;
  launch.grid = {grid.x, grid.y, 1};
  launch.cluster = grid.cluster;
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
      return "; this build has no kernels for the device: build with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=native, "
             "or use backend='triton'";
    case cudaErrorInsufficientDriver:
      return "; update the driver, build with an older toolkit, or use backend='triton'";
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidConfiguration:
      return "; the device grants less shared memory or fewer registers than the kernel takes: use backend='triton' or "
             "'reference'";
    default: return "; an earlier kernel may be at fault (CUDA_LAUNCH_BLOCKING=1 finds it), or use backend='reference'";
  }
}

inline int attribute_of_current_device(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessors() { return attribute_of_current_device(cudaDevAttrMultiProcessorCount, 1); }
inline bool has_clusters() { return attribute_of_current_device(cudaDevAttrClusterLaunch, 0) != 0; }

// Shared memory that a block can have on the current device.
inline int64_t most_shared_bytes() {
  return attribute_of_current_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10);
}

// Lets a kernel have all of it besides what it declares; more than 48 KiB must be asked for. Always all: another thread may be
// about to launch the kernel with more than this one will.
template <class Kernel>
std::string allow_all_shared_bytes(const char* name, Kernel* kernel, int64_t declared_bytes) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(most_shared_bytes() - declared_bytes));
  return error == cudaSuccess ? std::string() : std::string(name) + ": " + cudaGetErrorString(error) + way_out(error);
}

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), Grid grid, unsigned threads, size_t shared_bytes,
                   LaunchStream stream, Arguments... arguments) {
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(grid.x, grid.y);
  launch.blockDim = dim3(threads);
  launch.dynamicSmemBytes = shared_bytes;
  launch.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launch.attrs = &cluster;
  launch.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&launch, kernel, static_cast<Parameters>(arguments)...);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it has been told
  return std::string(name) + ": " + cudaGetErrorString(error) + way_out(error);
}

#endif

}  // namespace kd::cuda
