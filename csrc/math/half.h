// bfloat16 and float16 as bits, to and from float, in plain integer arithmetic that every compiler vectorises.
#pragma once

#include "math/elementary.h"

namespace kd::KD_ISA {

KD_INLINE float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7FFFu;
  // Rebias by multiplication, which also normalises subnormals.
  const float scaled = math::bit_cast<float>(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  const uint32_t finite = math::bit_cast<uint32_t>(scaled);
  const uint32_t special = (magnitude << 13) | 0x7F800000u;
  return math::bit_cast<float>(sign | (magnitude >= 0x7C00u ? special : finite));
}

KD_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return sign | 0x7E00u;
  if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                        // subnormal: let the adder round
    const float rounded = math::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(math::bit_cast<uint32_t>(rounded) - 0x3F000000u);
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xFFFu + odd) >> 13);
}

KD_INLINE float bfloat_to_float(uint16_t bits) { return math::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

KD_INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

}  // namespace kd::KD_ISA
