// Operands, which products read (kernels.h): what they are of each type of elements, and rows and
// columns made of them.
#pragma once

#include <utility>

#include "convert.h"
#include "kernels.h"

namespace fastrnn::FASTRNN_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasMatrixUnit = true;
#else
constexpr bool kHasMatrixUnit = false;
#endif

// What products read of an element of type E: `parts` numbers of type Part, of which it is the sum.
template <typename P, int count>
struct SumOf {
  using Part = P;
  static constexpr int parts = count;
};
template <typename E>
struct ProductOf : SumOf<Compute<E>, 1> {};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<BFloat16> : SumOf<BFloat16, 1> {};
template <>
struct ProductOf<MediumFloat> : SumOf<BFloat16, 1> {};
#endif
#if defined(FASTRNN_AMX_FP16)
template <>
struct ProductOf<Half> : SumOf<Half, 1> {};
#elif defined(__AMX_BF16__)
template <>
struct ProductOf<HighFloat> : SumOf<BFloat16, 2> {};
template <>
struct ProductOf<Half> : SumOf<BFloat16, 2> {};  // exactly: 11 bits are no more than twice 8
#endif

template <typename E>
using Part = typename ProductOf<E>::Part;
template <typename E>
constexpr int kParts = ProductOf<E>::parts;

// An operand is what a lane multiplies at once: one number, or two of 16 bits side by side in the
// bits of a float, where an instruction takes them.
template <typename E>
constexpr int kDepth = sizeof(Compute<E>) / sizeof(Part<E>);

// Whether elements are operands as they lie; or the numbers of which an operand holds two.
template <typename E>
constexpr bool kIsOperand = kIsComputed<E> && kDepth<E> == 1;
template <typename E>
constexpr bool kIsHalfOperand = !kIsComputed<E> && kDepth<E> == 2 && kParts<E> == 1;

// Whether rows of weights can be multiplied where they lie, in lanes over rows: of operands or of
// what becomes one, and of the halves of operands if they are an even number.
template <typename E>
constexpr bool kReadsRows = (kDepth<E> == 1 || kIsHalfOperand<E>) && !kHasMatrixUnit;
template <typename E>
FASTRNN_INLINE bool reads_rows(int64_t k) {
  return kReadsRows<E> && k % kDepth<E> == 0;
}

// Rows of operands are a multiple of this long, zeros at the end.
constexpr int64_t kOperandUnit = kHasMatrixUnit ? 16 : 1;

// Operands that hold one part of k elements; a last half-filled one ends with a zero.
template <typename E>
FASTRNN_INLINE int64_t part_operands(int64_t k) {
  constexpr int64_t unit = kDepth<E> * kOperandUnit;
  return divide_up(k, unit) * kOperandUnit;
}

// Those of all parts: a row has the first part of all its elements, then the second.
template <typename E>
FASTRNN_INLINE int64_t operands(int64_t k) {
  return part_operands<E>(k) * kParts<E>;
}

#if defined(__AVX512BF16__)

// The 16-bit numbers of the lower half of v, each before its like of the upper half.
template <int... J>
FASTRNN_INLINE Vec<float> in_pairs(Vec<float> v, std::integer_sequence<int, J...>) {
  using Numbers = Vec<uint16_t>;
  const Numbers numbers = (Numbers)v;
  return (Vec<float>)shuffle<(J / 2 + J % 2 * 16)...>(numbers, numbers);
}

// x, but finite numbers past the largest BFloat16 as that one, where rounding would make infinity
// of them. Without their signs they are the 0xffff floats from 0x7f7f0001 on, as bits.
FASTRNN_INLINE Vec<float> within_bfloat16(Vec<float> x) {
  const __m512i size = _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 is_past = _mm512_cmplt_epu32_mask(
      _mm512_sub_epi32(size, _mm512_set1_epi32(0x7f7f0001)), _mm512_set1_epi32(0xffff));
  const __m512i upper = _mm512_set1_epi32(~0xffff);
  return (Vec<float>)_mm512_mask_and_epi32((__m512i)x, is_past, (__m512i)x, upper);
}

// Part `part` of the numbers x, which BFloat16 holds but for a last rounding.
template <typename E, int part>
FASTRNN_INLINE Vec<float> part_of(Vec<float> x) {
  if constexpr (kParts<E> == 1) return kIsComputed<E> ? within_bfloat16(x) : x;
  // Rounded towards zero: both parts then have x's sign, and an infinite factor one with both.
  const Vec<float> upper = (Vec<float>)((Bits<float>)x & ~0xffff);
  if constexpr (part == 0) return upper;
  // The rest, which is 0 where x is infinite; and so little of x that its last bit is the same: so
  // that the part is not zero, which infinity times would be NaN, unless x is.
  const __mmask16 has_rest = _mm512_test_epi32_mask((__m512i)x, _mm512_set1_epi32(0xffff));
  const __m512 rest = _mm512_maskz_sub_ps(has_rest, (__m512)x, (__m512)upper);
  return fma<float>(x, broadcast(0x1p-30f), (Vec<float>)rest);
}

