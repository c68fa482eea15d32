// The backward time loop of one direction of one layer: at each step, for each panel of hidden
// units and each block of rows, the gradient of h that comes back through the recurrent weights,
// and the cell's gradient, in registers.
#include "tile.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// A panel of more operands than kMostOperands is, with the rows that it multiplies, more than the
// L2 cache that a processor without AVX-512 is sure to have: kOperandsTogether of them then serve
// kRowsTogether rows before the next do. Not if rows are so few that w may be read in place.
constexpr bool kDividesPanels = FASTRNN_REGISTERS == 16;
constexpr int64_t kMostOperands = 1024;
constexpr int64_t kOperandsTogether = 512;
constexpr int64_t kRowsTogether = 24 * kTileRows;

template <typename E>
struct Backward {
  using C = Compute<E>;
  static constexpr int L = kLanes<C>;

  const BackwardArgs<E>& args;
  const Share<C>& share;
  const int64_t hidden = args.hidden;
  // Of rows of dgates and of dprojected:
  const int64_t gate_operands = operands<E>(hidden * gate_count(args.cell));
  const int64_t h_operands = operands<E>(args.width);
  const int unit_rows = unit_rows_for(share.row_end - share.row_begin);
  // What the cell's gradient reads of the forward pass.
  const bool fetches = fetches_lines<E>(args.schedule, hidden, gate_operands);

  // Where a tile's rows come from and go to.
  struct Step {
    int64_t t;
    bool backwards;        // the order of panels, as in the forward pass
    const C* dgates_next;  // of the step that followed in the forward pass, (N, gate_operands);
                           // null: none
    C* dgates;             // of this step; null: the rows end here, their dh0 is wanted
    C* dprojected;         // of this step, (N, h_operands)
    int64_t forward_previous, forward_previous_rows;  // the step whose c this one read, its rows
  };

  void run(int64_t s_begin, int64_t s_end) const {
    const Schedule& schedule = args.schedule;
    for (int64_t s = s_begin; s < s_end; ++s) {
      const int64_t rows = schedule.rows_at(args.step(s));
      const int64_t rows_next = s > 0 ? schedule.rows_at(args.step(s - 1)) : 0;
      const int64_t both = smaller(rows, rows_next);
      Step step = step_at(s);
      run_rows(step, 0, both);
      step.dgates_next = nullptr;
      run_rows(step, both, rows);
      finish_dh0(s, rows, rows_next);
      if (share.sync) share.sync(share.barrier);
    }
    if (s_end == schedule.steps) {
      finish_dh0(s_end, 0, schedule.rows_at(args.step(s_end - 1)));
    }
  }

  Step step_at(int64_t s) const {
    const int64_t N = args.schedule.rows;
    Step step{};
    step.t = args.step(s);
    step.backwards = s % 2;
    step.dgates_next = s > 0 ? args.dgates + (s - 1) % args.slots * N * gate_operands : nullptr;
    step.dgates = args.dgates + s % args.slots * N * gate_operands;
    step.dprojected = args.projected ? args.dprojected + s % args.slots * N * h_operands : nullptr;
    if (s + 1 < args.schedule.steps) {
      step.forward_previous = args.step(s + 1);
      step.forward_previous_rows = args.schedule.rows_at(step.forward_previous);
    }
    return step;
  }

  // Leaves dh0 of the rows [begin, end), whose first step of the forward pass was step s - 1 of
  // this loop, in dh.
  void finish_dh0(int64_t s, int64_t begin, int64_t end) const {
    if (!args.wants_dh0) return;
    Step step{};
    step.dgates_next = args.dgates + (s - 1) % args.slots * args.schedule.rows * gate_operands;
    run_rows(step, begin, end);
  }

  void run_rows(const Step& step, int64_t begin, int64_t end) const {
    if (begin < share.row_begin) begin = share.row_begin;
    end = smaller(end, share.row_end);
    if (begin >= end) return;
    const auto finish = [&](int64_t n, int rows, int64_t column, int vectors, Vec<C>* dh) {
      finish_recurrent_tile(step, n, rows, column, vectors, dh);
    };
    if (step.dgates_next) {
      multiply(step, {step.dgates_next, gate_operands, args.w_hh, true}, begin, end, finish);
    } else {
      for_panels(args.width, step.backwards, end - begin,
                 [&](int64_t column, int vectors, int64_t) {
                   for_row_blocks(begin, end, [&](int64_t n, int rows) {
                     Tile<C> dh;
                     load_dh(n, rows, column, vectors, dh.at);
                     finish(n, rows, column, vectors, dh.at);
                   });
                 });
    }
    if (!args.projected || !step.dgates) return;
    // The gradient of o * tanh(c), before the projection.
    multiply(step, {step.dprojected, h_operands, args.w_hr, false}, begin, end,
             [&](int64_t n, int rows, int64_t unit, int vectors, const Vec<C>* dh) {
               run_pointwise(step, n, rows, unit, vectors, dh);
             });
  }

