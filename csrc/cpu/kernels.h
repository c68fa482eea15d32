// The CPU kernels' interface: raw pointers, sizes and strides, no tensor and no torch header.
//
// Dimensions: T time, N batch, I input, H hidden, P width of h (the projection, else H), G gate
// rows (4H for LSTM, H for Elman). Strides count elements; the last dimension of every array is
// contiguous. T is float or double in every template below.
#pragma once

#include <cstdint>

#include "../cell_math.h"

namespace fastrnn {

// Which rows exist at which step. A packed sequence is rows that end early: step t has rows
// 0 .. rows_at(t) - 1, and rows_at never grows with t.
struct Schedule {
  int64_t steps;           // T
  int64_t rows;            // N
  const int64_t* sizes;    // (T) rows at each step; null: N at every step
  const int64_t* offsets;  // (T) rows before each step; null: t * N

  FASTRNN_INLINE int64_t rows_at(int64_t t) const { return sizes ? sizes[t] : rows; }
  FASTRNN_INLINE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * rows; }
};

// An array of a row for each (step, batch row). Packed data has its rows one behind the other.
template <typename T>
struct Sequence {
  T* data;
  int64_t step_stride;  // unused when packed
  int64_t row_stride;

  FASTRNN_INLINE T* row(const Schedule& schedule, int64_t t, int64_t n) const {
    const int64_t step = schedule.offsets ? schedule.offsets[t] * row_stride : t * step_stride;
    return data + step + n * row_stride;
  }
};

// The part of a kernel's work that one thread does: a range of batch rows and a range of panels (of
// hidden units, kPanelVectors vectors each; see pack.cpp). Where threads share rows, sync is a
// barrier among them, passed once a step; else it is null.
template <typename T>
struct Share {
  int64_t row_begin, row_end;
  int64_t panel_begin, panel_end;
  T* scratch;  // this thread's own, forward_scratch() elements
  void (*sync)(void* barrier);
  void* barrier;
};

// Vectors of output columns that a packed panel is wide: the four gates of one vector of hidden
// units (LSTM), or four vectors of units (Elman, projection, gradients).
constexpr int kPanelVectors = 4;

// With fewer rows than this in a step the input projection is computed ahead for kHoistRows rows of
// several steps together, so that the weights are read once for all of them.
constexpr int64_t kHoistBelow = 6;
constexpr int64_t kHoistRows = 24;

// One direction of one layer, forward.
template <typename T>
struct ForwardArgs {
  Cell cell;
  bool reverse;
  Schedule schedule;
  int64_t input, hidden, width;  // I, H, P
  Sequence<const T> x;           // (T, N, I)
  const T *h0, *c0;              // (N, P), and (N, H) for LSTM
  int64_t h0_stride, c0_stride;  // of a row; 0 when every row starts from the same state
  const T *w_ih, *w_hh;          // (G, I), (G, P)
  const T* packed;       // both, as written by pack_weights; null: read w_ih and w_hh in place
  const T* bias;         // as written by pack_bias
  const T* packed_w_hr;  // (P, H) as written by pack_rows, or null: no projection
  Sequence<T> h;         // (T, N, P), out; the next step reads it
  Sequence<T> y;         // a second copy of h, or data null
  T* h_n;                // (N, P), out
  T* c_n;                // (N, H), out, LSTM only; holds c while the loop runs
  // Kept for the backward pass (null in inference), a row for each row of each step:
  T* gates;        // (rows, 4, H) activations, LSTM only
  T* cells;        // (rows, H), LSTM only
  T* unprojected;  // (rows, H) o * tanh(c), projection only
};

