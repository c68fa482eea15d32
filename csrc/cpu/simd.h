// Vectors of one instruction set. A kernel source is compiled once for each set, with its flags,
// and everything in it lives in that set's namespace (FASTRNN_ISA), so that no function compiled
// for one processor can be linked in place of another's.
#pragma once

#include <cstdint>
#include <utility>

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

// Elements of any type as what is computed with, and back (rounded to nearest, ties to even).
//
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

// Elements J of those of a and then of b.
template <int... J, typename V>
FASTRNN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, J...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){J...});
#endif
}

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

// 128 bits each from p, p + stride, p + 2 stride, ...: as many as a vector holds.
template <typename T>
FASTRNN_INLINE Vec<T> load_quarters(const T* p, [[maybe_unused]] int64_t stride) {
#if FASTRNN_VECTOR_BYTES == 64
  const auto quarter = [&](int i) { return _mm_loadu_ps((const float*)(p + i * stride)); };
  __m512 v = _mm512_castps128_ps512(quarter(0));
  v = _mm512_mask_broadcast_f32x4(v, 0x00f0, quarter(1));
  v = _mm512_mask_broadcast_f32x4(v, 0x0f00, quarter(2));
  v = _mm512_mask_broadcast_f32x4(v, 0xf000, quarter(3));
  return (Vec<T>)v;
#elif FASTRNN_VECTOR_BYTES == 32
  return (Vec<T>)_mm256_loadu2_m128((const float*)(p + stride), (const float*)p);
#else
  return load(p);
#endif
}

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

// As load_quarters of elements as they are computed with, and those that follow each quarter in
// pair[1]: fewer loads and less masking.
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

// Reads a square of lanes x lanes, rows ldw apart, transposed: square[j] is column j. Loading
// quarters of rows into their places leaves only exchanges within 128 bits to do.
template <typename T>
FASTRNN_INLINE void load_transposed(Vec<T> (&square)[kLanes<T>], const T* p, int64_t ldw) {
  constexpr int L = kLanes<T>, E = 16 / sizeof(T);
  // Row after row, so that a cache line is read once: where ldw is a multiple of 4 KB, all the
  // rows' lines fall into one set of the L1 cache, and there is no room for them together.
  Vec<T> parts[E][L / E];
  for (int i = 0; i < E; ++i) {
    for (int c = 0; c < L / E; ++c) parts[i][c] = load_quarters(p + i * ldw + c * E, E * ldw);
  }
  for (int column = 0; column < L; column += E) {
    Vec<T> row[E];
    for (int i = 0; i < E; ++i) row[i] = parts[i][column / E];
    transpose_quarters<T>(square + column, row);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
