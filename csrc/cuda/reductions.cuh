// Sums and online softmax states over the threads of a block, in a fixed order: results repeat bit by bit.
#pragma once

#include "cuda/platform.cuh"

namespace kd::cuda {

// The maximum of what has been seen, and the sum of 2^((x - max) * scale).
template <class Real>
struct Online {
  Real max;
  Real sum;
};

// `a` and `b` as one state: the shifts say by which powers of two what was relative to them falls.
template <class Real>
__device__ __forceinline__ Real merged_max(Real a, Real b) {
  return a > b || a != a ? a : b;
}

template <class Real>
__device__ __forceinline__ Online<Real> merged(Online<Real> a, Online<Real> b, Real scale) {
  const Real max = merged_max(a.max, b.max);
  return {max, a.sum * KD_ISA::math::exp2((a.max - max) * scale) + b.sum * KD_ISA::math::exp2((b.max - max) * scale)};
}

// The combination of a value of every lane of a warp, known to all of them.
template <class Value, class Combine>
__device__ __forceinline__ Value over_warp(Value value, Combine combine) {
  for (int distance = warp_lanes / 2; distance; distance /= 2)
    value = combine(value, combine.shuffled(value, distance));
  return value;
}

// The combination of a value of every thread, known to all of them. `scratch` holds one value per warp, and is free again
// after the next block barrier. The number of threads is a multiple of 32.
template <class Value, class Combine>
__device__ __forceinline__ Value over_block(Value value, SharedView<Value> scratch, Combine combine) {
  value = over_warp(value, combine);
  const int warps = static_cast<int>(blockDim.x) / warp_lanes;
  if (warps == 1) return value;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread % warp_lanes == 0) scratch[thread / warp_lanes] = value;
  __syncthreads();
  Value total = scratch[0];
  for (int i = 1; i < warps; ++i) total = combine(total, static_cast<Value>(scratch[i]));
  return total;
}

template <class Real>
struct Largest {
  __device__ __forceinline__ Real operator()(Real a, Real b) const { return merged_max(a, b); }
  __device__ __forceinline__ Real shuffled(Real value, int distance) const {
    return __shfl_xor_sync(full_warp, value, distance);
  }
};

template <class Real>
struct Add {
  __device__ __forceinline__ Real operator()(Real a, Real b) const { return a + b; }
  __device__ __forceinline__ Real shuffled(Real value, int distance) const {
    return __shfl_xor_sync(full_warp, value, distance);
  }
};

// Maxima and sums over a block, one after the other.
template <class Real>
struct BlockSums {
  SharedView<Real> scratch;

  __device__ __forceinline__ Real max(Real own) const { return combined(own, Largest<Real>{}); }
  __device__ __forceinline__ Real total(Real own) const { return combined(own, Add<Real>{}); }

 private:
  template <class Combine>
  __device__ __forceinline__ Real combined(Real own, Combine combine) const {
    const Real found = over_block(own, scratch, combine);
    __syncthreads();  // scratch is free again
    return found;
  }
};

// The sum of the values of a warp's lanes up to this one.
template <class Value>
__device__ __forceinline__ Value sum_up_to_lane(Value value) {
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  for (int distance = 1; distance < warp_lanes; distance *= 2) {
    const Value lower = __shfl_up_sync(full_warp, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

// The sum of the values of a block's threads up to this one. `scratch` holds one value per warp, and is free again after the
// next block barrier.
template <class Value>
__device__ __forceinline__ Value sum_up_to_thread(Value value, SharedView<Value> scratch) {
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes;
  value = sum_up_to_lane(value);
  if (static_cast<int>(threadIdx.x) % warp_lanes == warp_lanes - 1) scratch[warp] = value;
  __syncthreads();
  Value before = 0;
  for (int i = 0; i < warp; ++i) before += scratch[i];
  return before + value;
}

// The same of up to `most` numbers at once, over the blocks of a cluster, which share a row: through each other's shared memory,
// in the order of their ranks.
template <class Real, int most>
struct ClusterSums {
  static constexpr int scratch_elements = most * warp_lanes;
  SharedView<Real> scratch;
  SharedView<Real> published;  // `most` elements

  template <int count>
  __device__ __forceinline__ void max(Real (&numbers)[count]) const {
    combine(numbers, Largest<Real>{});
  }
  template <int count>
  __device__ __forceinline__ void total(Real (&numbers)[count]) const {
    combine(numbers, Add<Real>{});
  }

 private:
  template <int count, class Combine>
  __device__ __forceinline__ void combine(Real (&numbers)[count], Combine combine) const {
    static_assert(count <= most);
#pragma unroll
    for (int i = 0; i < count; ++i) numbers[i] = over_block(numbers[i], scratch + i * warp_lanes, combine);
    const int blocks = cluster_blocks();
    if (blocks == 1) {
      __syncthreads();  // scratch is free again
      return;
    }
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < count; ++i) published[i] = numbers[i];
    }
    KD_SYNC_CLUSTER();
#pragma unroll
    for (int i = 0; i < count; ++i) {
      numbers[i] = of_peer(published, 0, i);
      for (int rank = 1; rank < blocks; ++rank) numbers[i] = combine(numbers[i], of_peer(published, rank, i));
    }
    KD_SYNC_CLUSTER();  // all have read them
  }
};

}  // namespace kd::cuda
