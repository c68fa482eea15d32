// Packing of whole weights, once a call: the layouts are pack.h's.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// A square of operands of w, (rows, k) elements, transposed: the first `valid` rows from p on, and
// at most `elements` of each.
template <typename E>
FASTRNN_INLINE void load_operands(Vec<Compute<E>> (&square)[kLanes<Compute<E>>], const E* p,
                                  int64_t k_count, int64_t valid, int64_t elements) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>;
  if constexpr (kIsComputed<E>) {
    load_transposed<C>(square, p, k_count, valid, elements);
  } else {
    C copy[L * L];
    if (elements > L * kDepth<E>) elements = L * kDepth<E>;
    for (int row = 0; row < L; ++row) {
      store(copy + row * L, Vec<C>{});
      if (row < valid) make_operands(p + row * k_count, elements, copy + row * L);
    }
    load_transposed<C>(square, copy, L);
  }
}

// Writes the panel's rows of w, (rows, k) elements, to out as (operands, vector, lane).
template <typename E>
__attribute__((noinline)) void pack_panel(const E* w, int64_t k_count, const PanelRows& rows,
                                          Compute<E>* out) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>;
  const int64_t out_step = int64_t{rows.vectors} * L;
  const int64_t operand_count = operands<E>(k_count);
  for (int v = 0; v < rows.vectors; ++v) {
    const E* source = w + (rows.first + v * rows.step) * k_count;
    for (int64_t k = 0; k < operand_count; k += L) {
      Vec<C> square[L];
      const int64_t element = k * kDepth<E>;
      load_operands<E>(square, source + element, k_count, rows.valid(v), k_count - element);
      C* target = out + k * out_step + v * L;
      const int64_t columns = operand_count - k < L ? operand_count - k : L;
      for (int j = 0; j < columns; ++j) store(target + j * out_step, square[j]);
    }
  }
}

}  // namespace

// Panel p of a cell's weights: (I + P, vectors, lanes), the rows of w_ih before those of w_hh.
template <typename E>
void pack_weights(Cell cell, const E* w_ih, const E* w_hh, int64_t input, int64_t width,
                  int64_t hidden, Compute<E>* out, int64_t begin, int64_t end) {
  using C = Compute<E>;
  const int64_t k_count = operands<E>(input) + operands<E>(width);
  for (int64_t panel = begin; panel < end; ++panel) {
    const PanelRows rows = cell_panel_rows<C>(cell, hidden, panel);
    C* target = out + panel * k_count * kPanelColumns<C>;
    pack_panel(w_ih, input, rows, target);
    pack_panel(w_hh, width, rows, target + operands<E>(input) * rows.vectors * kLanes<C>);
  }
}

// Panel p of a cell's two biases, added: (vectors, lanes), every panel with room for four vectors.
template <typename E>
void pack_bias(Cell cell, const E* b_ih, const E* b_hh, int64_t hidden, Compute<E>* out,
               int64_t begin, int64_t end) {
  using C = Compute<E>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const PanelRows rows = cell_panel_rows<C>(cell, hidden, panel);
    for (int v = 0; v < rows.vectors; ++v) {
      const int64_t first = rows.first + v * rows.step;
      Vec<C> sum{};
      if (b_ih) sum = load_as(b_ih + first, rows.valid(v)) + load_as(b_hh + first, rows.valid(v));
      store(out + panel * kPanelColumns<C> + v * kLanes<C>, sum);
    }
  }
}

// w (rows, k) as the weights of a product that gives `rows` columns: panel p is (k, vectors,
// lanes).
template <typename E>
void pack_rows(const E* w, int64_t rows, int64_t k, Compute<E>* out, int64_t begin, int64_t end) {
  using C = Compute<E>;
  for (int64_t panel = begin; panel < end; ++panel) {
    pack_panel(w, k, cell_panel_rows<C>(Cell::rnn_tanh, rows, panel),
               out + panel * operands<E>(k) * kPanelColumns<C>);
  }
}

// w (k, columns) as the weights of a product that gives `columns` columns: panel p is
// (k, vectors, lanes).
template <typename E>
void pack_columns(const E* w, int64_t k, int64_t columns, Compute<E>* out, int64_t begin,
                  int64_t end) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns<C>;
    const int vectors = cell_panel_rows<C>(Cell::rnn_tanh, columns, panel).vectors;
    C* target = out + first * operands<E>(k);
    for (int64_t row = 0; row < k; row += kDepth<E>) {
      for (int v = 0; v < vectors; ++v, target += L) {
        const int64_t column = first + v * L;
        const E* in = w + row * columns + column;
        store(target, column_operands(in, row + 1 < k ? in + columns : nullptr, columns - column));
      }
    }
  }
}

#define INSTANTIATE(E)                                                                         \
  template void pack_weights(Cell, const E*, const E*, int64_t, int64_t, int64_t, Compute<E>*, \
                             int64_t, int64_t);                                                \
  template void pack_bias(Cell, const E*, const E*, int64_t, Compute<E>*, int64_t, int64_t);   \
  template void pack_rows(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);          \
  template void pack_columns(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
