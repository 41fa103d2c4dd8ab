// What differs between the compilers that read csrc/math: inlining, and the namespace that keeps
// code built for different instruction sets apart.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

// Every instruction set compiles its own copy. Without a namespace of its own the linker would
// keep one copy of each inline function, perhaps one this processor cannot run.
#ifndef KD_ISA
#define KD_ISA portable
#endif