  // Calls f(column, vectors, the next call's column or -1) over the share's part of a row of
  // `columns`, two full panels at a time where few rows are to be computed.
  template <typename F>
  FASTRNN_INLINE void for_panels(int64_t columns, bool backwards, int64_t rows, F&& f) const {
    const int64_t panel_end = smaller(share.panel_end, divide_up(columns, kPanelColumns<C>));
    if (panel_end <= share.panel_begin) return;
    const int64_t group_width = rows <= kTwoPanelRows ? 2 : 1;
    const int64_t groups = divide_up(panel_end - share.panel_begin, group_width);
    const auto column_of = [&](int64_t i) {
      const int64_t group = backwards ? groups - 1 - i : i;
      return (share.panel_begin + group * group_width) * kPanelColumns<C>;
    };
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t column = column_of(i), next = i + 1 < groups ? column_of(i + 1) : -1;
      int64_t vectors = divide_up(columns - column, L);
      if (group_width == 2 && column / kPanelColumns<C> + 1 < panel_end) {
        if (columns - column >= 2 * kPanelColumns<C>) {
          f(column, 2 * kPanelVectors, next);
          continue;
        }
        f(column + kPanelColumns<C>, static_cast<int>(vectors - kPanelVectors), next);
        vectors = kPanelVectors;
      }
      f(column, static_cast<int>(smaller(vectors, kPanelVectors)), next);
    }
  }

  // The factors of a product: rows a (N, k), and w.
  struct Factors {
    const C* a;
    int64_t k;
    const ColumnWeights<C>& w;
    bool recurrent;  // w_hh, or else w_hr
  };

  // Calls finish(row, rows, column, vectors, sums) for each tile of rows [begin, end) of a product.
  template <typename F>
  FASTRNN_INLINE void multiply(const Step& step, const Factors& factors, int64_t begin, int64_t end,
                               F&& finish) const {
    const int64_t rows = end - begin, columns = factors.w.columns;
    if (kDividesPanels && factors.k > kMostOperands && rows > 2 * kTileRows) {
      for_panels(columns, step.backwards, rows, [&](int64_t column, int vectors, int64_t next) {
        for (int64_t first = begin; first < end; first += kRowsTogether) {
          const int64_t last = smaller(first + kRowsTogether, end);
          Vec<C> sums[kRowsTogether * kPanelVectors];
          multiply_rows(step, factors, first, last, column, vectors, last < end ? column : next,
                        sums);
          Vec<C>* tile = sums;
          for_row_blocks(first, last, [&](int64_t n, int block) {
            finish(n, block, column, vectors, tile);
            tile += block * vectors;
          });
        }
      });
      return;
    }
    // Twice in the code: asking at each tile cost narrow layers 2%.
    const auto multiply_panels = [&](auto fetching) {
      for_panels(columns, step.backwards, rows, [&](int64_t column, int vectors, int64_t) {
        for_row_blocks(begin, end, [&](int64_t n, int block) {
          if constexpr (decltype(fetching)::value == 1) {
            fetch_tile(step, factors.recurrent, n, block, column, vectors);
          }
          Tile<C> sums;
          multiply_block(factors, n, block, 0, factors.k, column, vectors, sums.at, {});
          finish(n, block, column, vectors, sums.at);
        });
      });
    };
    if (fetches) {
      multiply_panels(Constant<1>{});
    } else {
      multiply_panels(Constant<0>{});
    }
  }

  // Leaves the tiles of rows [begin, end) in sums, one behind the other. next: the column of the
  // panel that is multiplied then, or -1.
  void multiply_rows(const Step& step, const Factors& factors, int64_t begin, int64_t end,
                     int64_t column, int vectors, int64_t next, Vec<C>* sums) const {
    const int64_t parts = fetching_blocks(end - begin);
    const auto panel = [&](int64_t first) {
      return factors.w.full + first / kPanelColumns<C> * factors.w.panel_stride;
    };
    for (int64_t done = 0; done < factors.k; done += kOperandsTogether) {
      const int64_t count = smaller(factors.k - done, kOperandsTogether);
      const C* following = next < 0 ? nullptr : panel(next);
      if (done + count < factors.k) following = panel(column) + (done + count) * kPanelColumns<C>;
      Vec<C>* tile = sums;
      for_row_blocks(begin, end, [&](int64_t n, int block) {
        if (fetches && done + count == factors.k) {
          fetch_tile(step, factors.recurrent, n, block, column, vectors);
        }
        const int64_t part = divide_up(n - begin, kTileRows);  // a block may have fewer rows
        Ahead<C> ahead;
        if (following && part < parts) {
          const int64_t columns = kPanelColumns<C> / parts;
          ahead = {following + part * columns * count, columns};
        }
        multiply_block(factors, n, block, done, count, column, vectors, tile, ahead);
        tile += block * vectors;
      });
    }
  }

  // The product with operands k and on: leaves it in sums or, k > 0, adds it.
  FASTRNN_INLINE void multiply_block(const Factors& factors, int64_t n, int rows, int64_t k,
                                     int64_t count, int64_t column, int vectors, Vec<C>* sums,
                                     Ahead<C> ahead) const {
    const C* a[kTileRows];
    for (int r = 0; r < rows; ++r) a[r] = factors.a + (n + r) * factors.k + k;
    multiply_columns<E>(a, k, count, factors.w, column, rows, vectors, sums, unit_rows, ahead);
  }

  // Fetches what finishing a tile reads and no step before this one has read.
  FASTRNN_INLINE void fetch_tile(const Step& step, bool recurrent, int64_t n, int rows,
                                 int64_t unit, int vectors) const {
    if (!step.dgates) return;
    const int64_t bytes = vectors * L * sizeof(E);
    for (const int64_t end = n + rows; n < end; ++n) {
      if (recurrent && args.dy.data) {
        fetch_lines(args.dy.row(args.schedule, step.t, n) + unit, bytes);
      }
      if (recurrent && args.projected) continue;
      if (args.cell != Cell::lstm) {
        fetch_lines(args.h.row(args.schedule, step.t, n) + unit, bytes);
        continue;
      }
      const int64_t row = args.schedule.offset(step.t) + n;
      for (int g = 0; g < kGates; ++g) {
        fetch_lines(args.gates + (row * kGates + g) * hidden + unit, bytes);
      }
      fetch_lines(previous_c(step, n) + unit, bytes);
    }
  }

  // c of the step before this one's in the forward pass.
  FASTRNN_INLINE const E* previous_c(const Step& step, int64_t n) const {
    if (n >= step.forward_previous_rows) return args.c0 + n * args.c0_stride;
    return args.c_all + (args.schedule.offset(step.forward_previous) + n) * hidden;
  }

  // The gradients of h that a call begins with.
  void load_dh(int64_t n, int rows, int64_t column, int vectors, Vec<C>* dh) const {
    for (int i = 0; i < rows * vectors; ++i) dh[i] = Vec<C>{};
    for (int r = 0; args.dh && r < rows; ++r) {
      const C* row = args.dh + (n + r) * args.width;
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = column + v * L;
        dh[r * vectors + v] = load(row + at, args.width - at);
      }
    }
  }

  // From the gradient of h, but for that of y, to what comes before it.
  void finish_recurrent_tile(const Step& step, int64_t n, int rows, int64_t column, int vectors,
                             Vec<C>* dh) const {
    if (!step.dgates) {
      for (int r = 0; r < rows; ++r) {
        store_row(args.dh + (n + r) * args.width, column, args.width, vectors, dh + r * vectors);
      }
      return;
    }
    if (args.dy.data) {
      for (int r = 0; r < rows; ++r) {
        add_row(args.dy.row(args.schedule, step.t, n + r), column, args.width, vectors,
                dh + r * vectors);
      }
    }
    if (args.projected) {
      for (int r = 0; r < rows; ++r) {
        C* const out = step.dprojected + (n + r) * h_operands;
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = column + v * L;
          store_operands<E>(out, h_operands / kParts<E>, at, dh[r * vectors + v], args.width - at);
        }
      }
    } else {
      run_pointwise(step, n, rows, column, vectors, dh);
    }
  }

  void run_pointwise(const Step& step, int64_t n, int rows, int64_t unit, int vectors,
                     const Vec<C>* dh) const {
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
                                           const Vec<C>* dh) const {
    for (const int64_t row_end = n + rows; n < row_end; ++n) {
      C* const dgates = step.dgates + n * gate_operands;
      for (int v = 0; v < vectors; ++v, ++dh) {
        const int64_t unit = first_unit + v * L, valid = hidden - unit;
        if constexpr (cell == Cell::lstm) {
          pointwise_lstm(step, n, unit, valid, *dh, dgates);
        } else {
          const Vec<C> h = load_as(args.h.row(args.schedule, step.t, n) + unit, valid);
          store_operands<E>(dgates, gate_operands / kParts<E>, unit,
                            rnn_pointwise_backward<Math<E>, cell>(h, *dh), valid);
        }
      }
    }
  }

  FASTRNN_INLINE void pointwise_lstm(const Step& step, int64_t n, int64_t unit, int64_t valid,
                                     Vec<C> dh, C* dgates) const {
    const int64_t row = args.schedule.offset(step.t) + n;

    Vec<C> gate[kGates];
    for (int g = 0; g < kGates; ++g) {
      gate[g] = load_as(args.gates + (row * kGates + g) * hidden + unit, valid);
    }
    C* running_dc = args.dc + n * hidden + unit;
    Vec<C> dc = load(running_dc, valid);
    lstm_pointwise_backward<Math<E>>(gate, load_as(args.c_all + row * hidden + unit, valid),
                                     load_as(previous_c(step, n) + unit, valid), dh, dc);
    store(running_dc, dc, valid);
    for (int g = 0; g < kGates; ++g) {
      store_operands<E>(dgates, gate_operands / kParts<E>, g * hidden + unit, gate[g], valid);
    }
  }
};

}  // namespace

template <typename E>
void backward(const BackwardArgs<E>& args, const Share<Compute<E>>& share, int64_t s_begin,
              int64_t s_end) {
  const Backward<E> pass{args, share};
  const TileUnit unit(kParts<E>, pass.unit_rows);
  pass.run(s_begin, s_end);
}

#define INSTANTIATE(E) \
  template void backward(const BackwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
