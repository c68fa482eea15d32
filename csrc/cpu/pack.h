// Copies of weights in the order in which the tiles read them, and reading them in place.
//
// A packed matrix is a series of panels, each (K, vectors, lanes) operands: for every k, the values
// that the panel's output columns multiply with operand k of the input. Columns past the end are
// zero.
#pragma once

#include "tile.h"

namespace fastrnn::FASTRNN_ISA {

// Which rows of a weight matrix make up one panel: vector v is the lanes rows from first + v * step
// on, those of them that are valid.
struct PanelRows {
  int64_t first, step, valid_first, valid_step;
  int vectors;

  // Rows of vector v that exist.
  FASTRNN_INLINE int64_t valid(int v) const { return valid_first + v * valid_step; }
};

// A cell's panel: its four gates of one vector of hidden units, or four vectors of units.
template <typename C>
FASTRNN_INLINE PanelRows cell_panel_rows(Cell cell, int64_t hidden, int64_t panel) {
  constexpr int64_t L = kLanes<C>;
  if (cell == Cell::lstm) {
    const int64_t first = panel * L;
    return {first, hidden, hidden - first, 0, kPanelVectors};
  }
  const int64_t first = panel * kPanelColumns<C>;
  const int64_t vectors = (hidden - first + L - 1) / L;
  return {first, L, hidden - first, -L,
          static_cast<int>(vectors < kPanelVectors ? vectors : kPanelVectors)};
}

// The square at p, transposed; rows past `valid` and columns past `columns` are zero and are not
// read.
template <typename C>
FASTRNN_INLINE void load_transposed(Vec<C> (&square)[kLanes<C>], const C* p, int64_t ldw,
                                    int64_t valid, int64_t columns) {
  constexpr int L = kLanes<C>;
  if (valid >= L && columns >= L) {
    load_transposed<C>(square, p, ldw);
    return;
  }
  C copy[L * L];
  for (int row = 0; row < L; ++row) {
    store(copy + row * L, row < valid ? load(p + row * ldw, columns) : Vec<C>{});
  }
  load_transposed<C>(square, copy, L);
}

// Adds to sums (rows, vectors) the product of rows a with the panel's rows of w, (rows, k),
// transposing them on the way: as packing followed by multiply_tile, to the bit, for weights that
// are used only once.
template <typename C>
void multiply_transposed(const C* const* a, const C* w, int64_t k_count, const PanelRows& panel,
                         int rows, Vec<C>* sums);

}  // namespace fastrnn::FASTRNN_ISA
