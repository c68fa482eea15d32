// The backward time loop of one direction of one layer: at each step, for each panel of hidden
// units and each block of rows, the gradient of h that comes back through the recurrent weights,
// and the cell's gradient, in registers.
#include "tile.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <typename T>
struct Backward {
  static constexpr int L = kLanes<T>;

  const BackwardArgs<T>& args;
  const Share<T>& share;
  const int64_t hidden = args.hidden;
  const int64_t gates = hidden * gate_count(args.cell);  // G

  // Where a tile's rows come from and go to.
  struct Step {
    int64_t t;
    const T* dgates_next;  // of the step that followed in the forward pass, (N, G); null: none
    T* dgates;             // of this step; null: the rows end here, their dh0 is wanted
    T* dprojected;         // of this step, (N, P)
    int64_t forward_previous, forward_previous_rows;  // the step whose c this one read, its rows
  };

  void run(int64_t s_begin, int64_t s_end) {
    const Schedule& schedule = args.schedule;
    for (int64_t s = s_begin; s < s_end; ++s) {
      const int64_t rows = schedule.rows_at(args.step(s));
      const int64_t rows_next = s > 0 ? schedule.rows_at(args.step(s - 1)) : 0;
      const int64_t both = rows < rows_next ? rows : rows_next;
      Step step = step_at(s);
      run_rows(step, 0, both);
      step.dgates_next = nullptr;
      run_rows(step, both, rows);
      finish_rows(s, rows, rows_next);
      if (share.sync) share.sync(share.barrier);
    }
    if (s_end == schedule.steps) {
      finish_rows(s_end, 0, schedule.rows_at(args.step(s_end - 1)));
    }
  }

  Step step_at(int64_t s) const {
    const int64_t N = args.schedule.rows;
    Step step{};
    step.t = args.step(s);
    step.dgates_next = s > 0 ? args.dgates + (s - 1) % args.slots * N * gates : nullptr;
    step.dgates = args.dgates + s % args.slots * N * gates;
    step.dprojected = args.dprojected ? args.dprojected + s % args.slots * N * args.width : nullptr;
    step.forward_previous = args.reverse ? step.t + 1 : step.t - 1;
    const bool exists = step.forward_previous >= 0 && step.forward_previous < args.schedule.steps;
    step.forward_previous_rows = exists ? args.schedule.rows_at(step.forward_previous) : 0;
    return step;
  }

  // Leaves dh0 of the rows [begin, end), whose first step of the forward pass was step s - 1 of
  // this loop, in dh.
  void finish_rows(int64_t s, int64_t begin, int64_t end) const {
    Step step{};
    step.dgates_next = args.dgates + (s - 1) % args.slots * args.schedule.rows * gates;
    run_rows(step, begin, end);
  }

  void run_rows(const Step& step, int64_t begin, int64_t end) const {
    if (begin < share.row_begin) begin = share.row_begin;
    if (end > share.row_end) end = share.row_end;
    if (begin >= end) return;
    for_tiles(args.width, begin, end, [&](int64_t n, int64_t column, auto rows, auto vectors) {
      recurrent_tile<decltype(rows)::value, decltype(vectors)::value>(step, n, column);
    });
    if (!args.packed_w_hr || !step.dgates) return;
    for_tiles(hidden, begin, end, [&](int64_t n, int64_t column, auto rows, auto vectors) {
      projection_tile<decltype(rows)::value, decltype(vectors)::value>(step, n, column);
    });
  }

  template <typename F>
  FASTRNN_INLINE void for_tiles(int64_t columns, int64_t begin, int64_t end, F&& f) const {
    const int64_t first = share.panel_begin * kPanelColumns<T>;
    const int64_t last = share.panel_end * kPanelColumns<T>;
    for_column_panels<T>(columns, [&](int64_t column, auto vectors) {
      if (column < first || column >= last) return;
      for_row_blocks(begin, end, [&](int64_t n, auto rows) { f(n, column, rows, vectors); });
    });
  }

