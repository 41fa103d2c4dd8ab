// A thread's scratch memory, cut up.
#pragma once

#include <cstdint>

#include "math/platform.h"

namespace kd::KD_ISA {

// Memory handed out in pieces.
struct Arena {
  uintptr_t next;

  template <class T>
  T* take(int64_t count) {
    const uintptr_t piece = next;
    next += (static_cast<uintptr_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};

}  // namespace kd::KD_ISA
