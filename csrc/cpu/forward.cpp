// The forward time loop of one direction of one layer: at each step, for each panel of hidden units
// and each block of rows, the product with the weights and the cell's arithmetic, in registers.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <typename T>
struct Forward {
  static constexpr int L = kLanes<T>;

  const ForwardArgs<T>& args;
  const Share<T>& share;
  const int64_t hidden = args.hidden;
  const int64_t panel_units = kPanelColumns<T> / gate_count(args.cell);
  const int64_t panel_stride = (args.input + args.width) * kPanelColumns<T>;
  const int64_t shared_panels = share.panel_end - share.panel_begin;
  const bool hoist = args.packed && share.row_end - share.row_begin < kHoistBelow;
  T* const products = share.scratch;  // (kHoistRows, shared_panels, 4, L), if hoist
  T* const unprojected = share.scratch + kHoistRows * shared_panels * kPanelColumns<T>;

  // The state of a step that its tiles read.
  struct Step {
    int64_t t, previous;    // previous: the step whose h is read, -1 if none
    int64_t previous_rows;  // rows that the previous step has; the others start from h0
    int64_t rows_before;    // rows of all steps before t
    int64_t row_end;        // of the share, at this step
    const T* products;      // hoisted, of this step's first row of the share
    T* unprojected;         // o * tanh(c), row 0 of the batch
  };

  void run() {
    if (args.cell == Cell::lstm) copy_initial_cells();
    for (int64_t s = 0; s < args.schedule.steps;) {
      const int64_t s_end = hoist ? project_inputs(s) : s + 1;
      const T* step_products = products;
      for (; s < s_end; ++s) {
        Step step = step_at(s);
        step.products = step_products;
        run_step(step);
        if (args.packed_w_hr) project_output(step);
        if (share.sync) share.sync(share.barrier);
        if (step.row_end > share.row_begin) {
          step_products += (step.row_end - share.row_begin) * shared_panels * kPanelColumns<T>;
        }
      }
    }
    copy_final_h();
  }

  int64_t time_of(int64_t s) const { return args.reverse ? args.schedule.steps - 1 - s : s; }

  int64_t last_row(int64_t t) const {
    const int64_t rows = args.schedule.rows_at(t);
    return rows < share.row_end ? rows : share.row_end;
  }

  Step step_at(int64_t s) const {
    Step step{};
    step.t = time_of(s);
    step.previous = s > 0 ? time_of(s - 1) : -1;
    step.previous_rows = s > 0 ? args.schedule.rows_at(step.previous) : 0;
    step.rows_before = args.schedule.offset(step.t);
    step.row_end = last_row(step.t);
    step.unprojected = args.unprojected ? args.unprojected + step.rows_before * hidden
                                        : unprojected - share.row_begin * hidden;
    return step;
  }

  const T* previous_h(const Step& step, int64_t n) const {
    if (n < step.previous_rows) return args.h.row(args.schedule, step.previous, n);
    return args.h0 + n * args.h0_stride;
  }

  // w_ih . x + bias for the share's rows of as many steps, from step s on, as kHoistRows allows
  // (one at least). Returns the end of those steps.
  int64_t project_inputs(int64_t s) const {
    const T* rows[kHoistRows];
    int64_t count = 0;
    for (; s < args.schedule.steps; ++s) {
      const int64_t t = time_of(s);
      const int64_t row_end = last_row(t);
      if (count + (row_end - share.row_begin) > kHoistRows) break;
      for (int64_t n = share.row_begin; n < row_end; ++n) {
        rows[count++] = args.x.row(args.schedule, t, n);
      }
    }
    for_panels(count, [&](int64_t panel, auto vectors) {
      constexpr int C = decltype(vectors)::value;
      for_row_blocks(0, count, [&](int64_t first, auto block) {
        constexpr int R = decltype(block)::value;
        if constexpr (C <= kPanelVectors || R <= kTwoPanelRows) {
          Sums<T, R, C> sums{};
          const T* x[R];
          for (int r = 0; r < R; ++r) x[r] = rows[first + r];
          multiply_weights(sums, x, args.w_ih, args.input, panel, 0);
          for (int r = 0; r < R; ++r) {
            T* out = products +
                     ((first + r) * shared_panels + panel - share.panel_begin) * kPanelColumns<T>;
            for (int c = 0; c < C; ++c) store(out + c * L, sums.at[r][c]);
          }
        }
      });
    });
    return s;
  }

