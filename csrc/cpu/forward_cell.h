// From a step's products to its state: the cell's arithmetic of the forward pass.
#pragma once

#include "tile.h"

namespace fastrnn::FASTRNN_ISA {

// Where a step's results go, beside what ForwardArgs says.
template <typename E>
struct StepResults {
  int64_t t;
  int64_t rows_before;  // rows of all steps before t
  E* unprojected;       // o * tanh(c), row 0 of the batch, if there is a projection
};

// Where a row's h goes, or, if there is a projection, what is to be projected.
template <typename E>
FASTRNN_INLINE E* result_row(const ForwardArgs<E>& args, const StepResults<E>& step, int64_t n) {
  return args.w_hr ? step.unprojected + n * args.hidden : args.h.row(args.schedule, step.t, n);
}

// c of rows n .. n + rows - 1 and of the units from `unit` on, of which sums has the first gate's
// products in vector 0 of every row; there it leaves the activation of the output gate. Keeps what
// the backward pass wants.
template <typename E, typename Lanes>
FASTRNN_INLINE void update_c(const ForwardArgs<E>& args, const StepResults<E>& step, int64_t n,
                             int rows, int64_t unit, Lanes lanes, const Compute<E>* bias,
                             Vec<Compute<E>>* sums, int vectors) {
  using C = Compute<E>;
  const int64_t H = args.hidden, row = step.rows_before + n;
  C* c_row = args.c + n * H + unit;
  E* gates = args.gates ? args.gates + row * kGates * H + unit : nullptr;
  E* c_all = args.gates ? args.c_all + row * H + unit : nullptr;
  for (int r = 0; r < rows; ++r, sums += vectors, c_row += H) {
    const C* const products = reinterpret_cast<const C*>(sums);
    Vec<C> gate[kGates];
    for (int g = 0; g < kGates; ++g) {
      // The gates of fewer units than a vector has lanes lie side by side. The bias is added
      // last: where it is large, every sum on top of it would be rounded to it.
      gate[g] = load(products + g * lanes, lanes) + load(bias + g * lanes, lanes);
    }
    const Vec<C> c = lstm_pointwise_c<Math<E>>(gate, load(c_row, lanes));
    store(c_row, c, lanes);
    if (gates) {
      for (int g = 0; g < kGates; ++g) store_as(gates + g * H, gate[g], lanes);
      store_as(c_all, c, lanes);
      gates += kGates * H;
      c_all += H;
    }
    sums[0] = gate[kOutput];
  }
}

// From the products (rows, vectors) of rows n .. n + rows - 1 and of a panel's units to their
// state.
template <Cell cell, typename E>
__attribute__((noinline)) static void finish_rows(const ForwardArgs<E>& args,
                                                  const StepResults<E>& step, int64_t n, int rows,
                                                  int64_t panel, int vectors,
                                                  Vec<Compute<E>>* sums) {
  using C = Compute<E>;
  constexpr int L = kLanes<C>, G = gate_count(cell);
  const int64_t first_unit = panel * (kPanelColumns<C> / G), H = args.hidden;
  const C* const bias = args.bias + panel * kPanelColumns<C>;
  // Calls f(first of a unit's vectors, unit, lanes) for each vector of units; lanes is a constant
  // if all are units.
  const auto for_units = [&](auto&& f) {
    for (int v = 0; v < vectors; v += G) {
      const int64_t unit = first_unit + v / G * L;
      if (H - unit >= L) {
        f(v, unit, Constant<L>{});
      } else {
        f(v, unit, H - unit);
      }
    }
  };
  E* const h = result_row(args, step, n);
  const int64_t h_stride = args.w_hr ? H : args.h.row_stride;
  if constexpr (cell == Cell::lstm) {
    // c of all rows before h of any: c to h takes as long as all before it, and a processor does
    // not look that far ahead for something else to do.
    for_units([&](int v, int64_t unit, auto lanes) {
      update_c(args, step, n, rows, unit, lanes, bias + v * L, sums + v, vectors);
    });
    for_units([&](int v, int64_t unit, auto lanes) {
      for (int r = 0; r < rows; ++r) {
        const Vec<C> c = load(args.c + (n + r) * H + unit, lanes);
        store_as(h + r * h_stride + unit, sums[r * vectors + v] * Math<E>::tanh(c), lanes);
      }
    });
  } else {
    for_units([&](int v, int64_t unit, auto lanes) {
      const Vec<C> bias_v = load(bias + v * L, lanes);
      for (int r = 0; r < rows; ++r) {
        const Vec<C> pre = sums[r * vectors + v] + bias_v;
        store_as(h + r * h_stride + unit, rnn_pointwise_forward<Math<E>, cell>(pre), lanes);
      }
    });
  }
}

}  // namespace fastrnn::FASTRNN_ISA