  // The gradient of h for R rows and C vectors of its columns.
  template <int R, int C>
  __attribute__((noinline)) void recurrent_tile(const Step& step, int64_t n, int64_t column) const {
    Sums<T, R, C> dh{};
    if (step.dgates_next) {
      const T* a[R];
      for (int r = 0; r < R; ++r) a[r] = step.dgates_next + (n + r) * gates;
      multiply(dh, a, args.packed_w_hh + column * gates, gates, 0);
    } else {
      for (int r = 0; r < R; ++r) load_row(dh.at[r], args.dh + (n + r) * args.width, column);
    }
    if (!step.dgates) {
      for (int r = 0; r < R; ++r) {
        store_row(args.dh + (n + r) * args.width, column, args.width, dh.at[r]);
      }
      return;
    }
    if (args.dy.data) {
      Vec<T> dy[R][C];
      for (int r = 0; r < R; ++r) {
        load_row(dy[r], args.dy.row(args.schedule, step.t, n + r), column);
      }
      dh.add(dy);
    }
    if (args.packed_w_hr) {
      for (int r = 0; r < R; ++r) {
        store_row(step.dprojected + (n + r) * args.width, column, args.width, dh.at[r]);
      }
    } else {
      pointwise_rows(step, n, R, column, C, dh.at[0]);
    }
  }

  // The gradient of o * tanh(c), before the projection, for R rows and C vectors of hidden units.
  template <int R, int C>
  __attribute__((noinline)) void projection_tile(const Step& step, int64_t n, int64_t unit) const {
    Sums<T, R, C> dh{};
    const T* a[R];
    for (int r = 0; r < R; ++r) a[r] = step.dprojected + (n + r) * args.width;
    multiply(dh, a, args.packed_w_hr + unit * args.width, args.width, 0);
    pointwise_rows(step, n, R, unit, C, dh.at[0]);
  }

  void pointwise_rows(const Step& step, int64_t n, int rows, int64_t unit, int vectors,
                      const Vec<T>* dh) const {
    switch (args.cell) {
      case Cell::lstm: return pointwise<Cell::lstm>(step, n, rows, unit, vectors, dh);
      case Cell::rnn_tanh: return pointwise<Cell::rnn_tanh>(step, n, rows, unit, vectors, dh);
      case Cell::rnn_relu: return pointwise<Cell::rnn_relu>(step, n, rows, unit, vectors, dh);
    }
  }

  // From dh (rows, vectors) of rows n .. n + rows - 1 to the gradients of their pre-activations.
  template <Cell cell>
  __attribute__((noinline)) void pointwise(const Step& step, int64_t n, int rows,
                                           int64_t first_unit, int vectors,
                                           const Vec<T>* dh) const {
    for (const int64_t row_end = n + rows; n < row_end; ++n) {
      for (int c = 0; c < vectors; ++c, ++dh) {
        const int64_t unit = first_unit + c * L, valid = hidden - unit;
        if constexpr (cell == Cell::lstm) {
          pointwise_lstm(step, n, unit, valid, *dh);
        } else {
          const Vec<T> h = load(args.h.row(args.schedule, step.t, n) + unit, valid);
          store(step.dgates + n * gates + unit, rnn_pointwise_backward<Math<T>, cell>(h, *dh),
                valid);
        }
      }
    }
  }

  FASTRNN_INLINE void pointwise_lstm(const Step& step, int64_t n, int64_t unit, int64_t valid,
                                     Vec<T> dh) const {
    const int64_t row = args.schedule.offset(step.t) + n;
    const T* c_prev = n < step.forward_previous_rows
                          ? args.cells + (args.schedule.offset(step.forward_previous) + n) * hidden
                          : args.c0 + n * args.c0_stride;
    Vec<T> gate[kGates];
    for (int g = 0; g < kGates; ++g) {
      gate[g] = load(args.gates + (row * kGates + g) * hidden + unit, valid);
    }
    T* running_dc = args.dc + n * hidden + unit;
    Vec<T> dc = load(running_dc, valid);
    lstm_pointwise_backward<Math<T>>(gate, load(args.cells + row * hidden + unit, valid),
                                     load(c_prev + unit, valid), dh, dc);
    store(running_dc, dc, valid);
    for (int g = 0; g < kGates; ++g) {
      store(step.dgates + n * gates + g * hidden + unit, gate[g], valid);
    }
  }

  template <int C>
  FASTRNN_INLINE void load_row(Vec<T> (&out)[C], const T* row, int64_t column) const {
    for (int c = 0; c < C; ++c) {
      out[c] = load(row + column + c * L, args.width - column - c * L);
    }
  }
};

}  // namespace

template <typename T>
void backward(const BackwardArgs<T>& args, const Share<T>& share, int64_t s_begin, int64_t s_end) {
  Backward<T>{args, share}.run(s_begin, s_end);
}

template void backward(const BackwardArgs<float>&, const Share<float>&, int64_t, int64_t);
template void backward(const BackwardArgs<double>&, const Share<double>&, int64_t, int64_t);

}  // namespace fastrnn::FASTRNN_ISA
