// The forward time loop of one direction of one layer: at each step, for each panel of hidden units
// and each block of rows, the product with the weights and the cell's arithmetic, in registers.
#include "forward_cell.h"
#include "forward_scratch.h"
#include "forward_weights.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// The cell's arithmetic is done for so many tiles of a panel at once: its first results take some
// 100 cycles, in which nothing else is to be done.
constexpr int kFinishedTiles = kHasMatrixUnit ? 1 : 4;

template <typename E>
struct Forward {
  using C = Compute<E>;
  static constexpr int L = kLanes<C>;

  const ForwardArgs<E>& args;
  const Share<C>& share;
  const int64_t hidden = args.hidden;
  const int64_t share_rows = share.row_end - share.row_begin;
  const int64_t shared_panels = share.panel_end - share.panel_begin;
  const int64_t panel_units = kPanelColumns<C> / gate_count(args.cell);
  const int unit_rows = unit_rows_for(share_rows);  // of the matrix unit, in a step
  // What a step leaves of a row: h and, for the backward pass, c and the gates.
  const int64_t row_results = hidden * (args.gates ? 2 + gate_count(args.cell) : 1);
  const bool fetches = fetches_lines<E>(args.schedule, hidden, row_results);

  // Parts of the scratch.
  const ForwardScratch<E> scratch{{.steps = args.schedule.steps,
                                   .input = args.input,
                                   .hidden = hidden,
                                   .width = args.width,
                                   .packed_ih = args.packed_ih != nullptr,
                                   .packed_hh = args.packed_hh != nullptr,
                                   .projected = args.w_hr != nullptr,
                                   .share_rows = share_rows,
                                   .share_panels = shared_panels}};
  const bool hoist = scratch.hoist;
  C* const products = share.scratch;  // (steps, shared_panels, rows of the step, 4, L), if hoist
  C* const staged_x = share.scratch + scratch.staged_x;
  C* const staged_h = share.scratch + scratch.staged_h;
  C* const staged_m = share.scratch + scratch.staged_m;

  // The state of a step that its tiles read.
  struct Step : StepResults<E> {
    int64_t previous;       // the step whose h is read, -1 if none
    int64_t previous_rows;  // rows that the previous step has; the others start from h0
    int64_t row_end;        // of the share, at this step
    bool backwards;         // the order of panels
    const C* products;      // hoisted, of this step's first row of the share
    // The weights, as ForwardArgs; those of the panel at work if need be.
    const C *packed_ih, *packed_hh;
    bool packs;  // whether a panel's are packed before it is used
  };

  void run(int64_t s_begin, int64_t s_end) const {
    if (s_begin == 0 && args.cell == Cell::lstm) copy_initial_c();
    for (int64_t s = s_begin; s < s_end;) {
      const int64_t products_end = hoist ? project_inputs(s, s_end) : s + 1;
      const C* step_products = products;
      for (; s < products_end; ++s) {
        Step step = step_at(s);
        step.products = step_products;
        run_step(step);
        if (args.w_hr) {
          if (share.sync) share.sync(share.barrier);
          project_output(step);
        }
        if (share.sync && s + 1 < args.schedule.steps) share.sync(share.barrier);
        if (step.row_end > share.row_begin) {
          step_products += (step.row_end - share.row_begin) * shared_panels * kPanelColumns<C>;
        }
      }
    }
    if (s_end < args.schedule.steps) return;
    copy_final_h();
    if constexpr (!kIsComputed<E>) {
      if (args.cell == Cell::lstm) copy_final_c();
    }
  }

  int64_t time_of(int64_t s) const { return args.schedule.step(s, args.reverse); }

  int64_t last_row(int64_t t) const { return smaller(args.schedule.rows_at(t), share.row_end); }

  Step step_at(int64_t s) const {
    Step step{};
    step.t = time_of(s);
    step.previous = s > 0 ? time_of(s - 1) : -1;
    step.previous_rows = s > 0 ? args.schedule.rows_at(step.previous) : 0;
    step.rows_before = args.schedule.offset(step.t);
    step.row_end = last_row(step.t);
    step.packed_ih = args.packed_ih;
    step.packed_hh = args.packed_hh;
    step.packs = scratch.packs_panels || (s == 0 && share.packs && args.packed_hh);
    // Every other step runs through the panels from the last to the first: what the cache still
    // holds of the weights is what was read last.
    step.backwards = (args.steps_before + s) % 2;
    if (args.w_hr) {
      step.unprojected = args.unprojected + (args.gates ? step.rows_before * hidden : 0);
    }
    return step;
  }

