// The product of rows with a panel of a cell's weights, packed or where they lie.
#pragma once

#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

// Weights as pack_gates takes them: those of a cell of so many hidden units, (G, k).
template <typename E>
struct GateWeights {
  Cell cell;
  const Compute<E>* packed;  // or null: read in place
  const E* w;
  int64_t k, hidden;
  const E* next = nullptr;  // or the weights in place that are read after a panel of these
};

// Leaves a . w in sums, or adds it, for the rows of a panel of w. ordered: a is in the order of
// summation, and w packed. Of a matrix unit that reads w in place a has the columns at its first
// row. ahead: as TileProduct.
template <typename E>
FASTRNN_INLINE void multiply_panel(const Compute<E>* const* a, const GateWeights<E>& weights,
                                   int64_t panel, int rows, int vectors, Vec<Compute<E>>* sums,
                                   bool accumulate, Ahead<Compute<E>> ahead, int unit_rows,
                                   bool ordered = false) {
  using C = Compute<E>;
  if constexpr (kReadsRows<E> || kHasMatrixUnit) {
    if (!weights.packed) {
      const PanelRows of_w = cell_panel_rows<C>(weights.cell, weights.hidden, panel);
      if constexpr (kHasMatrixUnit) {
        multiply_left_weights(a[0], weights.w, weights.k, of_w, rows, accumulate, sums);
      } else {
        for (int i = 0; !accumulate && i < rows * vectors; ++i) sums[i] = Vec<C>{};
        multiply_in_place(a, weights.w, weights.k, of_w, rows, sums, weights.next);
      }
      return;
    }
  }
  const int64_t k_count = operands<E>(weights.k), stride = k_count * kPanelColumns<C>;
  const int64_t w_stride = smaller(vectors, kPanelVectors) * kLanes<C>;
  multiply_tile<Part<E>, kParts<E>>({.a = a,
                                     .w = weights.packed + panel * stride,
                                     .w_stride = w_stride,
                                     .panel_stride = stride,
                                     .k_count = k_count,
                                     .interleaved = !ordered,
                                     .accumulate = accumulate,
                                     .ahead = ahead,
                                     .unit_rows = unit_rows},
                                    rows, vectors, sums);
}

}  // namespace fastrnn::FASTRNN_ISA
