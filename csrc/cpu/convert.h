// Elements of any type as what is computed with, and back (rounded to nearest, ties to even).
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

#if FASTRNN_VECTOR_BYTES == 16 && !defined(__aarch64__)
inline float half_to_float(uint16_t half) {
  const uint32_t exponent = half & 0x7c00, magnitude = (half & 0x7fffu) << 13;
  uint32_t bits;
  if (exponent == 0x7c00) {
    bits = magnitude | 0x7f800000;
  } else if (exponent == 0) {  // from an integer: no denormal float, which may be flushed to zero
    const float denormal = (half & 0x3ff) * 0x1p-24f;
    __builtin_memcpy(&bits, &denormal, sizeof(bits));
  } else {
    bits = magnitude + (112u << 23);  // the difference of the exponents' biases
  }
  bits |= (half & 0x8000u) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x3ff);
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;  // whose last bit is 2^-24: the addition rounds
    __builtin_memcpy(&bits, &magnitude, sizeof(bits));
    return sign | (bits - 0x3f000000);
  }
  return sign | (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
}
#endif

// load_as: the first `count` lanes of p; the others are zero and are not read.
// store_as: writes the first `count` lanes.
typedef uint16_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));

FASTRNN_INLINE Vec<float> widen(Words words, BFloat16*) {
  return (Vec<float>)(__builtin_convertvector(words, Bits<float>) << 16);
}

FASTRNN_INLINE Words narrow(Vec<float> v, BFloat16*) {
  using Unsigned = Vec<uint32_t>;
  const Unsigned bits = (Unsigned)v;
  const Unsigned rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : bits >> 16 | 0x40, Words);
}

FASTRNN_INLINE Vec<float> widen(Words words, Half*) {
#if FASTRNN_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)words);
#elif FASTRNN_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps((__m128i)words);
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16((float16x4_t)words);
#else
  Vec<float> v;
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = half_to_float(words[lane]);
  return v;
#endif
}

FASTRNN_INLINE Words narrow(Vec<float> v, Half*) {
#if FASTRNN_VECTOR_BYTES == 64
  return (Words)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FASTRNN_VECTOR_BYTES == 32
  return (Words)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Words)vcvt_f16_f32((float32x4_t)v);
#else
  Words words;
  for (int lane = 0; lane < kLanes<float>; ++lane) words[lane] = float_to_half(v[lane]);
  return words;
#endif
}

template <typename E>
FASTRNN_INLINE Words load_words(const E* p, int64_t count) {
  Words words{};
  if (count >= kLanes<float>) {
    __builtin_memcpy(&words, p, sizeof(words));
  } else {
#if FASTRNN_MASKS
    words = (Words)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
#else
    for (int64_t lane = 0; lane < count; ++lane) words[lane] = p[lane].bits;
#endif
  }
  return words;
}

// Writes the first `count` lanes.
template <typename E>
FASTRNN_INLINE void store_words(E* p, Words words, int64_t count) {
  if (count >= kLanes<float>) {
    __builtin_memcpy(p, &words, sizeof(words));
  } else {
#if FASTRNN_MASKS
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)words);
#else
    for (int64_t lane = 0; lane < count; ++lane) p[lane].bits = words[lane];
#endif
  }
}

template <typename E>
FASTRNN_INLINE Vec<Compute<E>> load_as(const E* p, int64_t count = kLanes<Compute<E>>) {
  if constexpr (kIsComputed<E>) {
    return load(reinterpret_cast<const Compute<E>*>(p), count);
  } else {
    return widen(load_words(p, count), (E*)nullptr);
  }
}

template <typename E>
FASTRNN_INLINE void store_as(E* p, Vec<Compute<E>> v, int64_t count = kLanes<Compute<E>>) {
  if constexpr (kIsComputed<E>) {
    store(reinterpret_cast<Compute<E>*>(p), v, count);
  } else {
    store_words(p, narrow(v, (E*)nullptr), count);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