// Part `part` of the lanes of a and then of b, as BFloat16.
template <typename E, int part>
FASTRNN_INLINE Vec<float> narrow_part(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_cvtne2ps_pbh((__m512)part_of<E, part>(b), (__m512)part_of<E, part>(a));
}
template <typename E, int part>
FASTRNN_INLINE Words narrow_part(Vec<float> x) {
  return (Words)_mm512_cvtneps_pbh((__m512)part_of<E, part>(x));
}

#endif

// The operands that a part of `count` columns of a row makes; where an operand is two numbers, with
// those of the row after it, zeros if that is null.
template <typename E, int part = 0>
FASTRNN_INLINE Vec<Compute<E>> column_operands(const E* row, const E* next, int64_t count) {
  if constexpr (kDepth<E> == 1) {
    return load_as(row, count);
  } else if constexpr (kIsHalfOperand<E>) {
    const auto bits = [&](const E* p) {
      return __builtin_convertvector(load_words(p, count), Vec<uint32_t>);
    };
    return (Vec<float>)(bits(row) | (next ? bits(next) << 16 : Vec<uint32_t>{}));
  } else {
#if defined(__AVX512BF16__)
    const Vec<float> pair =
        narrow_part<E, part>(load_as(row, count), next ? load_as(next, count) : Vec<float>{});
    return in_pairs(pair, std::make_integer_sequence<int, 2 * kLanes<float>>{});
#endif
  }
}

// A part of as many operands as a vector has lanes, of a row with `count` elements from `row` on,
// one at least; zeros after them.
template <typename E, int part = 0>
FASTRNN_INLINE Vec<Compute<E>> row_operands(const E* row, int64_t count) {
  if constexpr (kDepth<E> == 1) {
    return load_as(row, count);
  } else if constexpr (kIsHalfOperand<E>) {
    Vec<float> bits{};
    if (count >= 2 * kLanes<float>) {
      __builtin_memcpy(&bits, row, sizeof(bits));
    } else {
#if FASTRNN_MASKS
      bits = (Vec<float>)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), row);
#else
      __builtin_memcpy(&bits, row, count * sizeof(E));
#endif
    }
    return bits;
  } else {
#if defined(__AVX512BF16__)
    constexpr int64_t L = kLanes<float>;
    return narrow_part<E, part>(load_as(row, count),
                                count > L ? load_as(row + L, count - L) : Vec<float>{});
#endif
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int64_t() const { return N; }
};

// Calls f(Constant<part>) for each part.
template <typename E, typename F>
FASTRNN_INLINE void for_parts(F&& f) {
  f(Constant<0>{});
  if constexpr (kParts<E> == 2) f(Constant<1>{});
}

// Writes k elements as operands.
template <typename E>
FASTRNN_INLINE void make_operands(const E* in, int64_t k, Compute<E>* out) {
  constexpr int64_t L = kLanes<Compute<E>>;
  const int64_t size = part_operands<E>(k);
  for (int64_t i = 0; i < size; i += L) {
    const int64_t element = i * kDepth<E>;
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value;
      store(out + p * size + i, row_operands<E, p>(in + element, k - element), size - i);
    });
  }
}

// Writes k elements as column n of operands (operands, columns).
template <typename E>
FASTRNN_INLINE void make_operand_column(const E* in, int64_t k, Compute<E>* out, int64_t n,
                                        int64_t columns) {
  using C = Compute<E>;
  if (columns == 1) return make_operands(in, k, out);
  constexpr int64_t L = kLanes<C>;
  const int64_t size = part_operands<E>(k);
  for (int64_t i = 0; i < size; i += L) {
    const int64_t element = i * kDepth<E>;
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value;
      C lanes[L];
      store(lanes, row_operands<E, p>(in + element, k - element));
      C* const target = out + (p * size + i) * columns + n;
      for (int64_t j = 0; j < L && i + j < size; ++j) target[j * columns] = lanes[j];
    });
  }
}

// Writes the first `count` of v as elements `at` and on of a row of operands that has `size` a
// part.
template <typename E>
FASTRNN_INLINE void store_operands(Compute<E>* row, int64_t size, int64_t at, Vec<Compute<E>> v,
                                   int64_t count) {
  for_parts<E>([&](auto part) {
    constexpr int p = decltype(part)::value;
    Part<E>* const out = reinterpret_cast<Part<E>*>(row + p * size) + at;
    if constexpr (kDepth<E> == 1 || kIsHalfOperand<E>) {
      store_as(out, v, count);
    } else {
#if defined(__AVX512BF16__)
      store_words(out, narrow_part<E, p>(v), count);
#endif
    }
  });
}

}  // namespace fastrnn::FASTRNN_ISA
