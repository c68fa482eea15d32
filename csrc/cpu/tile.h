// The inner loop of the kernels, declared: a tile of output held in registers while K runs.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "math.h"
#include "operands.h"

namespace fastrnn::FASTRNN_ISA {

// Rows of a tile. With four vectors a row, 32 registers hold 6 x 4 accumulators, 4 weights and a
// broadcast; 16 registers hold 3 x 4, one weight and 3 broadcasts.
constexpr int kTileRows = kHasMatrixUnit ? 16 : FASTRNN_REGISTERS == 32 ? 6 : 3;

// With so few rows a tile is two panels wide, so that 8 or more accumulators hide the latency of
// the multiply-add. Three rows gain 6%: 97 GFLOP/s against 91 from L2.
constexpr int kTwoPanelRows = kHasMatrixUnit ? 0 : FASTRNN_REGISTERS == 32 ? 3 : 1;

template <typename C>
constexpr int kPanelColumns = kPanelVectors * kLanes<C>;

// Products are summed in blocks of at most this many operands: one accumulator an output element
// and block, k in order, then the blocks' sums in order. Blocks keep the rounding error of long
// sums near that of torch's own products; the fixed order gives an element the same bits whatever
// tile it is in.
constexpr int64_t kSumBlock = 64;

// Where weights may be read in place, the operands of a span are dealt out to this many blocks in
// turn: a vector then multiplies as many neighbours of several rows, as they lie in memory. The
// operands after the last whole span are in blocks of neighbours.
constexpr int64_t kSpanBlocks = kSpan / kSumBlock;
constexpr bool kDealsSpans = !kHasMatrixUnit;  // which sums k in order, and reads none in place

// The sums of a tile, in memory between blocks: (rows, vectors), in order.
template <typename C>
struct Tile {
  Vec<C> at[kTileRows * kPanelVectors];
};

// Fetches the lines that so many bytes from p on lie in into L2; they need not exist. Inlined also
// in what calls it: GCC drops calls of a function that only fetches, as it has no result.
FASTRNN_INLINE void fetch_lines(const void* p, int64_t bytes) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = first / kLine * kLine; at < first + bytes; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
  }
}

// Whether lines that finishing a tile reads or writes, of so many elements a row, are fetched while
// the tile is multiplied: if L2 has not kept them since their last use, and the product, which
// grows with the units, takes long enough.
template <typename E>
FASTRNN_INLINE bool fetches_lines(const Schedule& schedule, int64_t units, int64_t of_row) {
  constexpr int64_t kFewestUnits = FASTRNN_REGISTERS == 32 ? 64 : 96;
  constexpr int64_t kSmallestL2 = FASTRNN_REGISTERS == 32 ? 1 << 20 : 512 << 10;
  const int64_t bytes = schedule.steps * schedule.rows * of_row * int64_t{sizeof(E)};
  return units >= kFewestUnits && bytes > kSmallestL2;
}

// What a product fetches into L2 meanwhile: `step` elements at each k, from `next` on. It need not
// exist.
template <typename C>
struct Ahead {
  const C* next = nullptr;  // null: nothing
  int64_t step = 0;
};

// The blocks of rows that each fetch a part of the next panel while they are multiplied; a multiple
// of kPanelVectors, even if fewer blocks exist. A block alone, and two of three rows, use weights
// so fast that they would only wait for what they fetch; and eight of three rows wait less than
// four.
FASTRNN_INLINE int64_t fetching_blocks(int64_t rows) {
  if (FASTRNN_REGISTERS == 32) return rows > kTileRows ? kPanelVectors : 0;
  if (rows <= 2 * kTileRows) return 0;
  return rows < 2 * kPanelVectors * kTileRows ? kPanelVectors : 2 * kPanelVectors;
}

// sums[r][v] = (sums[r][v] or 0) + sum over k of a[r][k * a_stride] * w[k][v], block after block.
// Vector v of w's row i is at w + i * w_stride + v * lanes; vectors past the fourth lie
// panel_stride further. Its rows are in the order of summation: if interleaved, not that of k. At
// most kTileRows rows of four vectors, or kTwoPanelRows of eight.
template <typename C>
struct TileProduct {
  const C* const* a;
  int64_t a_stride = 1;
  const C* w;
  int64_t w_stride, panel_stride = 0;
  int64_t k_count;            // operands, one at least
  bool interleaved = false;   // whether spans are dealt out to blocks
  bool accumulate = false;    // whether sums holds something
  Ahead<C> ahead = {};        // for a full panel and more than kTwoPanelRows rows; no matrix unit
  int unit_rows = kTileRows;  // that a matrix unit is set up for, no fewer than there are
};

// With two parts, of the four products of a's with w's that of the second ones, 2^-16 of the first
// ones' on average, is left out.
template <typename Part, int parts>
void multiply_tile(const TileProduct<Compute<Part>>& product, int rows, int vectors,
                   Vec<Compute<Part>>* sums);

// The rows that a matrix unit is set up for where a share has so many: fewer than a tile's are
// multiplied faster, and loaded without a copy.
FASTRNN_INLINE int unit_rows_for(int64_t share_rows) {
  if (share_rows < 1) return 1;
  return static_cast<int>(smaller(share_rows, kTileRows));
}

// Splits [begin, end) into the fewest blocks of at most kTileRows rows, of nearly equal size (full
// ones, where any other takes as long), and calls f(first row, rows).
template <typename F>
FASTRNN_INLINE void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  int64_t blocks = divide_up(end - begin, kTileRows);
  for (int64_t n = begin; n < end; --blocks) {
    const int64_t left = end - n;
    const int64_t rows = kHasMatrixUnit ? smaller(left, kTileRows) : divide_up(left, blocks);
    f(n, static_cast<int>(rows));
    n += rows;
  }
}

// Calls f(first column, vectors) for each panel of a matrix of that many columns.
template <typename C, typename F>
FASTRNN_INLINE void for_column_panels(int64_t columns, F&& f) {
  for (int64_t column = 0; column < columns; column += kPanelColumns<C>) {
    const int64_t vectors = divide_up(columns - column, kLanes<C>);
    f(column, static_cast<int>(smaller(vectors, kPanelVectors)));
  }
}

// Leaves in sums (rows, vectors) the product of rows a with the columns of w from `column` on, a
// multiple of kPanelColumns; or, of operands k and on of w's, k > 0, adds it. Two panels are taken
// together only if both are full.
template <typename E>
FASTRNN_INLINE void multiply_columns(const Compute<E>* const* a, int64_t k, int64_t k_count,
                                     const ColumnWeights<Compute<E>>& w, int64_t column, int rows,
                                     int vectors, Vec<Compute<E>>* sums, int unit_rows,
                                     Ahead<Compute<E>> ahead = {}) {
  using C = Compute<E>;
  TileProduct<C> product{.a = a,
                         .w = w.partial,
                         .w_stride = vectors * kLanes<C>,
                         .k_count = k_count,
                         .accumulate = k > 0,
                         .ahead = ahead,
                         .unit_rows = unit_rows};
  if (column + kPanelColumns<C> <= w.columns) {
    product.w = w.full + column / kPanelColumns<C> * w.panel_stride;
    product.w_stride = w.k_stride;
    product.panel_stride = w.panel_stride;
  }
  product.w += k * product.w_stride;
  multiply_tile<Part<E>, kParts<E>>(product, rows, vectors, sums);
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

}  // namespace fastrnn::FASTRNN_ISA
