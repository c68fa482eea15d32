// Vectors of one instruction set. A kernel source is compiled once for each set, with its flags,
// and everything in it lives in that set's namespace (FASTRNN_ISA), so that no function compiled
// for one processor can be linked in place of another's.
#pragma once

#include <cstdint>
#include <utility>

#include "../cell_math.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#else
#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
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
  return x - Vec<T>{};  // the compiler's splat: x - 0 is x for every x, -0 and NaN included
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
#else
  return a * b + c;
#endif
}

// The first `count` lanes of p (0 <= count <= kLanes); the others are zero and are not read.
template <typename T>
FASTRNN_INLINE Vec<T> load(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
#if FASTRNN_VECTOR_BYTES == 64
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
#if FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
  }
#else
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

// One stage of a transposition: swaps the lanes of a that have bit S set with the lanes of b that
// have it clear.
template <int S, typename T, int... J>
FASTRNN_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, J...>) {
  constexpr int L = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((J & S) ? L + J - S : J)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((J & S) ? L + J : J + S)...);
  a = low;
  b = high;
}

// Transposes the kLanes x kLanes square held in rows, in registers.
template <typename T, int S = 1>
FASTRNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  if constexpr (S < L) {
    for (int i = 0; i < L; ++i) {
      if (!(i & S)) exchange<S, T>(rows[i], rows[i + S], std::make_integer_sequence<int, L>{});
    }
    transpose<T, 2 * S>(rows);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
