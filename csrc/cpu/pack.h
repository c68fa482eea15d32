// Copies of weights in the order in which the tiles read them.
//
// A packed matrix is a series of panels, each (K, vectors, lanes): for every k, the values that the
// panel's output columns multiply with element k of the input. Columns past the end are zero.
#pragma once

#include "tile.h"

namespace fastrnn::FASTRNN_ISA {

// Which rows of a weight matrix make up one panel: vector v is rows first + v * step .. + lanes -
// 1, those before `end(v)`.
struct PanelRows {
  int64_t first, step, valid_first, valid_step;
  int vectors;

  // Rows of vector v that exist.
  FASTRNN_INLINE int64_t valid(int v) const { return valid_first + v * valid_step; }
};

// A cell's panel: its four gates of one vector of hidden units, or four vectors of units.
template <typename T>
FASTRNN_INLINE PanelRows cell_panel_rows(Cell cell, int64_t hidden, int64_t panel) {
  constexpr int64_t L = kLanes<T>;
  if (cell == Cell::lstm) {
    const int64_t first = panel * L;
    return {first, hidden, hidden - first, 0, kPanelVectors};
  }
  const int64_t first = panel * kPanelColumns<T>;
  const int64_t vectors = (hidden - first + L - 1) / L;
  return {first, L, hidden - first, -L,
          static_cast<int>(vectors < kPanelVectors ? vectors : kPanelVectors)};
}

// Writes columns [k_begin, k_end) of the panel's rows of w (row stride ldw) to out, as
// (k, vector, lane): squares of lanes x lanes are transposed in registers.
template <typename T>
__attribute__((noinline)) void pack_panel(const T* w, int64_t ldw, const PanelRows& rows,
                                          int64_t k_begin, int64_t k_end, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t out_step = int64_t{rows.vectors} * L;
  for (int v = 0; v < rows.vectors; ++v) {
    const T* source = w + (rows.first + v * rows.step) * ldw;
    const int64_t valid = rows.valid(v);
    for (int64_t k = k_begin; k < k_end; k += L) {
      const int64_t columns = k_end - k;
      Vec<T> square[L];
      if (valid >= L && columns >= L) {
        for (int lane = 0; lane < L; ++lane) square[lane] = load(source + lane * ldw + k);
      } else {
        for (int lane = 0; lane < L; ++lane) {
          square[lane] = lane < valid ? load(source + lane * ldw + k, columns) : Vec<T>{};
        }
      }
      transpose<T>(square);
      T* target = out + (k - k_begin) * out_step + v * L;
      if (columns >= L) {
        for (int j = 0; j < L; ++j) store(target + j * out_step, square[j]);
      } else {
        for (int j = 0; j < columns; ++j) store(target + j * out_step, square[j]);
      }
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