  const E* previous_h(const Step& step, int64_t n) const {
    if (n < step.previous_rows) return args.h.row(args.schedule, step.previous, n);
    return args.h0 + n * args.h0_stride;
  }

  // The row as operands: where it lies, or converted into slot i of `staged`.
  static const C* stage(const E* row, int64_t k, C* staged, int64_t i) {
    if constexpr (!kIsOperand<E>) make_operands(row, k, staged + i * operands<E>(k));
    return staged_row(row, k, staged, i);
  }

  static const C* staged_row(const E* row, int64_t k, const C* staged, int64_t i) {
    if constexpr (kIsOperand<E>) {
      return row;
    } else {
      return staged + i * operands<E>(k);
    }
  }

  // w_ih . x for the share's rows of as many steps, from step s to before s_end, as
  // scratch.hoist_rows allows (one at least). Returns the end of those steps.
  int64_t project_inputs(int64_t s, int64_t s_end) const {
    const bool packs = scratch.packs_input || (s == 0 && share.packs && args.packed_ih);
    const C* rows[kMostHoisted];
    C* out[kMostHoisted];                 // of the first panel
    int64_t panel_strides[kMostHoisted];  // of out
    C* step_products = products;
    int64_t count = 0;
    for (; s < s_end; ++s) {
      const int64_t t = time_of(s);
      const int64_t row_end = last_row(t), step_rows = row_end - share.row_begin;
      if (count + step_rows > scratch.hoist_rows) break;
      for (int64_t n = share.row_begin; n < row_end; ++n, ++count) {
        rows[count] = stage(args.x.row(args.schedule, t, n), args.input, staged_x, count);
        out[count] = step_products + (n - share.row_begin) * kPanelColumns<C>;
        panel_strides[count] = step_rows * kPanelColumns<C>;
      }
      if (step_rows > 0) step_products += step_rows * shared_panels * kPanelColumns<C>;
    }
    const int rows_ahead = unit_rows_for(count);
    if (rows_ahead != unit_rows) TileUnit::set_rows(kParts<E>, rows_ahead);
    for_panels(count, false, [&](int64_t panel, int vectors) {
      const C* packed_ih = args.packed_ih;
      if (packs) {
        packed_ih = pack_panels(args.w_ih, args.input, panel, vectors, args.packed_ih,
                                share.scratch + scratch.packed_x);
      }
      for_row_blocks(0, count, [&](int64_t first, int block) {
        Tile<C> sums;
        multiply_panel<E>(
            rows + first, input_weights(packed_ih), panel, block, vectors, sums.at, false,
            part_of_next(input_weights(args.packed_ih), packs, panel + 1, first, count),
            rows_ahead);
        for (int r = 0; r < block; ++r) {
          const int64_t stride = panel_strides[first + r];
          C* const row = out[first + r] + (panel - share.panel_begin) * stride;
          for (int v = 0; v < vectors; ++v) {
            store(row + v / kPanelVectors * stride + v % kPanelVectors * L,
                  sums.at[r * vectors + v]);
          }
        }
      });
    });
    if (rows_ahead != unit_rows) TileUnit::set_rows(kParts<E>, unit_rows);
    return s;
  }

