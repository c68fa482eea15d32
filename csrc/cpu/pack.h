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

// The square at p, transposed; rows past `valid` and columns past `columns` are zero and are not
// read.
template <typename T>
FASTRNN_INLINE void load_transposed(Vec<T> (&square)[kLanes<T>], const T* p, int64_t ldw,
                                    int64_t valid, int64_t columns) {
  constexpr int L = kLanes<T>;
  if (valid >= L && columns >= L) {
    load_transposed<T>(square, p, ldw);
    return;
  }
  T copy[L * L];
  for (int row = 0; row < L; ++row) {
    store(copy + row * L, row < valid ? load(p + row * ldw, columns) : Vec<T>{});
  }
  load_transposed<T>(square, copy, L);
}

// Writes the panel's rows of w, (rows, k), to out as (k, vector, lane).
template <typename T>
__attribute__((noinline)) void pack_panel(const T* w, int64_t k_count, const PanelRows& rows,
                                          T* out) {
  constexpr int L = kLanes<T>;
  const int64_t out_step = int64_t{rows.vectors} * L;
  for (int v = 0; v < rows.vectors; ++v) {
    const T* source = w + (rows.first + v * rows.step) * k_count;
    for (int64_t k = 0; k < k_count; k += L) {
      Vec<T> square[L];
      load_transposed<T>(square, source + k, k_count, rows.valid(v), k_count - k);
      T* target = out + k * out_step + v * L;
      const int64_t columns = k_count - k < L ? k_count - k : L;
      for (int j = 0; j < columns; ++j) store(target + j * out_step, square[j]);
    }
  }
}

// The product of R rows with a strip of kLanes rows of w, (rows, k), transposed on the way.
template <typename T, int R>
struct StripProduct {
  static constexpr int L = kLanes<T>;

  const T* const (&a)[R];
  const T* strip;
  int64_t k_count;
  int64_t valid;  // rows of the strip that exist

  // block[r] += sum over k .. k + columns - 1; columns is at most L.
  FASTRNN_INLINE void add_columns(Vec<T> (&block)[R], int64_t k, int64_t columns) const {
    if (valid < L || columns < L) {
      add_partial(block, k, columns);
      return;
    }
    Vec<T> square[L];
    load_transposed<T>(square, strip + k, k_count);
    for (int j = 0; j < L; ++j) {
      for (int r = 0; r < R; ++r) block[r] = fma<T>(broadcast(a[r][k + j]), square[j], block[r]);
    }
  }

  __attribute__((noinline)) void add_partial(Vec<T> (&block)[R], int64_t k, int64_t columns) const {
    T copy[L * L];
    for (int row = 0; row < L; ++row) {
      store(copy + row * L, row < valid ? load(strip + row * k_count + k, columns) : Vec<T>{});
    }
    Vec<T> square[L];
    load_transposed<T>(square, copy, L);
    for (int j = 0; j < columns && j < L; ++j) {
      for (int r = 0; r < R; ++r) block[r] = fma<T>(broadcast(a[r][k + j]), square[j], block[r]);
    }
  }

  // sums[r * stride] += the product. Two blocks run side by side, so that neither waits for the
  // other's multiply-adds.
  FASTRNN_INLINE void add_to(Vec<T>* sums, int stride) const {
    int64_t k = 0;
    for (; k + 2 * kSumBlock <= k_count; k += 2 * kSumBlock) {
      Vec<T> block0[R] = {}, block1[R] = {};
      for (int64_t i = 0; i < kSumBlock; i += L) {
        add_columns(block0, k + i, L);
        add_columns(block1, k + kSumBlock + i, L);
      }
      for (int r = 0; r < R; ++r) sums[r * stride] = sums[r * stride] + block0[r] + block1[r];
    }
    for (; k < k_count; k += kSumBlock) {
      Vec<T> block[R] = {};
      const int64_t end = k_count - k < kSumBlock ? k_count : k + kSumBlock;
      for (int64_t i = k; i < end; i += L) add_columns(block, i, end - i);
      for (int r = 0; r < R; ++r) sums[r * stride] += block[r];
    }
  }
};

// Adds to sums the product of rows a with the panel's rows of w, (rows, k), transposing them on the
// way: as pack_panel followed by multiply, to the bit, for weights that are used only once.
template <typename T, int R, int C>
FASTRNN_INLINE void multiply_in_place(Sums<T, R, C>& sums, const T* const (&a)[R], const T* w,
                                      int64_t k_count, const PanelRows& rows) {
  for (int v = 0; v < C; ++v) {
    const T* strip = w + (rows.first + v * rows.step) * k_count;
    StripProduct<T, R>{a, strip, k_count, rows.valid(v)}.add_to(&sums.at[0][v], C);
  }
}

}  // namespace fastrnn::FASTRNN_ISA
