// The types that arrays hold, and the one that each is computed in.
#pragma once

#include <cstdint>

namespace fastrnn {

struct Half {  // IEEE 754 binary16
  uint16_t bits;
};
struct BFloat16 {  // the upper half of a binary32
  uint16_t bits;
};

// A float32 whose products are computed from less, as torch's matmul precisions "high" and "medium"
// allow: from the sum of two BFloat16, or from one.
struct HighFloat {
  float value;
};
struct MediumFloat {
  float value;
};

template <typename E>
struct ComputeOf {
  using type = E;
};
struct ComputedInFloat {
  using type = float;
};
template <>
struct ComputeOf<Half> : ComputedInFloat {};
template <>
struct ComputeOf<BFloat16> : ComputedInFloat {};
template <>
struct ComputeOf<HighFloat> : ComputedInFloat {};
template <>
struct ComputeOf<MediumFloat> : ComputedInFloat {};

// What elements of type E are multiplied, summed and kept in from step to step.
template <typename E>
using Compute = typename ComputeOf<E>::type;

template <typename E>
constexpr bool kIsComputed = sizeof(E) == sizeof(Compute<E>);

}  // namespace fastrnn
