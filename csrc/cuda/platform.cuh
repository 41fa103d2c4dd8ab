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

#else

template <class T>
using SharedView = T*;

#define KD_SHARED(T, name, elements) __shared__ T name[elements]

#define KD_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)

#define KD_PLACE(element) (&(element))

#endif

}  // namespace kd::cuda
