// The CPU kernels' interface: raw pointers, sizes and strides, no tensor and no torch header.
//
// Dimensions: T time, N batch, I input, H hidden, P width of h (the projection, else H), G gate
// rows (4H for LSTM, H for Elman). Strides count elements; the last dimension of every array is
// contiguous. In every template below E is the type of the arrays' elements (of element.h), and C =
// Compute<E> that of sums, of c and of working memory.
//
// "Operands" are what products read, each of the size of a C: an element as C; or two neighbours of
// 16 bits side by side, a last odd one with zero; or, where an element is split into two parts of
// 16 bits, such pairs of all first parts and then of all second ones. K elements are operands(K) of
// them.
#pragma once

#include <cstdint>

#include "../cell_math.h"
#include "../schedule.h"
#include "element.h"

namespace fastrnn {

// An array of a row for each (step, batch row). Packed data has its rows one behind the other.
template <typename E>
struct Sequence {
  E* data;
  int64_t step_stride;  // unused when packed
  int64_t row_stride;

  FASTRNN_INLINE E* row(const Schedule& schedule, int64_t t, int64_t n) const {
    const int64_t step = schedule.offsets ? schedule.offsets[t] * row_stride : t * step_stride;
    return data + step + n * row_stride;
  }
};

// The part of a kernel's work that one thread does: a range of batch rows and a range of panels (of
// hidden units, kPanelVectors vectors each; see pack.h). Where threads share rows, sync is a
// barrier among them, passed between steps (and after the last one of the backward pass, whose
// results dh0 follows from); else it is null.
template <typename C>
struct Share {
  int64_t row_begin, row_end;
  int64_t panel_begin, panel_end;
  C* scratch;  // this thread's own, forward_scratch() elements; backward has none
  void (*sync)(void* barrier);
  void* barrier;
  // Whether forward is to write packed_ih and packed_hh itself, each panel before its first use: of
  // a share that has all rows.
  bool packs = false;
};

// Vectors of output columns that a packed panel is wide: the four gates of one vector of hidden
// units (LSTM), or four vectors of units (Elman, projection, gradients).
constexpr int kPanelVectors = 4;

// With fewer rows than this in a step the input projection is computed ahead for up to kHoistRows
// rows of several steps together, so that the weights are read once for all of them. (A matrix unit
// has a limit of its own, and so have large weights: forward_scratch.h.)
constexpr int64_t kHoistBelow = 6;
constexpr int64_t kHoistRows = 48;

// No more rows than this are ever multiplied ahead together.
constexpr int64_t kMostHoisted = 512;

// Whether weights (k, columns) stay in L2 beside the rows that they multiply.
FASTRNN_INLINE constexpr bool are_small(int64_t k, int64_t columns, int64_t element_bytes) {
  return k * columns * element_bytes <= 256 << 10;
}

// Rows of a weight's gradient summed in one accumulator before the sum is added to the total:
// bounds the rounding error over many steps, and is fixed, so that the result does not depend on
// the thread count.
constexpr int64_t kGradientRows = 256;

// Columns of weights that are read in place without being transposed: whole spans of so many.
constexpr int64_t kSpan = 256;

// Those of k operands that are in whole spans: where the last one ends.
FASTRNN_INLINE constexpr int64_t whole_spans(int64_t k) { return k / kSpan * kSpan; }

// One direction of one layer, forward.
template <typename E>
struct ForwardArgs {
  using C = Compute<E>;

