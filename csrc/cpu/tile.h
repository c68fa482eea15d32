// The one inner loop of every kernel, declared: a tile of output held in registers while K runs.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "math.h"

namespace fastrnn::FASTRNN_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasMatrixUnit = true;
#else
constexpr bool kHasMatrixUnit = false;
#endif

// Rows of a tile. With four vectors a row, AVX-512's 32 registers hold 6 x 4 accumulators, 4
// weights and a broadcast; 16 registers hold 3 x 4, one weight and 3 broadcasts.
constexpr int kTileRows = kHasMatrixUnit ? 16 : FASTRNN_VECTOR_BYTES == 64 ? 6 : 3;

// With so few rows a tile is two panels wide, so that 8 or more accumulators hide the latency of
// the multiply-add. Three rows gain 6%: 97 GFLOP/s against 91 from L2.
constexpr int kTwoPanelRows = kHasMatrixUnit ? 0 : FASTRNN_VECTOR_BYTES == 64 ? 3 : 1;

template <typename C>
constexpr int kPanelColumns = kPanelVectors * kLanes<C>;

// An operand is what a lane multiplies at once: one element, computed in C; or two 16-bit elements,
// side by side in the bits of a float, where an instruction takes them.
template <typename E>
constexpr int kDepth = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int kDepth<BFloat16> = 2;
#endif
#if defined(__AMX_BF16__)
template <>
constexpr int kDepth<Half> = 2;
#endif

// Rows of operands are a multiple of this long, zeros at the end.
constexpr int64_t kOperandUnit = kHasMatrixUnit ? 16 : 1;

// The type that names the product of elements of type E: Half and float share one.
template <typename E, int depth = kDepth<E>>
struct MultiplierOf {
  using type = Compute<E>;
};
template <typename E>
struct MultiplierOf<E, 2> {
  using type = E;
};
template <typename E>
using Multiplier = typename MultiplierOf<E>::type;

// What gradients of pre-activations are stored in: as operands.
template <typename E>
using Gradient = Multiplier<E>;

// Operands that hold k elements; a last half-filled one ends with a zero.
template <typename E>
FASTRNN_INLINE int64_t operands(int64_t k) {
  constexpr int64_t unit = kDepth<E> * kOperandUnit;
  return (k + unit - 1) / unit * kOperandUnit;
}

// Products are summed in blocks of at most this many operands: one accumulator an output element
// and block, k in order, then the blocks' sums in order. Blocks keep the rounding error of long
// sums near that of torch's own products; the fixed order gives an element the same bits whatever
// tile it is in.
constexpr int64_t kSumBlock = 64;

// Where weights may be read in place, the operands of a span are dealt out to this many blocks in
// turn: a vector then multiplies as many neighbours of several rows, as they lie in memory. The
// operands after the last whole span are in blocks of neighbours.
constexpr int64_t kInterleave = kSpan / kSumBlock;
constexpr bool kInterleaves = !kHasMatrixUnit;  // which sums k in order, and reads none in place

// The sums of a tile, in memory between blocks: (rows, vectors), in order.
template <typename C>
struct Tile {
  Vec<C> at[kTileRows * kPanelVectors];
};

// sums[r][v] = (sums[r][v] or 0) + sum over k of a[r][k * a_stride] * w[k][v], block after block.
// Vector v of w's row i is at w + i * w_stride + v * lanes; vectors past the fourth lie
// panel_stride further. Its rows are in the order of summation: if interleaved, not that of k. At
// most kTileRows rows of four vectors, or kTwoPanelRows of eight.
template <typename C>
struct TileProduct {
  const C* const* a;
  int64_t a_stride;
  const C* w;
  int64_t w_stride, panel_stride;
  int64_t k_count;   // operands, one at least
  bool interleaved;  // whether spans are dealt out to blocks
  bool accumulate;   // whether sums holds something
  // k_count cache lines from here on are fetched into L2 meanwhile, by a full panel and more than
  // kTwoPanelRows rows; not by a matrix unit.
  const C* next = nullptr;
};
template <typename M>
void multiply_tile(const TileProduct<Compute<M>>& product, int rows, int vectors,
                   Vec<Compute<M>>* sums);

