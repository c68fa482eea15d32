// sigmoid and tanh on vectors: within 2 ulp of truth over every float, NaN, infinities and
// denormals included, and within 2.4 over doubles; for the 16-bit types, within 2e-5 of it, a
// twentieth of the rounding to come.
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// Constants of exp(r) = 1 + r + r^2 q(r), |r| <= ln(2) / 2. The coefficients of q are its minimax
// polynomial there (mpmath's chebyfit); the error of exp that it leaves stands beside it. ln2_hi
// has so few bits that n * ln2_hi is exact for every n that can occur (Cody & Waite, 1980).
template <typename C>
struct FormatConstants;

template <>
struct FormatConstants<float> {
  static constexpr float log2e = 1.44269502f, ln2 = 0.693147182f;
  static constexpr float ln2_hi = 0.693115234375f, ln2_lo = 3.194618329871446e-05f;
  static constexpr int mantissa_bits = 23;
  static constexpr float round = 0x1.8p23f + 127;  // x + it ends with the bits of round(x) + 127
  static constexpr float shift = 40, one_shifted = 0x1p-40f;
  static constexpr float sigmoid_limit = 104;  // from there on it rounds to 0 or 1
  static constexpr float tanh_limit = 20;      // from half of it on tanh rounds to 1
};

template <>
struct FormatConstants<double> {
  static constexpr double log2e = 1.4426950408889634, ln2 = 0.69314718055994531;
  static constexpr double ln2_hi = 0x1.62e42fefa2p-1, ln2_lo = 7.371002565167799e-13;
  static constexpr int mantissa_bits = 52;
  static constexpr double round = 0x1.8p52 + 1023;
  static constexpr double shift = 100, one_shifted = 0x1p-100;
  static constexpr double sigmoid_limit = 746;
  static constexpr double tanh_limit = 40;
};

template <typename E>
struct ExpConstants : FormatConstants<float> {                             // 16-bit types
  static constexpr float q[] = {0x1p-1f, 0x1.56dfc4p-3f, 0x1.565c26p-5f};  // 1.1e-5
};

template <>
struct ExpConstants<float> : FormatConstants<float> {
  static constexpr float q[] = {0x1p-1f, 0x1.5554dep-3f, 0x1.55551ap-5f,  // 7.8e-9
                                0x1.120b62p-7f, 0x1.6d10fcp-10f};
};

template <>
struct ExpConstants<HighFloat> : ExpConstants<float> {};
template <>
struct ExpConstants<MediumFloat> : ExpConstants<float> {};

template <>
struct ExpConstants<double> : FormatConstants<double> {
  static constexpr double q[] = {0x1p-1,  // 1.7e-19
                                 0x1.5555555555557p-3,
                                 0x1.5555555555556p-5,
                                 0x1.11111111100cep-7,
                                 0x1.6c16c16c162ccp-10,
                                 0x1.a01a01abef415p-13,
                                 0x1.a01a01a6dcaffp-16,
                                 0x1.71de021a90822p-19,
                                 0x1.27e4db57442fbp-22,
                                 0x1.af4e196027428p-26,
                                 0x1.1f731ea5352cap-29};
};

// The functions that cells of elements E are made of.
template <typename E>
struct Math {
  using C = Compute<E>;
  using V = Vec<C>;
  using B = Bits<C>;
  using K = ExpConstants<E>;

  static FASTRNN_INLINE V fma(V a, V b, V c) { return fastrnn::FASTRNN_ISA::fma<C>(a, b, c); }

  // Of z = 1 / (1 + exp(|x|)): z or 1 - z, so that both tails keep their accuracy. exp(|x|) may be
  // past the largest float, as z may be denormal: both 1 and it are taken times 2^-shift.
  static FASTRNN_INLINE V sigmoid(V x) {
    const V y = min<C>(broadcast(K::sigmoid_limit), magnitude(x));
    const V shifted = fma(y, broadcast(K::log2e), broadcast(K::round - K::shift));
    const V n = shifted - (K::round - K::shift);
    V r = fma(n, broadcast(kIsComputed<E> ? -K::ln2_hi : -K::ln2), y);
    if constexpr (kIsComputed<E>) r = fma(n, broadcast(-K::ln2_lo), r);
    const V scale = exp2(shifted), one = broadcast(K::one_shifted);
    // exp(r) - 1, which is rounded more finely than exp(r).
    const V z = one / (scale + fma(expm1(r), scale, one));
    return x < 0 ? z : 1 - z;
  }

  // From h = (exp(2|x|) - 1) / 2: h / (h + 1) while that is below a half, 1 - 1 / (h + 1) beyond.
  static FASTRNN_INLINE V tanh(V x) {
    const V y = min<C>(broadcast(K::tanh_limit), magnitude(x) + magnitude(x));
    const V shifted = fma(y, broadcast(K::log2e), broadcast(K::round - 1));
    const V n = shifted - (K::round - 1);
    // One step is enough: n's error in h matters less the larger h is.
    const V r = fma(n, broadcast(-K::ln2), y);
    const V scale = exp2(shifted);  // 2^n / 2
    const V h = fma(expm1(r), scale, scale - C(0.5));
    V result = h / (h + 1);
    if constexpr (kIsComputed<E>) {
      // a - a^2 / (h + 1): the rounding of h + 1 then counts a / (h + 1) times only.
      const V a = min<C>(broadcast(C(1)), h);
      result = fma(-a, a / (h + 1), a);
    }
    return (V)((B)result | ((B)x & sign_bit()));
  }

  // max(x, 0), NaN kept.
  static FASTRNN_INLINE V positive_part(V x) { return x <= 0 ? V{} : x; }

  // x where h > 0 or h is NaN, else 0: the gradient of positive_part, as torch's
  // threshold_backward.
  static FASTRNN_INLINE V zero_unless_positive(V x, V h) { return h <= 0 ? V{} : x; }

 private:
  static FASTRNN_INLINE B sign_bit() { return (B)broadcast(C(-0.0)); }
  static FASTRNN_INLINE V magnitude(V x) { return (V)((B)x & ~sign_bit()); }

  // 2^n, of the n that the low bits of shifted hold with an exponent's bias.
  static FASTRNN_INLINE V exp2(V shifted) { return (V)((B)shifted << K::mantissa_bits); }

  // exp(r) - 1
  static FASTRNN_INLINE V expm1(V r) {
    constexpr int degree = sizeof(K::q) / sizeof(C) - 1;
    V q = broadcast(K::q[degree]);
    for (int i = degree - 1; i >= 0; --i) q = fma(q, r, broadcast(K::q[i]));
    return fma(q * r, r, r);
  }
};

}  // namespace fastrnn::FASTRNN_ISA
