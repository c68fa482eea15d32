// The one inner loop of every kernel: a tile of output held in registers while K runs.
#pragma once

#include "kernels.h"
#include "math.h"

namespace fastrnn::FASTRNN_ISA {

// Rows of a tile. With four vectors a row, AVX-512's 32 registers hold 6 x 4 accumulators, 4
// weights and a broadcast; 16 registers hold 3 x 4, one weight and 3 broadcasts.
constexpr int kTileRows = FASTRNN_VECTOR_BYTES == 64 ? 6 : 3;

// With so few rows a tile is two panels wide, so that 8 or more accumulators hide the latency of
// the multiply-add.
constexpr int kTwoPanelRows = FASTRNN_VECTOR_BYTES == 64 ? 2 : 1;

template <typename T>
constexpr int kPanelColumns = kPanelVectors * kLanes<T>;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<value>) for 1 <= value <= Max.
template <int Max, typename F>
FASTRNN_INLINE void with_constant(int64_t value, F&& f) {
  if constexpr (Max == 1) {
    f(Constant<1>{});
  } else if (value == Max) {
    f(Constant<Max>{});
  } else {
    with_constant<Max - 1>(value, static_cast<F&&>(f));
  }
}

// Splits [begin, end) into the fewest blocks of at most kTileRows rows, of nearly equal size, and
// calls f(first row, Constant<rows>).
template <typename F>
FASTRNN_INLINE void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t blocks = (end - begin + kTileRows - 1) / kTileRows;
  for (int64_t n = begin; n < end; --blocks) {
    const int64_t rows = (end - n + blocks - 1) / blocks;
    with_constant<kTileRows>(rows, [&](auto r) { f(n, r); });
    n += rows;
  }
}

// Products are summed in blocks of this many k: one accumulator an output element and block, k in
// order, then the blocks' sums in order. Blocks keep the rounding error of long sums near that of
// torch's own products; the fixed order gives an element the same bits whatever tile it is in.
constexpr int64_t kSumBlock = 64;

// acc[r][c] = sum over one block's k of a[r][k * AStride] * w[k][c]. Vector c of w's row k is at
// w + (k * V + c) * lanes for c < V, where V, the vectors of a panel, is C or at most four; a
// second panel's four vectors follow at panel_stride.
template <typename T, int AStride, int R, int C>
FASTRNN_INLINE void multiply_block(Vec<T> (&acc)[R][C], const T* const (&a)[R], const T* w,
                                   int64_t k_count, int64_t panel_stride) {
  constexpr int L = kLanes<T>;
  constexpr int V = C > kPanelVectors ? kPanelVectors : C;
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = Vec<T>{};
  }
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<T> weight[C];
    for (int c = 0; c < C; ++c) weight[c] = load(w + c / V * panel_stride + c % V * L);
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = broadcast(a[r][k * AStride]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma<T>(value, weight[c], acc[r][c]);
    }
    w += V * L;
  }
}

// A tile of sums, in memory between blocks.
template <typename T, int R, int C>
struct Sums {
  Vec<T> at[R][C];

  FASTRNN_INLINE void add(const Vec<T> (&block)[R][C]) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) at[r][c] += block[r][c];
    }
  }
};

// Adds to sums the product of rows a with the packed weights w over all k, block after block.
template <typename T, int AStride = 1, int R, int C>
FASTRNN_INLINE void multiply(Sums<T, R, C>& sums, const T* (&a)[R], const T* w, int64_t k_count,
                             int64_t panel_stride) {
  constexpr int V = C > kPanelVectors ? kPanelVectors : C;
  for (int64_t k = 0; k < k_count; k += kSumBlock) {
    const int64_t count = k_count - k < kSumBlock ? k_count - k : kSumBlock;
    Vec<T> block[R][C];
    multiply_block<T, AStride>(block, a, w, count, panel_stride);
    sums.add(block);
    for (int r = 0; r < R; ++r) a[r] += count * AStride;
    w += count * V * kLanes<T>;
  }
}

// Calls f(first column, Constant<vectors>) for each panel of a matrix of that many columns.
template <typename T, typename F>
FASTRNN_INLINE void for_column_panels(int64_t columns, F&& f) {
  for (int64_t column = 0; column < columns; column += kPanelColumns<T>) {
    const int64_t vectors = (columns - column + kLanes<T> - 1) / kLanes<T>;
    with_constant<kPanelVectors>(vectors < kPanelVectors ? vectors : kPanelVectors,
                                 [&](auto c) { f(column, c); });
  }
}

// Writes a tile's row to columns `column` and on of a row that is `columns` wide.
template <typename T, int C>
FASTRNN_INLINE void store_row(T* row, int64_t column, int64_t columns, const Vec<T> (&acc)[C]) {
  for (int c = 0; c < C; ++c) {
    const int64_t first = column + c * kLanes<T>;
    store(row + first, acc[c], columns - first);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
