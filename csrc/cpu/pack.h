// Copies of weights in the order in which the tiles read them, and reading them in place.
//
// A packed matrix is a series of panels, each (K, vectors, lanes) operands: for every k, the values
// that the panel's output columns multiply with operand k of the input. Columns past the end are
// zero. Of matrices that are packed by rows, k runs in the order of summation (kSpanBlocks).
#pragma once

#include "tile.h"
#include "transpose.h"

namespace fastrnn::FASTRNN_ISA {

// Which rows of a weight matrix make up one panel: its columns are groups of consecutive rows,
// group_step apart.
struct PanelRows {
  int64_t first, group, group_step;
  int64_t columns;  // that exist; the last vector may have more
  int vectors;

  FASTRNN_INLINE int64_t row(int64_t column) const {
    return first + column / group * group_step + column % group;
  }
};

// The rows of one vector of a panel, a lane each. Found once a vector: a panel's take divisions.
template <typename C>
struct VectorRows {
  const PanelRows& panel;
  int64_t begin;    // the first lane's column
  int64_t first;    // and its row
  bool neighbours;  // whether all lanes have rows, and these lie behind each other

  FASTRNN_INLINE VectorRows(const PanelRows& rows, int v)
      : panel(rows), begin(int64_t{v} * kLanes<C>), first(rows.row(begin)) {
    const int64_t last = begin + kLanes<C> - 1;
    neighbours = last < rows.columns && rows.row(last) == first + kLanes<C> - 1;
  }
  FASTRNN_INLINE bool exists(int64_t lane) const { return begin + lane < panel.columns; }
  FASTRNN_INLINE int64_t row(int64_t lane) const {
    return neighbours ? first + lane : panel.row(begin + lane);
  }
};

// A cell's panel: the four gates of one vector of hidden units, or four vectors of units. The last
// units of an LSTM, fewer than a vector, have their gates side by side in as few vectors as hold
// them.
template <typename C>
FASTRNN_INLINE PanelRows cell_panel_rows(Cell cell, int64_t hidden, int64_t panel) {
  const int64_t gates = gate_count(cell);
  const int64_t first = panel * kPanelColumns<C> / gates;
  const int64_t units = smaller(hidden - first, kPanelColumns<C> / gates);
  const int64_t columns = units * gates;
  return {first, units, hidden, columns, static_cast<int>(divide_up(columns, kLanes<C>))};
}

// The first of the rows that are read after vector v of a panel: the next vector's or, where panels
// are read in order, the next panel's; of the last panel, any.
template <typename C>
FASTRNN_INLINE int64_t following_row(const PanelRows& rows, int v) {
  return v + 1 < rows.vectors ? rows.row((v + 1) * kLanes<C>) : rows.first + rows.group;
}

// Fetches memory into L2 in the order in which it lies. A vector's rows are read side by side, a
// line of each in turn, which the hardware does not foresee (MEASURED.md, Layout). What is fetched
// need not exist.
struct Fetcher {
  static constexpr int64_t kLine = 64;
  uintptr_t at;

  FASTRNN_INLINE explicit Fetcher(const void* first) : at(reinterpret_cast<uintptr_t>(first)) {}
  FASTRNN_INLINE void fetch(int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(at + i), 0, 2);
    }
    at += bytes;
  }
};

// A part of the operands that `elements` elements of those rows make, from w's first column on, at
// most a square of lanes x lanes: transposed, what does not exist is zero.
template <typename E, int part>
FASTRNN_INLINE void load_operands(Vec<Compute<E>> (&square)[kLanes<Compute<E>>], const E* w,
                                  int64_t ldw, const VectorRows<Compute<E>>& rows,
                                  int64_t elements) {
  using C = Compute<E>;
  constexpr int64_t L = kLanes<C>;
  if constexpr (!kIsOperand<E> && kDepth<E> == 1 && kLoadsQuarters<E>) {  // converted as loaded
    if (rows.neighbours && elements >= L) {
      load_transposed<E>(square, w + rows.first * ldw, ldw);
      return;
    }
  }
  C copy[L * L];
  const C* in = copy;
  int64_t step = L;
  if (kIsOperand<E> && rows.neighbours && elements >= L) {
    in = reinterpret_cast<const C*>(w + rows.first * ldw);
    step = ldw;
  } else {
#pragma GCC unroll 1  // it is rarely run, and would be most of packing's code
    for (int64_t j = 0; j < L; ++j) {
      store(copy + j * L,
            rows.exists(j) ? row_operands<E, part>(w + rows.row(j) * ldw, elements) : Vec<C>{});
    }
  }
  load_transposed<C>(square, in, step);
}

// Copies k operands into the order in which packed rows have them.
template <typename C>
FASTRNN_INLINE void reorder(const C* in, int64_t k, C* out) {
  const C* const end = in + k;
  for (; end - in >= kSpan; in += kSpan) {
    for (int64_t block = 0; block < kSpanBlocks; ++block, out += kSumBlock) {
      for (int64_t i = 0; i < kSumBlock; ++i) out[i] = in[i * kSpanBlocks + block];
    }
  }
  __builtin_memcpy(out, in, (end - in) * sizeof(C));
}

// Panels [begin, end) of a cell's weights that multiply k elements; panel p lies p * operands(k) *
// kPanelColumns from `out` on.
template <typename E>
void pack_gates(Cell cell, const E* w, int64_t k, int64_t hidden, Compute<E>* out, int64_t begin,
                int64_t end);

// Panels [begin, end) of w (k, columns); panel p lies p * operands(k) * kPanelColumns from `out`
// on.
template <typename E>
void pack_columns(const E* w, int64_t k, int64_t columns, Compute<E>* out, int64_t begin,
                  int64_t end);

// Panels [begin, end) of a cell's two biases, added; zeros if they are null.
template <typename E>
void pack_bias(Cell cell, const E* b_ih, const E* b_hh, int64_t hidden, Compute<E>* out,
               int64_t begin, int64_t end);

// Adds to sums (rows, vectors) the product of rows a with the panel's rows of w, (rows, k), where
// they lie: as packing followed by multiply_tile, to the bit, for weights that are used few times.
// next: null, or the first of the weights that are read after those, which are then fetched by a
// single row or, of 16 bits, by any.
template <typename E>
void multiply_in_place(const Compute<E>* const* a, const E* w, int64_t k_count,
                       const PanelRows& panel, int rows, Vec<Compute<E>>* sums, const E* next);

#if defined(__AMX_BF16__)
// As packing followed by multiply_tile, to the bit, without packing: the panel's rows of w, (rows,
// k), are the left factor of the matrix unit, set up for `rows` columns, and a (operands, rows) the
// right one. At most kTileRows rows.
template <typename E>
void multiply_left_weights(const float* a, const E* w, int64_t k_count, const PanelRows& panel,
                           int rows, bool accumulate, Vec<float>* sums);
#endif

}  // namespace fastrnn::FASTRNN_ISA
