// Vectors of one instruction set. A kernel source is compiled once for each set, with its flags,
// and everything in it lives in that set's namespace (FASTRNN_ISA), so that no function compiled
// for one processor can be linked in place of another's.
#pragma once

#include <cstdint>

#include "../cell_math.h"
#include "element.h"

#if defined(FASTRNN_AMX_FP16)
#include <immintrin.h>
#define FASTRNN_ISA amx_fp16
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AMX_BF16__)
#include <immintrin.h>
#define FASTRNN_ISA amx
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX512BF16__)
#include <immintrin.h>
#define FASTRNN_ISA avx512_bf16
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX512F__)
#include <immintrin.h>
#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
#endif

// Vectors that the processor's registers hold.
#if FASTRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
#define FASTRNN_REGISTERS 32
#else
#define FASTRNN_REGISTERS 16
#endif

// The types of elements that this instruction set has kernels for.
#if defined(FASTRNN_AMX_FP16)
#define FASTRNN_FOR_ELEMENTS(F) F(Half)
#elif defined(__AMX_BF16__)
#define FASTRNN_FOR_ELEMENTS(F) F(BFloat16) F(Half) F(HighFloat) F(MediumFloat)
#elif defined(__AVX512BF16__)
#define FASTRNN_FOR_ELEMENTS(F) F(BFloat16) F(MediumFloat)
#else
#define FASTRNN_FOR_ELEMENTS(F) F(float) F(double) F(Half) F(BFloat16)
#endif

// A sanitizer does not see what a masked instruction reads and writes: under one, parts of vectors
// are accessed lane by lane.
#if FASTRNN_VECTOR_BYTES == 64 && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTRNN_MASKS 1
#else
#define FASTRNN_MASKS 0
#endif

namespace fastrnn::FASTRNN_ISA {

template <typename T>
constexpr int kLanes = FASTRNN_VECTOR_BYTES / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

// The signed integer vector of the same lane width, for masks and exponent bits.
template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using scalar = int32_t;
};
template <>
struct BitsOf<double> {
  using scalar = int64_t;
};
template <typename T>
using Bits = Vec<typename BitsOf<T>::scalar>;

template <typename T>
FASTRNN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FASTRNN_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
FASTRNN_INLINE Vec<T> broadcast(T x) {
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_set1_ps(x);  // keeps every bit: x may be two bfloat16
  } else {
    return (Vec<T>)_mm512_set1_pd(x);
  }
#else
  return x - Vec<T>{};  // the compiler's splat: x - 0 is x for every x, -0 and NaN included
#endif
}

// a * b + c, rounded once where the instruction set can.
template <typename T>
FASTRNN_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (Vec<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif FASTRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (Vec<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else {
    return (Vec<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
#else
  return a * b + c;
#endif
}

// The smaller of both, x where that is NaN. The intrinsics without a mask make GCC 12 warn.
template <typename T>
FASTRNN_INLINE Vec<T> min(Vec<T> limit, Vec<T> x) {
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)limit, (__m512)x);
  } else {
    return (Vec<T>)_mm512_maskz_min_pd(0xff, (__m512d)limit, (__m512d)x);
  }
#elif FASTRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_min_ps((__m256)limit, (__m256)x);
  } else {
    return (Vec<T>)_mm256_min_pd((__m256d)limit, (__m256d)x);
  }
#else
  return limit < x ? limit : x;
#endif
}

// The first `count` lanes of p (0 <= count <= kLanes); the others are zero and are not read.
template <typename T>
FASTRNN_INLINE Vec<T> load(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
#if FASTRNN_MASKS
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
  }
#else
  Vec<T> v{};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
#endif
}

// Writes the first `count` lanes (0 <= count <= kLanes).
template <typename T>
FASTRNN_INLINE void store(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) {
    store(p, v);
    return;
  }
#if FASTRNN_MASKS
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
  }
#else
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

// Elements J of those of a and then of b.
template <int... J, typename V>
FASTRNN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){J...});
#endif
}

}  // namespace fastrnn::FASTRNN_ISA
