#include "testing/faulty_kernels.h"

#include <array>

#include "cuda/launch.cuh"
#include "cuda/reductions.cuh"

namespace kd::emulation {
namespace {

using cuda::full_warp;

constexpr int threads = 64;

__global__ void sum(float* out) {
  KD_SHARED(float, scratch, 32);
  KD_SHARED(int, count, 1);
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(KD_PLACE(count[0]), 1);
  const float total = cuda::BlockSums<float>{scratch}.total(static_cast<float>(threadIdx.x));
  out[threadIdx.x] = total == threads * (threads - 1) / 2 && count[0] == threads ? 1.f : 0.f;
}

__global__ void race(float* out) {
  KD_SHARED(float, shared, threads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x < 32) shared[threadIdx.x] = 2;
  if (threadIdx.x >= 32) out[threadIdx.x] = shared[threadIdx.x - 32];
}

__global__ void overwritten(float* out) {
  KD_SHARED(float, shared, threads);
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x < 32) out[threadIdx.x] = shared[threadIdx.x + 32];
  if (threadIdx.x >= 32) shared[threadIdx.x] = 2;
}

__global__ void out_of_bounds(float* out) {
  KD_SHARED(float, shared, threads);
  shared[threadIdx.x + 1] = 1;
  out[0] = 1;
}

__global__ void unwritten(float* out) {
  KD_SHARED(float, shared, threads);
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[0] = 1;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[0] = 1;
}

__global__ void incomplete_shuffle(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 2) value = __shfl_xor_sync(full_warp, value, 1);
  out[0] = value;
}

struct Named {
  const char* name;
  void (*kernel)(float*);
};

constexpr Named all[] = {
    {"sum", sum},
    {"race", race},
    {"overwritten", overwritten},
    {"out_of_bounds", out_of_bounds},
    {"unwritten", unwritten},
    {"divergent_barrier", divergent_barrier},
    {"two_barriers", two_barriers},
    {"incomplete_shuffle", incomplete_shuffle},
};

}  // namespace

std::vector<std::string> faulty_kernels() {
  std::vector<std::string> names;
  for (const Named& one : all) names.push_back(one.name);
  return names;
}

std::string run_faulty(const std::string& name) {
  for (const Named& one : all) {
    if (one.name != name) continue;
    std::array<float, threads> out{};
    try {
      cuda::launch(one.name, one.kernel, 2, threads, 0, nullptr, out.data());
    } catch (const Fault& fault) {
      return fault.what();
    }
    for (const float value : out)
      if (value != 1) return "a wrong result";
    return "";
  }
  return "no such kernel";
}

}  // namespace kd::emulation
