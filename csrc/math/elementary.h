// exp2 and log as short polynomials that a compiler can vectorise.
//
// The coefficients are minimax fits (Remez exchange) on the reduced ranges; the largest relative
// errors of the polynomials alone are 2e-9 (exp2, float), 4e-8 (log, float), 4e-9 (log_of_ratio, float), 1e-16 (double).
#pragma once

#include "math/platform.h"

namespace kd::KD_ISA::math {

template <class To, class From>
KD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// 2^x for x <= 127. Underflows to 0 below -126, so it never returns a subnormal. NaN stays NaN.
KD_INLINE float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float hardware;  // relative error 2^-22
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(hardware) : "f"(x));
  return hardware;
#else
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float shifted = x + round_to_int;
  const float r = x - (shifted - round_to_int);
  float poly = 0.000153531538816f;
  poly = poly * r + 0.00133991325325f;
  poly = poly * r + 0.00961843984802f;
  poly = poly * r + 0.0555033185415f;
  poly = poly * r + 0.240226478801f;
  poly = poly * r + 0.693147203115f;
  poly = poly * r + 1.0f;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
  const float value = poly * scale;
  return x < -126.0f ? 0.0f : value;
#endif
}

// 2^x for x <= 1023; 0 below -1022.
KD_INLINE double exp2(double x) {
  const double round_to_int = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x + round_to_int;
  const double r = x - (shifted - round_to_int);
  double poly = 2.5738054701572589223e-11;
  poly = poly * r + 4.4558592148388655567e-10;
  poly = poly * r + 7.054891303873064532e-9;
  poly = poly * r + 1.0178056854863131129e-7;
  poly = poly * r + 1.3215486823701270114e-6;
  poly = poly * r + 0.000015252733842010623592;
  poly = poly * r + 0.00015403530393354337471;
  poly = poly * r + 0.0013333558146406115273;
  poly = poly * r + 0.0096181291076284868098;
  poly = poly * r + 0.055504108664821627994;
  poly = poly * r + 0.24022650695910071223;
  poly = poly * r + 0.69314718055994530925;
  poly = poly * r + 1.0;
  const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) << 52) + 0x3FF0000000000000ull);
  const double value = poly * scale;
  return x < -1022.0 ? 0.0 : value;
}

template <class Real>
KD_INLINE Real exp(Real x) {
  return exp2(x * Real(1.4426950408889634074));
}

// log(x) for normal x > 0. NaN stays NaN.
KD_INLINE float log(float x) {
#if defined(__CUDA_ARCH__)
  float hardware;  // log2; absolute error 2^-22 near 1, else relative
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(hardware) : "f"(x));
  return hardware * 0.69314718056f;
#else
  const int32_t bits = bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3F2AAAAB) & static_cast<int32_t>(0xFF800000);  // mantissa in [2/3, 4/3)
  const float f = bit_cast<float>(bits - exponent) - 1.0f;
  const float n = static_cast<float>(exponent) * 1.1920928955078125e-7f;  // 2^-23
  float poly = 0.142273013982f;
  poly = poly * f - 0.151245918113f;
  poly = poly * f + 0.139580022871f;
  poly = poly * f - 0.16471908811f;
  poly = poly * f + 0.200130894372f;
  poly = poly * f - 0.250042549748f;
  poly = poly * f + 0.333331799474f;
  const float f2 = f * f;
  const float value = n * 0.69314718056f + ((poly * f) * f2 + (f - 0.5f * f2));
  return x != x ? x : value;
#endif
}

KD_INLINE double log(double x) {
  const uint64_t bits = bit_cast<uint64_t>(x);
  const uint64_t biased = bits - 0x3FE5555555555555ull;  // mantissa in [2/3, 4/3)
  const uint64_t exponent = biased & 0xFFF0000000000000ull;
  const double m = bit_cast<double>(bits - exponent);
  // n + 2048 as an unsigned integer, turned into a double by its bit pattern.
  const uint64_t n_bits = ((biased + 0x8000000000000000ull) >> 52) | 0x4330000000000000ull;
  const double n = bit_cast<double>(n_bits) - (4503599627370496.0 + 2048.0);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double poly = 0.063209592806628056426;
  poly = poly * z + 0.057896722008014938352;
  poly = poly * z + 0.066710753620201575106;
  poly = poly * z + 0.076921822149938003199;
  poly = poly * z + 0.09090911283227209061;
  poly = poly * z + 0.11111111088023213324;
  poly = poly * z + 0.14285714285851667446;
  poly = poly * z + 0.19999999999999599502;
  poly = poly * z + 0.33333333333333333735;
  const double value = n * 0.69314718055994530942 + 2.0 * (s + s * z * poly);
  return x != x ? x : value;
}

// log((1 + s) / (1 - s)) = 2 atanh(s) for |s| <= 1/3. With s = u / (2 + u) it is log(1 + u) for -1/2 <= u <= 1, with all
// digits however small u is.
KD_INLINE float log_of_ratio(float s) {
  const float z = s * s;
  float poly = 0.281577783632f;
  poly = poly * z + 0.279651576508f;
  poly = poly * z + 0.400245952308f;
  poly = poly * z + 0.666663216414f;
  poly = poly * z + 2.00000000768f;
  return poly * s;
}

KD_INLINE double log_of_ratio(double s) {
  const double z = s * s;
  double poly = 0.17044163562781398129;
  poly = poly * z + 0.083245065118608205757;
  poly = poly * z + 0.12110168728069217655;
  poly = poly * z + 0.13300374032674624337;
  poly = poly * z + 0.15386614042304007762;
  poly = poly * z + 0.1818174083250480451;
  poly = poly * z + 0.22222224080747673173;
  poly = poly * z + 0.28571428545454114534;
  poly = poly * z + 0.40000000000185747468;
  poly = poly * z + 0.66666666666666149594;
  poly = poly * z + 2.0000000000000000024;
  return poly * s;
}

// tanh(x) for every x, accurate to a few ulp of the result: the quotient of exponentials cancels
// near zero, where an odd polynomial takes over.
template <class Real>
KD_INLINE Real tanh(Real x) {
  const Real limit = sizeof(Real) == 4 ? Real(20) : Real(40);
  const Real magnitude = x < Real(0) ? -x : x;
  const Real clamped = magnitude > limit ? limit : magnitude;
  const Real e = exp(Real(-2) * clamped);
  const Real far = (Real(1) - e) / (Real(1) + e);
  const Real value = x < Real(0) ? -far : far;
  if constexpr (sizeof(Real) == 4) {
    const Real z = x * x;
    Real poly = Real(0.00214733993397);
    poly = poly * z - Real(0.00818246698337);
    poly = poly * z + Real(0.0217028870163);
    poly = poly * z - Real(0.0539471903577);
    poly = poly * z + Real(0.133332096599);
    poly = poly * z - Real(0.333333309042);
    return magnitude < Real(0.625) ? x + (x * z) * poly : value;
  } else {
    return value;
  }
}

}  // namespace kd::KD_ISA::math
