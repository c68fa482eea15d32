// Packing of whole weights, once a call: the layouts are pack.h's.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {

// Panel p of a cell's weights: (I + P, vectors, lanes), the rows of w_ih before those of w_hh.
template <typename T>
void pack_weights(Cell cell, const T* w_ih, const T* w_hh, int64_t input, int64_t width,
                  int64_t hidden, T* out, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const PanelRows rows = cell_panel_rows<T>(cell, hidden, panel);
    T* target = out + panel * (input + width) * kPanelColumns<T>;
    pack_panel(w_ih, input, rows, target);
    pack_panel(w_hh, width, rows, target + input * rows.vectors * kLanes<T>);
  }
}

// Panel p of a cell's two biases, added: (vectors, lanes), every panel with room for four vectors.
template <typename T>
void pack_bias(Cell cell, const T* b_ih, const T* b_hh, int64_t hidden, T* out, int64_t begin,
               int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const PanelRows rows = cell_panel_rows<T>(cell, hidden, panel);
    for (int v = 0; v < rows.vectors; ++v) {
      const int64_t first = rows.first + v * rows.step;
      Vec<T> sum{};
      if (b_ih) sum = load(b_ih + first, rows.valid(v)) + load(b_hh + first, rows.valid(v));
      store(out + panel * kPanelColumns<T> + v * kLanes<T>, sum);
    }
  }
}

// w (rows, k) as the weights of a product that gives `rows` columns: panel p is (k, vectors,
// lanes).
template <typename T>
void pack_rows(const T* w, int64_t rows, int64_t k, T* out, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    pack_panel(w, k, cell_panel_rows<T>(Cell::rnn_tanh, rows, panel),
               out + panel * k * kPanelColumns<T>);
  }
}

// w (k, columns) as the weights of a product that gives `columns` columns: panel p is
// (k, vectors, lanes).
template <typename T>
void pack_columns(const T* w, int64_t k, int64_t columns, T* out, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelColumns<T>;
    const int vectors = cell_panel_rows<T>(Cell::rnn_tanh, columns, panel).vectors;
    T* target = out + first * k;
    for (int64_t row = 0; row < k; ++row) {
      for (int v = 0; v < vectors; ++v, target += kLanes<T>) {
        const int64_t column = first + v * kLanes<T>;
        store(target, load(w + row * columns + column, columns - column));
      }
    }
  }
}

#define INSTANTIATE(T)                                                                         \
  template void pack_weights(Cell, const T*, const T*, int64_t, int64_t, int64_t, T*, int64_t, \
                             int64_t);                                                         \
  template void pack_bias(Cell, const T*, const T*, int64_t, T*, int64_t, int64_t);            \
  template void pack_rows(const T*, int64_t, int64_t, T*, int64_t, int64_t);                   \
  template void pack_columns(const T*, int64_t, int64_t, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
