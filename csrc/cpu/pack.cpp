// Packing of whole weights, once a call: the layouts are pack.h's.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// Where packing puts a part of a panel: `step` elements lie from one operand to that which is next
// in the order of summation.
template <typename E>
struct PanelOrder {
  using C = Compute<E>;
  static constexpr int L = kLanes<C>;

  const int64_t step;
  const int64_t count;                                             // operands
  const int64_t spans_end = kDealsSpans ? whole_spans(count) : 0;  // of those in whole spans

  // Writes a square's columns as operands k and on, as far as they exist.
  FASTRNN_INLINE void store_square(const Vec<C> (&square)[L], int64_t k, C* out) const {
    int64_t block_step = step, next_step = kSpanBlocks * step;
    if (k < spans_end) {
      block_step = kSumBlock * step;
      next_step = step;
      out += (k / kSpan * kSpan + k % kSpan / kSpanBlocks) * step;
      out += k % kSpanBlocks * block_step;  // where a vector holds fewer
    } else {
      out += k * step;
    }
    if (count - k >= L) {
      for (int j = 0; j < L; ++j) {
        store(out + j % kSpanBlocks * block_step + j / kSpanBlocks * next_step, square[j]);
      }
    } else {
      Vec<C> columns[L];  // or the square would lie in memory at any k
      for (int j = 0; j < L; ++j) columns[j] = square[j];
      for (int64_t j = 0; j < count - k; ++j) store(out + j * step, columns[j]);
    }
  }
};

template <typename E, int part>
FASTRNN_INLINE void pack_square(const E* w, int64_t k_count, const VectorRows<Compute<E>>& rows,
                                int64_t k, const PanelOrder<E>& order, Compute<E>* out) {
  Vec<Compute<E>> square[kLanes<Compute<E>>];
  const int64_t element = k * kDepth<E>;
  load_operands<E, part>(square, w + element, k_count, rows, k_count - element);
  order.store_square(square, k, out + part * order.count * order.step);
}

// Writes the panel's rows of w, (rows, k) elements, to out as (parts, operands, vector, lane),
// operands in the order of summation.
template <typename E>
__attribute__((noinline)) void pack_panel(const E* w, int64_t k_count, const PanelRows& rows,
                                          Compute<E>* out) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>;
  const PanelOrder<E> order{int64_t{rows.vectors} * L, part_operands<E>(k_count)};
  for (int v = 0; v < rows.vectors; ++v, out += L) {
    const VectorRows<C> of_vector(rows, v);
    Fetcher following{w + following_row<C>(rows, v) * k_count};
    for (int64_t k = 0; k < order.count; k += L) {
      following.fetch(L * L * kDepth<E> * int64_t{sizeof(E)});
      pack_square<E, 0>(w, k_count, of_vector, k, order, out);
      if constexpr (kParts<E> == 2) pack_square<E, 1>(w, k_count, of_vector, k, order, out);
    }
  }
}

}  // namespace

// w (G, k), the rows of a cell's gates; panel p is (k, vectors, lanes).
template <typename E>
void pack_gates(Cell cell, const E* w, int64_t k, int64_t hidden, Compute<E>* out, int64_t begin,
                int64_t end) {
  using C = Compute<E>;
  for (int64_t panel = begin; panel < end; ++panel) {
    pack_panel(w, k, cell_panel_rows<C>(cell, hidden, panel),
               out + panel * operands<E>(k) * kPanelColumns<C>);
  }
}

// Panel p of a cell's two biases, added: its columns, every panel with room for four vectors.
template <typename E>
void pack_bias(Cell cell, const E* b_ih, const E* b_hh, int64_t hidden, Compute<E>* out,
               int64_t begin, int64_t end) {
  using C = Compute<E>;
  constexpr int64_t L = kLanes<C>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const PanelRows rows = cell_panel_rows<C>(cell, hidden, panel);
    C* target = out + panel * kPanelColumns<C>;
    for (int64_t column = 0; column < kPanelColumns<C>; column += L) {
      store(target + column, Vec<C>{});
    }
    for (int64_t column = 0; b_ih && column < rows.columns; column += rows.group) {
      for (int64_t i = 0; i < rows.group; i += L) {
        const int64_t row = rows.row(column + i), count = rows.group - i;
        store(target + column + i, load_as(b_ih + row, count) + load_as(b_hh + row, count), count);
      }
    }
  }
}

// Rows that pack_columns fetches ahead: it reads a few cache lines of each.
constexpr int64_t kRowsAhead = 16;

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
    const int64_t part_size = part_operands<E>(k) * vectors * L;
    const C* const end = target + part_size;
    for (int64_t row = 0; row < k; row += kDepth<E>) {
      for (int64_t ahead = row + kRowsAhead; ahead < row + kRowsAhead + kDepth<E>; ++ahead) {
        Fetcher(w + ahead * columns + first).fetch(kPanelColumns<C> * int64_t{sizeof(E)});
      }
      for (int v = 0; v < vectors; ++v, target += L) {
        const int64_t column = first + v * L;
        const E* const in = w + row * columns + column;
        const E* const next = row + 1 < k ? in + columns : nullptr;
        for_parts<E>([&](auto part) {
          constexpr int p = decltype(part)::value;
          store(target + p * part_size, column_operands<E, p>(in, next, columns - column));
        });
      }
    }
    for (; target < end; target += L) {
      for (int p = 0; p < kParts<E>; ++p) store(target + p * part_size, Vec<C>{});
    }
  }
}

#define INSTANTIATE(E)                                                                       \
  template void pack_gates(Cell, const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t); \
  template void pack_bias(Cell, const E*, const E*, int64_t, Compute<E>*, int64_t, int64_t); \
  template void pack_columns(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