  void run_step(const Step& step) const {
    for_panels(step.row_end - share.row_begin, [&](int64_t panel, auto vectors) {
      for_row_blocks(share.row_begin, step.row_end, [&](int64_t n, auto rows) {
        constexpr int R = decltype(rows)::value, C = decltype(vectors)::value;
        if constexpr (C <= kPanelVectors || R <= kTwoPanelRows) tile<R, C>(step, n, panel);
      });
    });
  }

  // Calls f(panel, Constant<vectors>) over the share's panels, two full ones at a time where few
  // rows are to be computed.
  template <typename F>
  FASTRNN_INLINE void for_panels(int64_t rows, F&& f) const {
    if (rows <= 0) return;
    for (int64_t panel = share.panel_begin; panel < share.panel_end; ++panel) {
      if (args.packed && rows <= kTwoPanelRows && panel + 1 < share.panel_end &&
          cell_panel_rows<T>(args.cell, hidden, panel + 1).vectors == kPanelVectors) {
        f(panel++, Constant<2 * kPanelVectors>{});
      } else {
        with_constant<kPanelVectors>(cell_panel_rows<T>(args.cell, hidden, panel).vectors,
                                     [&](auto vectors) { f(panel, vectors); });
      }
    }
  }

  // R rows from n on, C vectors of pre-activations from `panel` on.
  template <int R, int C>
  __attribute__((noinline)) void tile(const Step& step, int64_t n, int64_t panel) const {
    Sums<T, R, C> sums{};
    const T* a[R];
    if (hoist) {
      for (int r = 0; r < R; ++r) {
        const T* in = step.products +
                      ((n + r - share.row_begin) * shared_panels + panel - share.panel_begin) *
                          kPanelColumns<T>;
        for (int c = 0; c < C; ++c) sums.at[r][c] = load(in + c * L);
      }
    } else {
      for (int r = 0; r < R; ++r) a[r] = args.x.row(args.schedule, step.t, n + r);
      multiply_weights(sums, a, args.w_ih, args.input, panel, 0);
    }
    for (int r = 0; r < R; ++r) a[r] = previous_h(step, n + r);
    multiply_weights(sums, a, args.w_hh, args.width, panel, args.input);
    finish_rows(step, n, R, panel, C, sums.at[0]);
  }

  // Adds w . a; packed, w is the part of the panel that starts at k_offset.
  template <int R, int C>
  FASTRNN_INLINE void multiply_weights(Sums<T, R, C>& sums, const T* (&a)[R], const T* w, int64_t k,
                                       int64_t panel, int64_t k_offset) const {
    constexpr int panel_vectors = C < kPanelVectors ? C : kPanelVectors;
    if (args.packed) {
      const T* packed = args.packed + panel * panel_stride + k_offset * panel_vectors * L;
      multiply(sums, a, packed, k, panel_stride);
    } else if constexpr (C <= kPanelVectors) {
      multiply_in_place(sums, a, w, k, cell_panel_rows<T>(args.cell, hidden, panel));
    }
  }

  // From the products (rows, vectors) of rows n .. n + rows - 1 to their state.
  void finish_rows(const Step& step, int64_t n, int rows, int64_t panel, int vectors,
                   const Vec<T>* sums) const {
    switch (args.cell) {
      case Cell::lstm: return finish<Cell::lstm>(step, n, rows, panel, vectors, sums);
      case Cell::rnn_tanh: return finish<Cell::rnn_tanh>(step, n, rows, panel, vectors, sums);
      case Cell::rnn_relu: return finish<Cell::rnn_relu>(step, n, rows, panel, vectors, sums);
    }
  }

  template <Cell cell>
  __attribute__((noinline)) void finish(const Step& step, int64_t n, int rows, int64_t panel,
                                        int vectors, const Vec<T>* sums) const {
    constexpr int G = gate_count(cell);
    const T* bias = args.bias + panel * kPanelColumns<T>;
    for (const int64_t row_end = n + rows; n < row_end; ++n, sums += vectors) {
      T* h_row =
          args.packed_w_hr ? step.unprojected + n * hidden : args.h.row(args.schedule, step.t, n);
      T* y_row = args.y.data && !args.packed_w_hr ? args.y.row(args.schedule, step.t, n) : nullptr;
      int64_t unit = panel * panel_units;
      for (int c = 0; c < vectors; c += G, unit += L) {
        const int64_t valid = hidden - unit;
        // The bias is added last: where it is large, every sum on top of it would be rounded to it.
        Vec<T> pre[G], h;
        for (int g = 0; g < G; ++g) pre[g] = sums[c + g] + load(bias + (c + g) * L);
        if constexpr (cell == Cell::lstm) {
          h = finish_lstm(step, n, unit, valid, pre);
        } else {
          h = rnn_pointwise_forward<Math<T>, cell>(pre[0]);
        }
        store(h_row + unit, h, valid);
        if (y_row) store(y_row + unit, h, valid);
      }
    }
  }

