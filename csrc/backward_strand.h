// A strand, one direction of one layer, in the backward pass: what its time loop, its gradient of
// the input and the gradients of its weights read and write.
#pragma once

#include <algorithm>

#include "backward_memory.h"
#include "weight_gradients.h"

namespace fastrnn {

// Owns none of what it refers to. What takes a member is called by each of a team, for its part.
template <typename E>
struct BackwardStrand {
  using C = Compute<E>;

  const Stack& stack;
  const Kernels<E>& kernels;
  const BackwardPlan& plan;
  StrandMemory<E>& memory;
  StrandWeights<E> weights;
  WeightGradients<E> gradients;
  int64_t input;        // I
  Sequence<const E> x;  // (T, N, I)
  Sequence<E> dx;       // likewise, or data null
  const E* h0;
  int64_t h0_stride;
  const E* unprojected;  // (rows, H), projection only
  BackwardArgs<E> args;  // of the time loop

  // Says where the time loop is to read the weights.
  void set_weights() {
    if (plan.shares_dw_hh) memory.packed_w_hh = gradients.w_hh_memory();
    args.w_hh = column_weights(weights.w_hh, stack.gates(), stack.width, packed_w_hh(),
                               plan.reads_w_hh_in_place);
    if (!stack.projected) return;
    args.w_hr = column_weights(weights.w_hr, stack.width, stack.hidden, packed_w_hr(),
                               plan.reads_w_hr_in_place);
  }

  // A member's part of what the time loop finds.
  void begin(const Member& member) const {
    pack_w_hh(member);
    if (stack.projected) {
      pack_columns(weights.w_hr, stack.width, stack.hidden, packed_w_hr(), plan.reads_w_hr_in_place,
                   member);
    }
    if (stack.cell != Cell::lstm || args.dc != memory.dc) return;  // the caller's holds a gradient
    const auto [begin, end] = member.part(stack.batch * stack.hidden);
    std::fill(args.dc + begin, args.dc + end, C(0));
  }

  // For the first chunk, or each.
  void pack_w_hh(const Member& member) const {
    if (plan.packed_w_hh.size() == 0) return;
    pack_columns(weights.w_hh, stack.gates(), stack.width, packed_w_hh(), plan.reads_w_hh_in_place,
                 member);
  }

  // Of steps [s_begin, s_end) of the time loop.
  int64_t rows_of(int64_t s_begin, int64_t s_end) const {
    int64_t rows = 0;
    for (int64_t s = s_begin; s < s_end; ++s) rows += args.schedule.rows_at(args.step(s));
    return rows;
  }

  // Gathers pointers to a member's part of the rows of steps [s_begin, s_end) of the loop, behind
  // the `first` of the chunk; returns the number of all. Row n of a step is one of sample n %
  // samples. A part is rows that follow each other, not some of each step: of few rows a step, all
  // members would write to every line of the pointers.
  int64_t collect_rows(int64_t s_begin, int64_t s_end, int64_t first, const Member& member) const {
    const Schedule& schedule = args.schedule;
    const int64_t gates = kernels.operands(stack.gates()), width = kernels.operands(stack.width);
    const int64_t samples = plan.samples;
    const int64_t all_rows = rows_of(s_begin, s_end);
    const int64_t sample_rows = all_rows / samples;
    const auto [begin, end] = member.part(all_rows);
    int64_t rows_before = 0;
    for (int64_t s = s_begin; s < s_end && rows_before < end; ++s) {
      const int64_t t = args.step(s), slot_row = s % plan.slots * stack.batch;
      const bool exists = s + 1 < schedule.steps;
      const int64_t previous = exists ? args.step(s + 1) : 0;
      const int64_t previous_rows = exists ? schedule.rows_at(previous) : 0;
      const int64_t n_begin = std::max(begin - rows_before, int64_t{0});
      const int64_t n_end = std::min(end - rows_before, schedule.rows_at(t));
      int64_t sample = n_begin % samples, row = (rows_before + n_begin) / samples;
      for (int64_t n = n_begin; n < n_end; ++n) {
        const int64_t i = first + sample * sample_rows + row;
        if (++sample == samples) sample = 0, ++row;
        memory.dgate_rows[i] = memory.dgates + (slot_row + n) * gates;
        memory.x_rows[i] = x.row(schedule, t, n);
        memory.h_rows[i] =
            n < previous_rows ? args.h.row(schedule, previous, n) : h0 + n * h0_stride;
        if (dx.data) memory.dx_rows[i] = dx.row(schedule, t, n);
        if (stack.projected) {
          memory.dprojected_rows[i] = memory.dprojected + (slot_row + n) * width;
          memory.m_rows[i] = unprojected + (schedule.offset(t) + n) * stack.hidden;
        }
      }
      rows_before += schedule.rows_at(t);
    }
    return all_rows;
  }

  // A member's part of the gradient of x, if that is wanted, of rows [begin, end) of a chunk.
  // scratch: the member's own.
  void multiply_dx(int64_t begin, int64_t end, bool accumulate, const Member& member,
                   C* scratch) const {
    if (!dx.data) return;
    const auto [first, last] = member.part(end - begin);
    kernels.row_product({.a = memory.dgate_rows.data(),
                         .out = memory.dx_rows.data(),
                         .k = stack.gates(),
                         .columns = input,
                         .w = weights.w_ih,
                         .in_place = plan.reads_w_ih_in_place,
                         .accumulate = accumulate,
                         .scratch = scratch},
                        begin + first, begin + last);
  }

 private:
  // Where a packed weight lies: its full panels, and the last.
  struct Packed {
    C *full, *partial;
  };
  Packed packed_w_hh() const {
    C* const full = memory.packed_w_hh;
    return {full, plan.partial_apart ? memory.partial_w_hh : full + plan.packed_w_hh.full};
  }
  Packed packed_w_hr() const {
    return {memory.packed_w_hr, memory.packed_w_hr + plan.packed_w_hr.full};
  }

  // w (k, columns) as pack_columns leaves it.
  ColumnWeights<C> column_weights(const E* w, int64_t k, int64_t columns, const Packed& packed,
                                  bool in_place) const {
    const int64_t panel_columns = kPanelVectors * kernels.lanes;
    if (in_place) {
      return {columns, reinterpret_cast<const C*>(w), columns, panel_columns, packed.partial};
    }
    return {columns, packed.full, panel_columns, kernels.operands(k) * panel_columns,
            packed.partial};
  }

  // Packs a member's part of w: of all panels or, in place, of the one that is not full.
  void pack_columns(const E* w, int64_t k, int64_t columns, const Packed& packed, bool in_place,
                    const Member& member) const {
    const int64_t panel_columns = kPanelVectors * kernels.lanes, full = columns / panel_columns;
    const auto [begin, end] = member.part(kernels.panels(columns));
    if (!in_place) kernels.pack_columns(w, k, columns, packed.full, begin, std::min(end, full));
    if (end <= full || begin == end) return;
    // pack_columns writes panel p at p * operands(k) * panel_columns of its output.
    C* const partial = packed.partial - full * kernels.operands(k) * panel_columns;
    kernels.pack_columns(w, k, columns, partial, full, end);
  }
};

}  // namespace fastrnn
