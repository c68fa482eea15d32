// Steps and their rows, plain and packed, as the CPU and the CUDA kernels read them.
#pragma once

#include <cstdint>

#include "sizes.h"

namespace fastrnn {

// Which rows exist at which step. A packed sequence is rows that end early: step t has rows
// 0 .. rows_at(t) - 1, and rows_at never grows with t.
struct Schedule {
  int64_t steps;           // T
  int64_t rows;            // N
  const int64_t* sizes;    // (T) rows at each step; null: N at every step
  const int64_t* offsets;  // (T) rows before each step; null: t * N

  // The step that a direction takes as its s-th: in reverse from the last to the first.
  FASTRNN_INLINE int64_t step(int64_t s, bool reverse) const { return reverse ? steps - 1 - s : s; }
  FASTRNN_INLINE int64_t rows_at(int64_t t) const { return sizes ? sizes[t] : rows; }
  FASTRNN_INLINE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * rows; }
};

}  // namespace fastrnn