// Splits [begin, end) into the fewest blocks of at most kTileRows rows, of nearly equal size (full
// ones, where any other takes as long), and calls f(first row, rows).
template <typename F>
FASTRNN_INLINE void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t blocks = (end - begin + kTileRows - 1) / kTileRows;
  for (int64_t n = begin; n < end; --blocks) {
    const int64_t left = end - n, full = left < kTileRows ? left : kTileRows;
    const int64_t rows = kHasMatrixUnit ? full : (left + blocks - 1) / blocks;
    f(n, static_cast<int>(rows));
    n += rows;
  }
}

// Calls f(first column, vectors) for each panel of a matrix of that many columns.
template <typename C, typename F>
FASTRNN_INLINE void for_column_panels(int64_t columns, F&& f) {
  for (int64_t column = 0; column < columns; column += kPanelColumns<C>) {
    const int64_t vectors = (columns - column + kLanes<C> - 1) / kLanes<C>;
    f(column, static_cast<int>(vectors < kPanelVectors ? vectors : kPanelVectors));
  }
}

// Leaves in sums (rows, vectors) the product of rows a with the columns of w from `column` on, a
// multiple of kPanelColumns. Two panels are taken together only if both are full.
template <typename E>
FASTRNN_INLINE void multiply_columns(const Compute<E>* const* a, int64_t k_count,
                                     const ColumnWeights<Compute<E>>& w, int64_t column, int rows,
                                     int vectors, Vec<Compute<E>>* sums) {
  using C = Compute<E>;
  TileProduct<C> product{a, 1, w.partial, vectors * kLanes<C>, 0, k_count, false, false};
  if (column + kPanelColumns<C> <= w.columns) {
    product.w = w.full + column / kPanelColumns<C> * w.panel_stride;
    product.w_stride = w.k_stride;
    product.panel_stride = w.panel_stride;
  }
  multiply_tile<Multiplier<E>>(product, rows, vectors, sums);
}

// Adds to sums the vectors of a row, `columns` wide, from `column` on.
template <typename E>
FASTRNN_INLINE void add_row(const E* row, int64_t column, int64_t columns, int vectors,
                            Vec<Compute<E>>* sums) {
  constexpr int L = kLanes<Compute<E>>;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = column + v * L;
    sums[v] += load_as(row + first, columns - first);
  }
}

// Writes a tile's row to columns `column` and on of a row that is `columns` wide.
template <typename E>
FASTRNN_INLINE void store_row(E* row, int64_t column, int64_t columns, int vectors,
                              const Vec<Compute<E>>* sums) {
  constexpr int L = kLanes<Compute<E>>;
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = column + v * L;
    store_as(row + first, sums[v], columns - first);
  }
}

// The operands that `count` columns of a row make; where an operand is two elements, with those of
// the row after it, zeros if that is null.
template <typename E>
FASTRNN_INLINE Vec<Compute<E>> column_operands(const E* row, const E* next, int64_t count) {
  if constexpr (kDepth<E> == 2) {
    const auto bits = [&](const E* p) {
      return __builtin_convertvector(load_words(p, count), Vec<uint32_t>);
    };
    return (Vec<float>)(bits(row) | (next ? bits(next) << 16 : Vec<uint32_t>{}));
  } else {
    return load_as(row, count);
  }
}

// As many operands as a vector has lanes, of a row with `count` elements from `row` on, one at
// least; zeros after them.
template <typename E>
FASTRNN_INLINE Vec<Compute<E>> row_operands(const E* row, int64_t count) {
  if constexpr (kDepth<E> == 2) {
    constexpr int64_t lanes = 2 * kLanes<float>;
    Vec<float> bits{};
    if (count >= lanes) {
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
    return load_as(row, count);
  }
}

// Writes k elements as operands.
template <typename E>
FASTRNN_INLINE void make_operands(const E* in, int64_t k, Compute<E>* out) {
  constexpr int64_t L = kLanes<Compute<E>>;
  for (int64_t i = 0, end = operands<E>(k); i < end; i += L) {
    store(out + i, row_operands(in + i * kDepth<E>, k - i * kDepth<E>), end - i);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