  Cell cell;
  bool reverse;
  int64_t steps_before;  // that this thread's earlier calls ran: every other step, counted on
                         // from there, takes the last panels first
  Schedule schedule;
  int64_t input, hidden, width;  // I, H, P
  Sequence<const E> x;           // (T, N, I)
  const E *h0, *c0;              // (N, P), and (N, H) for LSTM
  int64_t h0_stride, c0_stride;  // of a row; 0 when every row starts from the same state
  const E *w_ih, *w_hh, *w_hr;   // (G, I), (G, P), (P, H); w_hr null: no projection
  // Those as written by pack_gates (w_hr as of an Elman cell; see Share::packs), or null. w_ih and
  // w_hh: null if they are read in place, or packed panel by panel; w_ih alone only if there are at
  // most kMostHoisted rows in all. w_hr: null if it is read in place, and only if elements are
  // operands.
  C *packed_ih, *packed_hh;
  const C* packed_w_hr;
  const C* bias;  // as written by pack_bias
  Sequence<E> h;  // (T, N, P), out; the next step reads it
  E* h_n;         // (N, P), out; may be h where T is 1
  C* c;           // (N, H) of the last step, kept between calls, LSTM only; may be c_n
  E* c_n;         // (N, H), out, LSTM only
  // Kept for the backward pass (null in inference), a row for each row of each step:
  E* gates;        // (rows, 4, H) activations, LSTM only
  E* c_all;        // (rows, H), LSTM only
  E* unprojected;  // (rows, H) o * tanh(c), projection only; (N, H) of one step if gates is null
};

// What the scratch of a share depends on: sizes of ForwardArgs (the input's may be a wider layer's)
// and of Share (panels may be more than it has).
struct ForwardSizes {
  int64_t steps, input, hidden, width;
  bool packed_ih, packed_hh, projected;
  int64_t share_rows, share_panels;
};

// Weights (K, columns) by whose columns a product's lanes run, in panels of kPanelVectors vectors:
// packed by pack_columns, or (E = C) read in place but for a last panel that is not full.
template <typename C>
struct ColumnWeights {
  int64_t columns;
  const C* full;         // the first panel
  int64_t k_stride;      // between rows of a full panel
  int64_t panel_stride;  // between full panels
  const C* partial;      // the last panel, packed, if not all of its columns exist
};

// One direction of one layer, backward through time. Step s of the loop is step T - 1 - s of
// forward.
template <typename E>
struct BackwardArgs {
  using C = Compute<E>;

  Cell cell;
  bool reverse;
  Schedule schedule;
  int64_t hidden, width;  // H, P
  Sequence<const E> dy;   // (T, N, P), or data null
  Sequence<const E> h;    // (T, N, P); read for Elman only
  const E* gates;         // as ForwardArgs
  const E* c_all;         // as ForwardArgs
  const E* c0;            // (N, H), LSTM only
  int64_t c0_stride;      // as ForwardArgs
  ColumnWeights<C> w_hh;  // (G, P)
  ColumnWeights<C> w_hr;  // (P, H), projection only
  bool projected;
  bool wants_dh0;  // else dh is left undefined
  C* dh;           // (N, P), in: gradient of h_n; out: gradient of h0. Null: zeros, not wanted
  C* dc;           // (N, H), likewise but never null, LSTM only
  C* dgates;       // (slots, N, operands(G)) gradients of the pre-activations, out
  C* dprojected;   // (slots, N, operands(P)) gradients of h, out, projection only
  int64_t slots;   // step s of the loop is kept in slot s % slots

  FASTRNN_INLINE int64_t step(int64_t s) const { return schedule.step(s, !reverse); }
};

// out[r] = a[r] . w (+ out[r] where accumulate), for rows given by pointers. A panel of w is packed
// before it is used, or, in_place (E = C), read where it lies if it is full.
template <typename E>
struct RowProductArgs {
  const Compute<E>* const* a;  // rows of operands(K)
  E* const* out;               // rows of `columns` elements
  int64_t k, columns;
  const E* w;  // (K, columns)
  bool in_place;
  bool accumulate;
  Compute<E>* scratch;  // row_product_scratch() elements, this thread's own
};

// The gradient of a weight: out[j][c] (+)= sum over rows of a[row][j] * b[row][c].
template <typename E>
struct OuterProduct {
  const E* const* b;
  int64_t columns;  // of b and of out
  Compute<E>* out;  // null: not wanted; not touched if these rows are all, and go to result
  E* result;        // null, or where the sum goes that is complete with these rows
};

// Those of the weights that share a; and their bias's: column_sums[j] (+)= sum over rows of
// a[row][j].
template <typename E>
struct OuterProductArgs {
  const Compute<E>* const* a;  // rows of operands
  int64_t rows, a_columns;     // rows: at most kGradientRows
  OuterProduct<E> products[2];
  Compute<E>* column_sums;  // null: not wanted
  bool accumulate;
  Compute<E>* scratch;  // outer_product_scratch() elements, this thread's own
};

// The kernels of one instruction set for one type of elements.
template <typename E>
struct Kernels {
  using C = Compute<E>;

