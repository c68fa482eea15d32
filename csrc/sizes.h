// Arithmetic of sizes. Always inlined: kernels call no function that is compiled elsewhere, and so
// none of the standard library (csrc/cpu/README.md).
#pragma once

#include <cstdint>

#include "cell_math.h"

namespace fastrnn {

FASTRNN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTRNN_INLINE constexpr int64_t round_up(int64_t a, int64_t unit) {
  return divide_up(a, unit) * unit;
}
FASTRNN_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fastrnn