  // Puts the panel at work into the step, not into a copy of it: the copy's loads would wait for
  // the stores that have just made the step, and so for those of results before them.
  void run_step(Step& step) const {
    if (scratch.left_weights) {
      TileUnit::set_columns(kParts<E>, unit_rows);
      for (int64_t n = share.row_begin; n < step.row_end; ++n) {
        const int64_t i = n - share.row_begin;
        make_operand_column(args.x.row(args.schedule, step.t, n), args.input, staged_x, i,
                            share_rows);
        make_operand_column(previous_h(step, n), args.width, staged_h, i, share_rows);
      }
    } else if constexpr (!kIsOperand<E>) {
      for (int64_t n = share.row_begin; n < step.row_end; ++n) {
        const int64_t i = n - share.row_begin;
        if (!hoist) stage(args.x.row(args.schedule, step.t, n), args.input, staged_x, i);
        stage(previous_h(step, n), args.width, staged_h, i);
      }
    } else if (scratch.reorders) {
      for (int64_t n = share.row_begin; n < step.row_end; ++n) {
        reorder(previous_h(step, n), args.width, staged_h + (n - share.row_begin) * args.width);
      }
    }
    for_panels(step.row_end - share.row_begin, step.backwards, [&](int64_t panel, int vectors) {
      if (step.packs) {
        C* const packed_x = share.scratch;
        C* const packed_h =
            packed_x + scratch.panels_ahead * operands<E>(args.input) * kPanelColumns<C>;
        if (!hoist) {
          step.packed_ih =
              pack_panels(args.w_ih, args.input, panel, vectors, args.packed_ih, packed_x);
        }
        step.packed_hh =
            pack_panels(args.w_hh, args.width, panel, vectors, args.packed_hh, packed_h);
      }
      run_panel(step, panel, vectors);
    });
    if (scratch.left_weights) TileUnit::set_rows(kParts<E>, unit_rows);
  }

  // Packs a panel of w, or two, to its place in `packed` or, if that is null, to `out`. Returns
  // where panel 0 then begins.
  const C* pack_panels(const E* w, int64_t k, int64_t panel, int vectors, C* packed, C* out) const {
    if (!packed) packed = out - panel * operands<E>(k) * kPanelColumns<C>;
    pack_gates(args.cell, w, k, hidden, packed, panel, panel + (vectors > kPanelVectors ? 2 : 1));
    return packed;
  }

