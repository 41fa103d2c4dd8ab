// What a .cu source needs of CUDA, on the host: included before it by the compiler's command line when the emulator runs it.
#pragma once

#include <cstring>

#include "testing/block_emulator.h"

#define KD_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (::kd::emulation::thread_index())
#define blockIdx (::kd::emulation::block_index())
#define blockDim (::kd::emulation::block_extent())
#define gridDim (::kd::emulation::grid_extent())

#define __syncthreads() ::kd::emulation::sync_threads(__LINE__)

namespace kd::emulation {

template <class T>
uint64_t as_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffled(int line, unsigned mask, T value, int source) {
  const uint64_t* given = exchange(line, mask, Exchange::shuffle, as_bits(value));
  if (source < 0 || source >= warp_size || !(mask >> source & 1))
    fault(line, "a shuffle reads lane " + std::to_string(source) + ", which takes no part in it");
  return from_bits<T>(given[source]);
}

inline unsigned ballot(int line, unsigned mask, bool vote) {
  const uint64_t* given = exchange(line, mask, Exchange::vote, vote);
  unsigned votes = 0;
  for (int i = 0; i < warp_size; ++i)
    if (mask >> i & 1) votes |= static_cast<unsigned>(given[i] & 1) << i;
  return votes;
}

// Where a lane has no partner it keeps its own value, as on the GPU.
inline int lane_or_own(int source) { return source < 0 || source >= warp_size ? lane() : source; }

template <class T>
T atomic_change(T* place, T value, T (*combine)(T, T)) {
  const T old = *place;
  *place = combine(old, value);
  return old;
}

template <class T>
T atomic_change(SharedElement<T> place, T value, T (*combine)(T, T)) {
  return place.change([&](T old) { return combine(old, value); });
}

}  // namespace kd::emulation

#define __shfl_sync(mask, value, source) ::kd::emulation::shuffled(__LINE__, mask, value, source)
#define __shfl_xor_sync(mask, value, bits) \
  ::kd::emulation::shuffled(__LINE__, mask, value, ::kd::emulation::lane() ^ (bits))
#define __shfl_down_sync(mask, value, distance)    \
  ::kd::emulation::shuffled(__LINE__, mask, value, \
                            ::kd::emulation::lane_or_own(::kd::emulation::lane() + int(distance)))
#define __shfl_up_sync(mask, value, distance)      \
  ::kd::emulation::shuffled(__LINE__, mask, value, \
                            ::kd::emulation::lane_or_own(::kd::emulation::lane() - int(distance)))
#define __ballot_sync(mask, vote) ::kd::emulation::ballot(__LINE__, mask, vote)
#define __any_sync(mask, vote) (::kd::emulation::ballot(__LINE__, mask, vote) != 0)
#define __all_sync(mask, vote) (::kd::emulation::ballot(__LINE__, mask, vote) == (mask))
#define __syncwarp(...) ((void)::kd::emulation::exchange(__LINE__, 0xFFFFFFFFu, ::kd::emulation::Exchange::barrier, 0))

#define __popc(x) __builtin_popcount(x)
#define __ffs(x) __builtin_ffs(static_cast<int>(x))
#define __clz(x) ((x) ? __builtin_clz(static_cast<unsigned>(x)) : 32)

template <class Place, class T>
T atomicAdd(Place place, T value) {
  return kd::emulation::atomic_change<T>(place, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class Place, class T>
T atomicMax(Place place, T value) {
  return kd::emulation::atomic_change<T>(place, value, [](T a, T b) { return a > b ? a : b; });
}
template <class Place, class T>
T atomicMin(Place place, T value) {
  return kd::emulation::atomic_change<T>(place, value, [](T a, T b) { return a < b ? a : b; });
}
template <class Place, class T>
T atomicOr(Place place, T value) {
  return kd::emulation::atomic_change<T>(place, value, [](T a, T b) { return static_cast<T>(a | b); });
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

using cudaStream_t = void*;
