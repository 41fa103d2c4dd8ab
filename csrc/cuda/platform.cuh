// What the kernels share: shared memory, atomics on it and launches, as nvcc and the emulator on the host take them.
#pragma once

#include "math/elementary.h"

namespace kd::cuda {

constexpr unsigned full_warp = 0xFFFFFFFFu;
constexpr int warp_lanes = 32;

#if defined(KD_EMULATED)

template <class T>
using SharedView = emulation::Shared<T>;

// Declares shared memory for `elements` values. The address of a static stands for the declaration.
#define KD_SHARED(T, name, elements)     \
  static const char name##_declared = 0; \
  const ::kd::emulation::Shared<T> name( \
      ::kd::emulation::shared_array(&name##_declared, __LINE__, elements, sizeof(T)), __LINE__)

#define KD_DYNAMIC_SHARED(T, name) \
  const ::kd::emulation::Shared<T> name(::kd::emulation::dynamic_shared(__LINE__, sizeof(T)), __LINE__)

// The element of shared memory that an atomic changes.
#define KD_PLACE(element) (element)

// How many blocks are in this block's cluster, and which of them this one is. Devices before sm_90 have no clusters.
inline int cluster_blocks() { return emulation::cluster_size(); }
inline int cluster_rank() { return emulation::cluster_rank(); }
#define KD_SYNC_CLUSTER() ::kd::emulation::sync_cluster(__LINE__)

// What goes to and from rows in memory goes this way: the emulator counts its bytes.
template <class T>
T read_memory(const T* address) {
  emulation::count_loaded(sizeof(T));
  return *address;
}

template <class T>
void write_memory(T* address, T value) {
  emulation::count_stored(sizeof(T));
  *address = value;
}

// An element of the same shared array in another block of the cluster.
template <class T, class Integer>
T of_peer(const SharedView<T>& shared, int rank, Integer index) {
  return shared.of_peer(rank, index);
}

#else

template <class T>
using SharedView = T*;

#define KD_SHARED(T, name, elements) __shared__ T name[elements]

#define KD_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)

#define KD_PLACE(element) (&(element))

template <class T>
__device__ __forceinline__ T read_memory(const T* address) {
  return *address;
}

template <class T>
__device__ __forceinline__ void write_memory(T* address, T value) {
  *address = value;
}

__device__ __forceinline__ int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  int blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return blocks;
#else
  return 1;
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}
#define KD_SYNC_CLUSTER() ::kd::cuda::sync_cluster()

template <class T, class Integer>
__device__ __forceinline__ T of_peer(T* shared, int rank, Integer index) {
#if __CUDA_ARCH__ >= 900
  const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(shared + index));
  unsigned theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(rank));
  T value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(theirs) : "memory");
  } else {
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(theirs) : "memory");
  }
  return value;
#else
  (void)rank;
  return shared[index];
#endif
}

#endif

}  // namespace kd::cuda