  FASTRNN_INLINE Vec<T> finish_lstm(const Step& step, int64_t n, int64_t unit, int64_t valid,
                                    Vec<T> (&gate)[kGates]) const {
    T* running_c = args.c_n + n * hidden + unit;
    Vec<T> c = load(running_c, valid);
    const Vec<T> h = lstm_pointwise_forward<Math<T>>(gate, c);
    store(running_c, c, valid);
    if (args.gates) {
      const int64_t row = step.rows_before + n;
      for (int g = 0; g < kGates; ++g) {
        store(args.gates + (row * kGates + g) * hidden + unit, gate[g], valid);
      }
      store(args.cells + row * hidden + unit, c, valid);
    }
    return h;
  }

  // h = w_hr . (o * tanh(c)), for every row of the share.
  void project_output(const Step& step) const {
    for_column_panels<T>(args.width, [&](int64_t column, auto vectors) {
      constexpr int C = decltype(vectors)::value;
      for_row_blocks(share.row_begin, step.row_end, [&](int64_t n, auto rows) {
        constexpr int R = decltype(rows)::value;
        Sums<T, R, C> sums{};
        const T* a[R];
        for (int r = 0; r < R; ++r) a[r] = step.unprojected + (n + r) * hidden;
        multiply(sums, a, args.packed_w_hr + column * hidden, hidden, 0);
        for (int r = 0; r < R; ++r) {
          store_row(args.h.row(args.schedule, step.t, n + r), column, args.width, sums.at[r]);
          if (args.y.data) {
            store_row(args.y.row(args.schedule, step.t, n + r), column, args.width, sums.at[r]);
          }
        }
      });
    });
  }

  // The hidden units of this share.
  int64_t unit_begin() const { return share.panel_begin * panel_units; }
  int64_t unit_count() const {
    const int64_t end = share.panel_end * panel_units;
    return (end < hidden ? end : hidden) - unit_begin();
  }

  void copy_initial_cells() const {
    for (int64_t n = share.row_begin; n < share.row_end; ++n) {
      __builtin_memcpy(args.c_n + n * hidden + unit_begin(),
                       args.c0 + n * args.c0_stride + unit_begin(), unit_count() * sizeof(T));
    }
  }

  void copy_final_h() const {
    const int64_t begin = args.packed_w_hr ? 0 : unit_begin();
    const int64_t count = args.packed_w_hr ? args.width : unit_count();
    int64_t t = args.reverse ? 0 : args.schedule.steps - 1;
    for (int64_t n = share.row_begin; n < share.row_end; ++n) {
      while (n >= args.schedule.rows_at(t)) --t;
      __builtin_memcpy(args.h_n + n * args.width + begin, args.h.row(args.schedule, t, n) + begin,
                       count * sizeof(T));
    }
  }
};

}  // namespace

template <typename T>
void forward(const ForwardArgs<T>& args, const Share<T>& share) {
  Forward<T>{args, share}.run();
}

template <typename T>
int64_t forward_scratch(Cell cell, int64_t hidden, int64_t rows, bool projected) {
  constexpr int64_t L = kLanes<T>;
  const int64_t columns = (hidden + L - 1) / L * L * gate_count(cell);
  const int64_t panels = (columns + kPanelColumns<T> - 1) / kPanelColumns<T>;
  return kHoistRows * panels * kPanelColumns<T> + (projected ? rows * hidden : 0);
}

template void forward(const ForwardArgs<float>&, const Share<float>&);
template void forward(const ForwardArgs<double>&, const Share<double>&);
template int64_t forward_scratch<float>(Cell, int64_t, int64_t, bool);
template int64_t forward_scratch<double>(Cell, int64_t, int64_t, bool);

}  // namespace fastrnn::FASTRNN_ISA