// One direction of one layer, backward through time. Step s of the loop is the last but s of
// forward.
template <typename T>
struct BackwardArgs {
  Cell cell;
  bool reverse;
  Schedule schedule;
  int64_t hidden, width;  // H, P
  Sequence<const T> dy;   // (T, N, P), or data null
  Sequence<const T> h;    // (T, N, P), Elman only
  const T* gates;         // as ForwardArgs
  const T* cells;         // as ForwardArgs
  const T* c0;            // (N, H), LSTM only
  int64_t c0_stride;      // as ForwardArgs
  const T* packed_w_hh;   // (G, P) as written by pack_columns
  const T* packed_w_hr;   // (P, H) as written by pack_columns, or null
  T* dh;                  // (N, P), in: gradient of h_n; out: gradient of h0
  T* dc;                  // (N, H), likewise, LSTM only
  T* dgates;              // (slots, N, G) gradients of the pre-activations, out
  T* dprojected;          // (slots, N, P) gradients of h, out, projection only
  int64_t slots;          // step s of the loop is kept in slot s % slots

  FASTRNN_INLINE int64_t step(int64_t s) const { return reverse ? s : schedule.steps - 1 - s; }
};

// out[r] = a[r] . w (+ out[r] where accumulate), for count rows given by pointers.
template <typename T>
struct RowProductArgs {
  const T* const* a;  // rows of K elements
  T* const* out;      // rows of `columns` elements
  int64_t k, columns;
  const T* packed;  // (K, columns) as written by pack_columns
  bool accumulate;
};

// out[j][c] (+)= sum over rows of a[row][j] * b[row][c], the gradient of a weight; and its bias's:
// column_sums[j] (+)= sum over rows of a[row][j].
template <typename T>
struct OuterProductArgs {
  const T* const* a;
  const T* const* b;
  int64_t rows, columns;  // columns: of b and of out
  T* out;                 // null: not wanted
  T* column_sums;         // likewise
  bool accumulate;
  T* scratch;  // outer_product_scratch(columns) elements, this thread's own
};

// The kernels of one instruction set.
template <typename T>
struct Kernels {
  int lanes;      // elements in a vector
  int tile_rows;  // batch rows computed together

  void (*forward)(const ForwardArgs<T>&, const Share<T>&);
  // Elements that one share of at most that many rows needs.
  int64_t (*forward_scratch)(Cell, int64_t hidden, int64_t rows, bool projected);
  // Steps [s_begin, s_end) of the loop; the last call, with s_end = T, also leaves dh0 in dh.
  void (*backward)(const BackwardArgs<T>&, const Share<T>&, int64_t s_begin, int64_t s_end);
  void (*row_product)(const RowProductArgs<T>&, int64_t row_begin, int64_t row_end);
  // Rows [j_begin, j_end) of out.
  void (*outer_product)(const OuterProductArgs<T>&, int64_t j_begin, int64_t j_end);
  int64_t (*outer_product_scratch)(int64_t columns);

  // Each writes panels [begin, end): see pack.cpp for the layouts.
  void (*pack_weights)(Cell, const T* w_ih, const T* w_hh, int64_t input, int64_t width,
                       int64_t hidden, T* out, int64_t begin, int64_t end);
  void (*pack_bias)(Cell, const T* b_ih, const T* b_hh, int64_t hidden, T* out, int64_t begin,
                    int64_t end);  // null biases: zeros
  void (*pack_rows)(const T* w, int64_t rows, int64_t k, T* out, int64_t begin, int64_t end);
  void (*pack_columns)(const T* w, int64_t k, int64_t columns, T* out, int64_t begin, int64_t end);

  // Panels that cover the hidden units of a cell, or any other columns.
  int64_t cell_panels(Cell cell, int64_t hidden) const {
    return divide_up(hidden, cell == Cell::lstm ? lanes : kPanelVectors * lanes);
  }
  int64_t panels(int64_t columns) const { return divide_up(columns, kPanelVectors * lanes); }
  // Columns of a packed matrix, padding included.
  int64_t padded_gates(Cell cell, int64_t hidden) const {
    return divide_up(hidden, lanes) * lanes * gate_count(cell);
  }
  int64_t padded(int64_t columns) const { return divide_up(columns, lanes) * lanes; }

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

enum class Isa { baseline, avx2, avx512 };

// The kernels of one set, or null where this build has none for it.
template <typename T>
const Kernels<T>* find_kernels(Isa isa);

}  // namespace fastrnn
