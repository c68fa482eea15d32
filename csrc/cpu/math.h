// sigmoid and tanh on vectors, within 2 ulp of truth over every input, NaN, infinities and
// denormals included.
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// Constants of exp(r) = 1 + r + r^2 q(r), |r| <= ln(2) / 2. The coefficients of q are its minimax
// polynomial there (mpmath's chebyfit); kQError is its largest error, far below one ulp of the
// result. ln2_hi has so few bits that n * ln2_hi is exact for every n that can occur (Cody & Waite,
// 1980).
template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269502f;
  static constexpr float ln2_hi = 0.693115234375f, ln2_lo = 3.194618329871446e-05f;
  static constexpr float round = 0x1.8p23f;  // adding it leaves round(x) in the low bits
  static constexpr int mantissa_bits = 23, bias = 127, shift = 64;
  static constexpr float shift_back = 0x1p-64f;
  static constexpr float lowest = -104.f;    // exp of it rounds to 0
  static constexpr float tanh_limit = 20.f;  // tanh is 1 to the last bit from half of it on
  static constexpr float q[] = {0x1.0000000b9847ep-1f,  0x1.5555555a7c16bp-3f,
                                0x1.5554e8d9c7d96p-5f,  0x1.1110e0de7be2bp-7f,
                                0x1.6d4362097d81ap-10f, 0x1.a125285dbcbf1p-13f};  // error 1.4e-9
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_hi = 0x1.62e42fefa2p-1, ln2_lo = 7.371002565167799e-13;
  static constexpr double round = 0x1.8p52;
  static constexpr int mantissa_bits = 52, bias = 1023, shift = 512;
  static constexpr double shift_back = 0x1p-512;
  static constexpr double lowest = -746.;
  static constexpr double tanh_limit = 40.;
  static constexpr double q[] = {0x1p-1,
                                 0x1.5555555555557p-3,
                                 0x1.5555555555556p-5,
                                 0x1.11111111100cep-7,
                                 0x1.6c16c16c162ccp-10,
                                 0x1.a01a01abef415p-13,
                                 0x1.a01a01a6dcaffp-16,
                                 0x1.71de021a90822p-19,
                                 0x1.27e4db57442fbp-22,
                                 0x1.af4e196027428p-26,
                                 0x1.1f731ea5352cap-29};  // error 1.4e-18
};

template <typename T>
struct Math {
  using V = Vec<T>;
  using B = Bits<T>;
  using K = ExpConstants<T>;

  static FASTRNN_INLINE V fma(V a, V b, V c) { return fastrnn::FASTRNN_ISA::fma<T>(a, b, c); }

  static FASTRNN_INLINE V abs(V x) { return (V)((B)x & ~sign_bit()); }

  // 1 / (1 + exp(-x)), from exp(-|x|) so that both tails keep their relative accuracy.
  static FASTRNN_INLINE V sigmoid(V x) {
    V y = -abs(x);
    y = y < K::lowest ? broadcast(K::lowest) : y;
    const Reduced r = reduce(y);
    // 2^n may be denormal, so it is applied in two factors, the first of them exact.
    const V scale = (V)((r.n + (K::bias + K::shift)) << K::mantissa_bits);
    const V e = fma(r.expm1, scale, scale) * K::shift_back;
    return (x < 0 ? e : broadcast(T(1))) / (1 + e);
  }

  // From t = exp(2|x|) - 1: t / (t + 2) while that is below a half, 1 - 2 / (t + 2) beyond.
  static FASTRNN_INLINE V tanh(V x) {
    V y = abs(x) * 2;
    const B small = y < T(1.1);
    y = y > K::tanh_limit ? broadcast(K::tanh_limit) : y;
    const Reduced r = reduce(y);
    const V scale = (V)((r.n + K::bias) << K::mantissa_bits);
    const V t = fma(r.expm1, scale, scale - 1);
    const V quotient = (small ? t : broadcast(T(2))) / (t + 2);
    const V magnitude = small ? quotient : 1 - quotient;
    return (V)((B)magnitude | ((B)x & sign_bit()));
  }

  // max(x, 0), NaN kept.
  static FASTRNN_INLINE V positive_part(V x) { return x <= 0 ? V{} : x; }

  // x where h > 0 or h is NaN, else 0: the gradient of positive_part, as torch's
  // threshold_backward.
  static FASTRNN_INLINE V zero_unless_positive(V x, V h) { return h <= 0 ? V{} : x; }

 private:
  struct Reduced {
    B n;      // y = n ln(2) + r
    V expm1;  // exp(r) - 1
  };

  static FASTRNN_INLINE B sign_bit() { return (B)broadcast(T(-0.0)); }

  static FASTRNN_INLINE Reduced reduce(V y) {
    const V shifted = fma(y, broadcast(K::log2e), broadcast(K::round));
    const V n = shifted - K::round;
    V r = fma(n, broadcast(-K::ln2_hi), y);
    r = fma(n, broadcast(-K::ln2_lo), r);
    constexpr int degree = sizeof(K::q) / sizeof(T) - 1;
    V q = broadcast(K::q[degree]);
    for (int i = degree - 1; i >= 0; --i) q = fma(q, r, broadcast(K::q[i]));
    return {(B)shifted - (B)broadcast(K::round), fma(q * r, r, r)};
  }
};

}  // namespace fastrnn::FASTRNN_ISA