  // Calls f(panel, vectors) over the share's panels, two full ones at a time where few rows are to
  // be computed.
  template <typename F>
  FASTRNN_INLINE void for_panels(int64_t rows, bool backwards, F&& f) const {
    if (rows <= 0) return;
    const int64_t width = args.packed_hh ? (rows <= kTwoPanelRows ? 2 : 1) : scratch.panels_ahead;
    const int64_t groups = divide_up(shared_panels, width);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t panel = share.panel_begin + (backwards ? groups - 1 - i : i) * width;
      const auto vectors = [&](int64_t p) {
        return cell_panel_rows<C>(args.cell, hidden, p).vectors;
      };
      if (width == 1 || panel + 1 == share.panel_end) {
        f(panel, vectors(panel));
      } else if (hidden >= (panel + 2) * panel_units) {
        f(panel, 2 * kPanelVectors);
      } else {
        f(panel, kPanelVectors);
        f(panel + 1, vectors(panel + 1));
      }
    }
  }

  // The share's rows of as many vectors from `panel` on.
  void run_panel(const Step& step, int64_t panel, int vectors) const {
    Tile<C> tiles[kFinishedTiles];
    Vec<C>* const sums = tiles[0].at;  // (rows, vectors)
    int rows = 0;
    for_row_blocks(share.row_begin, step.row_end, [&](int64_t n, int block) {
      multiply_rows(step, n, block, panel, vectors, sums + rows * vectors);
      rows += block;
      const int64_t end = n + block;
      if (rows + kTileRows <= kFinishedTiles * kTileRows && end < step.row_end) return;
      const int64_t first = end - rows;
      const auto finish = [&](auto* finish_rows) {
        finish_rows(args, step, first, rows, panel, vectors, sums);
      };
      switch (args.cell) {
        case Cell::lstm: finish(finish_rows<Cell::lstm, E>); break;
        case Cell::rnn_tanh: finish(finish_rows<Cell::rnn_tanh, E>); break;
        case Cell::rnn_relu: finish(finish_rows<Cell::rnn_relu, E>); break;
      }
      rows = 0;
    });
  }

  // Leaves in sums the products of rows n and on with the weights of x and h.
  void multiply_rows(const Step& step, int64_t n, int rows, int64_t panel, int vectors,
                     Vec<C>* sums) const {
    if (fetches) fetch_results(step, n, rows, panel, vectors);
    const C* a[kTileRows];
    const int64_t i = n - share.row_begin, step_rows = step.row_end - share.row_begin;
    const int64_t next_panel = step.backwards ? panel - 1 : panel + 1;
    if (hoist) {
      const int64_t stride = step_rows * kPanelColumns<C>;
      const C* in = step.products + (panel - share.panel_begin) * stride + i * kPanelColumns<C>;
      for (int r = 0; r < rows; ++r, in += kPanelColumns<C>) {
        for (int v = 0; v < vectors; ++v) {
          sums[r * vectors + v] = load(in + v / kPanelVectors * stride + v % kPanelVectors * L);
        }
      }
    } else {
      for (int r = 0; r < rows; ++r) {
        a[r] = staged_row(args.x.row(args.schedule, step.t, n + r), args.input, staged_x, i + r);
      }
      GateWeights<E> w_ih = input_weights(step.packed_ih);
      if (scratch.fetches_rows) w_ih.next = panel_rows(args.w_hh, args.width, panel);
      multiply_panel<E>(
          a, w_ih, panel, rows, vectors, sums, false,
          part_of_next(input_weights(args.packed_ih), step.packs, next_panel, i, step_rows),
          unit_rows);
    }
    for (int r = 0; r < rows; ++r) {
      a[r] = scratch.reorders ? staged_h + (i + r) * args.width
                              : staged_row(previous_h(step, n + r), args.width, staged_h, i + r);
    }
    GateWeights<E> w_hh{args.cell, step.packed_hh, args.w_hh, args.width, hidden};
    if (scratch.fetches_rows) {
      w_hh.next = hoist ? panel_rows(args.w_hh, args.width, next_panel)
                        : panel_rows(args.w_ih, args.input, next_panel);
    }
    multiply_panel<E>(a, w_hh, panel, rows, vectors, sums, true,
                      part_of_next(w_hh, step.packs, next_panel, i, step_rows), unit_rows,
                      scratch.reorders);
  }

  // Fetches the lines that finishing a tile writes, but for c.
  FASTRNN_INLINE void fetch_results(const Step& step, int64_t n, int rows, int64_t panel,
                                    int vectors) const {
    const int64_t gates = gate_count(args.cell), unit = panel * panel_units;
    const int64_t bytes = divide_up(vectors, gates) * L * sizeof(E);
    for (const int64_t end = n + rows; n < end; ++n) {
      fetch_lines(result_row(args, step, n) + unit, bytes);
      if (!args.gates) continue;
      const int64_t row = step.rows_before + n;
      for (int64_t g = 0; g < gates; ++g) {
        fetch_lines(args.gates + (row * gates + g) * hidden + unit, bytes);
      }
      fetch_lines(args.c_all + row * hidden + unit, bytes);
    }
  }

  // What a block of rows, from the share's row i of `count` on, fetches of the next panel while its
  // own is multiplied. to_pack: from where it is packed.
  Ahead<C> part_of_next(const GateWeights<E>& weights, bool to_pack, int64_t next_panel, int64_t i,
                        int64_t count) const {
    const int64_t parts = fetching_blocks(count);
    const int64_t part = divide_up(i, kTileRows);  // a block may have fewer rows
    if (!scratch.fetches || part >= parts || next_panel < share.panel_begin ||
        next_panel >= share.panel_end) {
      return {};
    }
    const int64_t of_vector = parts / kPanelVectors, vector = part / of_vector;
    const int64_t step = L / of_vector;
    const int64_t before = part % of_vector * step;  // of the vector, at each k
    if (to_pack) {
      const PanelRows rows = cell_panel_rows<C>(args.cell, hidden, next_panel);
      if (vector >= rows.vectors) return {};
      const E* const first = weights.w + rows.row(vector * L) * weights.k + before * weights.k;
      return {reinterpret_cast<const C*>(first), step};
    }
    if (!weights.packed) return {};
    const int64_t k = operands<E>(weights.k);
    return {weights.packed + (next_panel * kPanelColumns<C> + vector * L + before) * k, step};
  }

  GateWeights<E> input_weights(const C* packed) const {
    return {args.cell, packed, args.w_ih, args.input, hidden};
  }

  // Where the rows of a panel begin; of none of the share's, anywhere.
  const E* panel_rows(const E* w, int64_t k, int64_t panel) const {
    const bool exists = panel >= share.panel_begin && panel < share.panel_end;
    return w + (exists ? panel * panel_units * k : 0);
  }

  // h = w_hr . (o * tanh(c)), for the rows and columns of the share.
  void project_output(const Step& step) const {
    if constexpr (!kIsOperand<E>) {
      for (int64_t n = share.row_begin; n < step.row_end; ++n) {
        stage(step.unprojected + n * hidden, hidden, staged_m, n - share.row_begin);
      }
    }
    const int64_t first_column = column_begin();
    for_column_panels<C>(column_end() - first_column, [&](int64_t from_first, int vectors) {
      const int64_t column = first_column + from_first;
      for_row_blocks(share.row_begin, step.row_end, [&](int64_t n, int rows) {
        Tile<C> sums;
        const C* a[kTileRows];
        for (int r = 0; r < rows; ++r) {
          a[r] = staged_row(step.unprojected + (n + r) * hidden, hidden, staged_m,
                            n + r - share.row_begin);
        }
        const GateWeights<E> w_hr{Cell::rnn_tanh, args.packed_w_hr, args.w_hr, hidden, args.width};
        multiply_panel<E>(a, w_hr, column / kPanelColumns<C>, rows, vectors, sums.at, false, {},
                          unit_rows);
        for (int r = 0; r < rows; ++r) {
          store_row(args.h.row(args.schedule, step.t, n + r), column, args.width, vectors,
                    sums.at + r * vectors);
        }
      });
    });
  }

  // The hidden units of this share.
  int64_t unit_begin() const { return share.panel_begin * panel_units; }
  int64_t unit_count() const {
    return smaller(share.panel_end * panel_units, hidden) - unit_begin();
  }

  // The columns of h that this share computes: of a projection, as large a part as of the units.
  int64_t column_begin() const {
    return args.w_hr ? first_projected(share.panel_begin) : unit_begin();
  }
  int64_t column_end() const {
    if (!args.w_hr) return unit_begin() + unit_count();
    return smaller(first_projected(share.panel_end), args.width);
  }
  int64_t first_projected(int64_t panel) const {
    const int64_t all = divide_up(hidden, panel_units);
    const int64_t panels = divide_up(args.width, kPanelColumns<C>);
    return panels * panel / all * kPanelColumns<C>;
  }

  void copy_initial_c() const {
    for (int64_t n = share.row_begin; n < share.row_end; ++n) {
      const E* in = args.c0 + n * args.c0_stride + unit_begin();
      C* out = args.c + n * hidden + unit_begin();
      for (int64_t i = 0, count = unit_count(); i < count; i += L) {
        store(out + i, load_as(in + i, count - i), count - i);
      }
    }
  }

  void copy_final_c() const {
    for (int64_t n = share.row_begin; n < share.row_end; ++n) {
      const C* in = args.c + n * hidden + unit_begin();
      E* out = args.c_n + n * hidden + unit_begin();
      for (int64_t i = 0, count = unit_count(); i < count; i += L) {
        store_as(out + i, load(in + i, count - i), count - i);
      }
    }
  }

  void copy_final_h() const {
    const int64_t begin = column_begin(), count = column_end() - begin;
    int64_t t = time_of(args.schedule.steps - 1);
    for (int64_t n = share.row_begin; n < share.row_end; ++n) {
      while (n >= args.schedule.rows_at(t)) --t;
      __builtin_memmove(args.h_n + n * args.width + begin, args.h.row(args.schedule, t, n) + begin,
                        count * sizeof(E));
    }
  }
};

}  // namespace

template <typename E>
void forward(const ForwardArgs<E>& args, const Share<Compute<E>>& share, int64_t s_begin,
             int64_t s_end) {
  const Forward<E> pass{args, share};
  const TileUnit unit(kParts<E>, pass.unit_rows);
  pass.run(s_begin, s_end);
}

template <typename E>
int64_t forward_scratch(const ForwardSizes& sizes) {
  return ForwardScratch<E>(sizes).end;
}

#define INSTANTIATE(E)                                                                      \
  template void forward(const ForwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t); \
  template int64_t forward_scratch<E>(const ForwardSizes&);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
