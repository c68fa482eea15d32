// The emulator's cuda_fp16.h: float16 as stored, and its conversions.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1fu, fraction = x.bits & 0x3ffu;
  uint32_t bits;
  float value;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
  } else if (exponent == 31) {
    bits = 0x7f800000u | fraction << 13;
  } else {
    bits = (exponent + 127 - 15) << 23 | fraction << 13;
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even.
inline __half __float2half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};  // NaN, as CUDA writes it
  uint32_t half;
  if (bits >= 0x477ff000u) {  // rounds to 2^16 or is beyond
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: in units of 2^-24, rounded as floats round
    half = static_cast<uint32_t>(lrintf(fabsf(x) * 0x1p24f));
  } else {
    half = (bits + 0xfffu + (bits >> 13 & 1)) >> 13;
    half -= (127 - 15) << 10;
  }
  return {static_cast<uint16_t>(sign | half)};
}
inline __half __float2half_rn(float x) { return __float2half(x); }
