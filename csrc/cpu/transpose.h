// Squares of weights transposed in registers, a quarter of a vector (128 bits) at a time.
#pragma once

#include <utility>

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// The elements of a and b in turn, from the lower (half = 0) or the upper half of each 128 bits.
template <int half, typename T, int... J>
FASTRNN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, J...>) {
  constexpr int L = kLanes<T>, E = 16 / sizeof(T);
  return shuffle<(J / E * E + J % E / 2 + half * E / 2 + J % 2 * L)...>(a, b);
}
template <int half, typename T>
FASTRNN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return interleave<half, T>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

#if FASTRNN_VECTOR_BYTES < 64
// 128 bits each from p and p + stride, or as many of the two as a vector holds.
template <typename T>
FASTRNN_INLINE Vec<T> load_quarters(const T* p, [[maybe_unused]] int64_t stride) {
#if FASTRNN_VECTOR_BYTES == 32
  return (Vec<T>)_mm256_loadu2_m128((const float*)(p + stride), (const float*)p);
#else
  return load(p);
#endif
}
#endif

// 256 bits of what elements are computed in.
#if FASTRNN_VECTOR_BYTES >= 32
FASTRNN_INLINE __m256 load_two_quarters(const float* p) { return _mm256_loadu_ps(p); }
FASTRNN_INLINE __m256 load_two_quarters(const double* p) {
  return _mm256_loadu_ps((const float*)p);
}
FASTRNN_INLINE __m256 load_two_quarters(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FASTRNN_INLINE __m256 load_two_quarters(const BFloat16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
#endif

// Whether load_quarter_pairs takes elements of type E.
template <typename E>
constexpr bool kLoadsQuarters = kIsComputed<E> || FASTRNN_VECTOR_BYTES >= 32;

// 128 bits of elements as they are computed with, each from p, p + stride, p + 2 stride, ..., as
// many as a vector holds; and those that follow each quarter in pair[1].
template <typename E>
FASTRNN_INLINE void load_quarter_pairs(Vec<Compute<E>> (&pair)[2], const E* p,
                                       [[maybe_unused]] int64_t stride) {
#if FASTRNN_VECTOR_BYTES >= 32
  using V = Vec<Compute<E>>;
  const auto row = [&](int i) { return load_two_quarters(p + i * stride); };
#endif
#if FASTRNN_VECTOR_BYTES == 64
  const __m512 rows01 = _mm512_insertf32x8(_mm512_castps256_ps512(row(0)), row(1), 1);
  const __m512 rows23 = _mm512_insertf32x8(_mm512_castps256_ps512(row(2)), row(3), 1);
  pair[0] = (V)_mm512_maskz_shuffle_f32x4(0xffff, rows01, rows23, 0x88);
  pair[1] = (V)_mm512_maskz_shuffle_f32x4(0xffff, rows01, rows23, 0xdd);
#elif FASTRNN_VECTOR_BYTES == 32
  const __m256 row0 = row(0), row1 = row(1);
  pair[0] = (V)_mm256_permute2f128_ps(row0, row1, 0x20);
  pair[1] = (V)_mm256_permute2f128_ps(row0, row1, 0x31);
#else
  for (int i = 0; i < 2; ++i) pair[i] = load_quarters(p + i * (16 / sizeof(E)), stride);
#endif
}

// The 128 bits at p in every quarter of a vector.
template <typename T>
FASTRNN_INLINE Vec<T> broadcast_quarter(const T* p) {
#if FASTRNN_VECTOR_BYTES == 64
  return (Vec<T>)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps((const float*)p));
#elif FASTRNN_VECTOR_BYTES == 32
  return load_quarters(p, 0);
#else
  return load(p);
#endif
}

// Transposes the squares that the quarters of as many vectors as a quarter has elements make: of
// rows i, i + E, i + 2 E, ... in vector i, out[e] has column e of all rows, in order.
template <typename T>
FASTRNN_INLINE void transpose_quarters(Vec<T>* out, const Vec<T>* in) {
  if constexpr (sizeof(T) == 8) {
    out[0] = interleave<0, T>(in[0], in[1]);
    out[1] = interleave<1, T>(in[0], in[1]);
  } else {
    using Pair = Vec<double>;
    const Pair low0 = (Pair)interleave<0, T>(in[0], in[1]);
    const Pair low1 = (Pair)interleave<0, T>(in[2], in[3]);
    const Pair high0 = (Pair)interleave<1, T>(in[0], in[1]);
    const Pair high1 = (Pair)interleave<1, T>(in[2], in[3]);
    out[0] = (Vec<T>)interleave<0, double>(low0, low1);
    out[1] = (Vec<T>)interleave<1, double>(low0, low1);
    out[2] = (Vec<T>)interleave<0, double>(high0, high1);
    out[3] = (Vec<T>)interleave<1, double>(high0, high1);
  }
}

// Reads a square of lanes x lanes elements, rows ldw apart, as they are computed with, transposed:
// square[j] is column j. Loading quarters of rows into their places leaves only exchanges within
// 128 bits to do.
template <typename E>
FASTRNN_INLINE void load_transposed(Vec<Compute<E>> (&square)[kLanes<Compute<E>>], const E* p,
                                    int64_t ldw) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>, Q = 16 / sizeof(C);
  if constexpr (FASTRNN_VECTOR_BYTES == 64 || !kIsComputed<E>) {
    for (int column = 0; column < L; column += 2 * Q) {
      Vec<C> parts[2][Q];
      for (int i = 0; i < Q; ++i) {
        Vec<C> pair[2];
        load_quarter_pairs(pair, p + i * ldw + column, Q * ldw);
        for (int half = 0; half < 2; ++half) parts[half][i] = pair[half];
      }
      for (int half = 0; half < 2; ++half) {
        transpose_quarters<C>(square + column + half * Q, parts[half]);
      }
    }
  } else {
    // Row after row, so that a cache line is read once: where ldw is a multiple of 4 KB, all the
    // rows' lines fall into one set of the L1 cache, and there is no room for them together.
    Vec<C> parts[Q][L / Q];
    for (int i = 0; i < Q; ++i) {
      for (int c = 0; c < L / Q; ++c) parts[i][c] = load_quarters(p + i * ldw + c * Q, Q * ldw);
    }
    for (int column = 0; column < L; column += Q) {
      Vec<C> row[Q];
      for (int i = 0; i < Q; ++i) row[i] = parts[i][column / Q];
      transpose_quarters<C>(square + column, row);
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