  int lanes;            // C's in a vector
  int tile_rows;        // batch rows computed together
  int depth;            // numbers in an operand
  int parts;            // numbers of which an element is the sum
  int operand_unit;     // of which the operands of a part are a multiple
  bool reads_in_place;  // whether weights can be read where they lie
  // Whether rows of so many of w_ih or w_hh can, converted if need be.
  bool (*reads_rows_in_place)(int64_t k);

  // Steps [s_begin, s_end) of the loop, each once and in order. The first call starts from the
  // initial state, the last, with s_end = T, also leaves the final one.
  void (*forward)(const ForwardArgs<E>&, const Share<C>&, int64_t s_begin, int64_t s_end);
  // Elements that one share needs.
  int64_t (*forward_scratch)(const ForwardSizes&);
  // Steps [s_begin, s_end) of the loop; the last call, with s_end = T, also leaves dh0 in dh.
  void (*backward)(const BackwardArgs<E>&, const Share<C>&, int64_t s_begin, int64_t s_end);
  void (*row_product)(const RowProductArgs<E>&, int64_t row_begin, int64_t row_end);
  int64_t (*row_product_scratch)(int64_t k, int64_t columns, int64_t rows_in_place);  // 0: packed
  // Rows [j_begin, j_end) of out.
  void (*outer_product)(const OuterProductArgs<E>&, int64_t j_begin, int64_t j_end);
  // share: j_end - j_begin, at most.
  int64_t (*outer_product_scratch)(int64_t a_columns, int64_t share, int64_t columns0,
                                   int64_t columns1, int64_t rows);

  // Each writes panels [begin, end): see pack.h for the layouts.
  void (*pack_gates)(Cell, const E* w, int64_t k, int64_t hidden, C* out, int64_t begin,
                     int64_t end);
  void (*pack_bias)(Cell, const E* b_ih, const E* b_hh, int64_t hidden, C* out, int64_t begin,
                    int64_t end);  // null biases: zeros
  void (*pack_columns)(const E* w, int64_t k, int64_t columns, C* out, int64_t begin, int64_t end);

  // Panels that cover the hidden units of a cell, or any other columns.
  int64_t cell_panels(Cell cell, int64_t hidden) const {
    return divide_up(hidden, cell == Cell::lstm ? lanes : kPanelVectors * lanes);
  }
  int64_t panels(int64_t columns) const { return divide_up(columns, kPanelVectors * lanes); }
  int64_t operands(int64_t k) const {
    return divide_up(k, depth * operand_unit) * operand_unit * parts;
  }
  // Whether rows of operands end with zeros after k elements.
  bool pads(int64_t k) const { return operands(k) * depth != k * parts; }
  // Elements C of a packed matrix of k rows that gives the cell's gates, or any other columns.
  int64_t packed_gates(Cell cell, int64_t k, int64_t hidden) const {
    return operands(k) * round_up(hidden, lanes) * gate_count(cell);
  }
  int64_t packed_columns(int64_t k, int64_t columns) const {
    return operands(k) * round_up(columns, lanes);
  }
};

// amx: with a matrix unit for bfloat16, of which two make a float16; amx_fp16: for float16 too.
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx, amx_fp16 };

// The kernels of one set, or null where there are none: in this build, or of HighFloat and
// MediumFloat where float32 itself is no slower.
template <typename E>
const Kernels<E>* find_kernels(Isa isa);
template <>
const Kernels<HighFloat>* find_kernels(Isa isa);
template <>
const Kernels<MediumFloat>* find_kernels(Isa isa);

// Whether the processor has baseline, avx2 or avx512.
bool processor_has(Isa isa);

// The best of avx512 and those after it, on a processor that has avx512. Asks the system for the
// matrix unit; FASTRNN_AMX=0 in the environment leaves it alone.
Isa find_avx512_extension();

}  // namespace fastrnn
