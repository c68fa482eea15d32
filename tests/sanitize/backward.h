// The backward pass of one direction after a forward pass, drawn at random.
#pragma once

#include "forward.h"

namespace fastrnn::sanitize {

template <typename E>
struct BackwardRun {
  using C = Compute<E>;

  ForwardRun<E>& forward;
  const Kernels<E>& kernels = forward.kernels;
  const Shape& shape = forward.shape;
  Draw& draw = forward.draw;
  const bool lstm = forward.lstm;
  const bool wants_dh0 = draw.one_in(2);
  const int64_t chunk = draw.one_in(3) ? shape.T : draw.integer(1, shape.T);
  const int64_t slots = std::max(chunk, std::min<int64_t>(2, shape.T));
  const int64_t gate_operands = kernels.operands(shape.gates());
  const int64_t width_operands = kernels.operands(shape.P);

  const bool has_dy = !draw.one_in(4);
  Rows<E> dy{"dy", draw, shape, shape.P, true};
  Array<C> dh = random_array<C>("dh", draw, shape.N* shape.P);
  Array<C> dc = random_array<C>("dc", draw, lstm ? shape.N * shape.H : 0);
  Array<C> dgates{"dgates", slots * shape.N * gate_operands};
  Array<C> dprojected{"dprojected", shape.projected ? slots * shape.N * width_operands : 0};
  const bool in_place = kernels.reads_in_place && draw.one_in(3);
  Array<C> columns_w_hh = packed_columns("columns_w_hh", shape.gates(), shape.P);
  Array<C> columns_w_hr = packed_columns("columns_w_hr", shape.projected ? shape.P : 0, shape.H);
  const bool adds_to_dx = draw.one_in(2);
  Rows<E> dx{"dx", draw, shape, shape.I};
  Array<C> dw_ih{"dw_ih", shape.gates() * shape.I, true};
  Array<C> dw_hh{"dw_hh", shape.gates() * shape.P};
  Array<C> db{"db", shape.gates()};
  Array<C> dw_hr{"dw_hr", shape.projected ? shape.P * shape.H : 0};
  const bool wants_dw_ih = !draw.one_in(4), wants_dw_hh = !draw.one_in(4),
             wants_db = !draw.one_in(4);
  // Whether weights' gradients are left as elements by the last chunk.
  const bool stores_results = !kIsComputed<E> && !draw.one_in(3);
  Array<E> dw_ih_result{"dw_ih_result", stores_results ? dw_ih.size() : 0, true};
  Array<E> dw_hh_result{"dw_hh_result", stores_results ? dw_hh.size() : 0};
  Array<E> dw_hr_result{"dw_hr_result", stores_results ? dw_hr.size() : 0};
  BackwardArgs<E> args{};
  // The rows of a chunk.
  std::vector<const C*> dgate_rows, dprojected_rows;
  std::vector<const E*> x_rows, h_rows, m_rows;
  std::vector<E*> dx_rows;
  NaiveBackward naive;

  explicit BackwardRun(ForwardRun<E>& forward) : forward(forward) {
    dy.fill(draw, shape);
    if (adds_to_dx) dx.fill(draw, shape);
    clear_padding(dgates, shape.gates());
    if (shape.projected) clear_padding(dprojected, shape.P);
    if (checks_results()) set_naive();
  }

  // In place, only a last panel that is not full is packed.
  Array<C> packed_columns(const char* name, int64_t k, int64_t columns) {
    const int64_t panel = kPanelVectors * kernels.lanes;
    const int64_t first = in_place ? columns / panel * panel : 0;
    return Array<C>(name, kernels.packed_columns(k, columns - first), draw.one_in(3));
  }
  void clear_padding(const Array<C>& rows, int64_t width) {
    if (!kernels.pads(width)) return;
    std::fill_n(rows.data(), rows.usable(), C(0));
  }

  void set_naive() {
    naive.x = forward.x.matrix(shape);
    naive.w_ih = Matrix(forward.w_ih.data(), shape.gates(), shape.I);
    naive.w_hh = Matrix(forward.w_hh.data(), shape.gates(), shape.P);
    naive.w_hr = Matrix(forward.w_hr.data(), shape.projected ? shape.P : 0, shape.H);
    naive.h0 = forward.h0.matrix(shape.N, shape.P);
    naive.c0 = forward.c0.matrix(shape.N, shape.H);
    naive.h = forward.h.matrix(shape);
    naive.gates = Matrix(forward.gates.data(), lstm ? shape.rows() : 0, 4 * shape.H);
    naive.c_all = Matrix(forward.c_all.data(), lstm ? shape.rows() : 0, shape.H);
    naive.unprojected =
        Matrix(forward.unprojected.data(), shape.projected ? shape.rows() : 0, shape.H);
    naive.dy = has_dy ? dy.matrix(shape) : Matrix(shape.rows(), shape.P);
    naive.dh = Matrix(dh.data(), shape.N, shape.P);
    naive.dc = Matrix(dc.data(), lstm ? shape.N : 0, shape.H);
    naive.dx = adds_to_dx ? dx.matrix(shape) : Matrix(shape.rows(), shape.I);
    naive.dw_ih = Matrix(shape.gates(), shape.I);
    naive.dw_hh = Matrix(shape.gates(), shape.P);
    naive.dw_hr = Matrix(shape.projected ? shape.P : 0, shape.H);
    naive.db = Matrix(1, shape.gates());
  }

  ColumnWeights<C> pack(const Array<E>& w, int64_t k, int64_t columns, const Array<C>& packed,
                        const Member& member) {
    const int64_t panel = kPanelVectors * kernels.lanes;
    const int64_t full = columns / panel, panels = kernels.panels(columns);
    const int64_t stride = kernels.operands(k) * panel;
    if (in_place) {
      // Counted from the first panel, as pack_columns counts.
      C* const first = reinterpret_cast<C*>(reinterpret_cast<uintptr_t>(packed.data()) -
                                            full * stride * sizeof(C));
      if (member.index == 0) kernels.pack_columns(w.data(), k, columns, first, full, panels);
      return {columns, reinterpret_cast<const C*>(w.data()), columns, panel, packed.data()};
    }
    const auto [begin, end] = member.part(panels);
    kernels.pack_columns(w.data(), k, columns, packed.data(), begin, end);
    return {columns, packed.data(), panel, stride,
            full < panels ? packed.data() + full * stride : nullptr};
  }

  void pack_all(const Member& member) {
    const auto w_hh = pack(forward.w_hh, shape.gates(), shape.P, columns_w_hh, member);
    ColumnWeights<C> w_hr{};
    if (shape.projected) w_hr = pack(forward.w_hr, shape.P, shape.H, columns_w_hr, member);
    if (member.index > 0) return;
    args.w_hh = w_hh;
    args.w_hr = w_hr;
  }

  void set_arguments() {
    args.cell = shape.cell;
    args.reverse = shape.reverse;
    args.schedule = shape.schedule();
    args.hidden = shape.H;
    args.width = shape.P;
    if (has_dy) args.dy = dy.input();
    args.h = forward.h.input();
    args.gates = forward.gates.data();
    args.c_all = forward.c_all.data();
    args.c0 = forward.c0.array.data();
    args.c0_stride = forward.c0.stride;
    args.projected = shape.projected;
    args.wants_dh0 = wants_dh0;
    args.dh = dh.data();
    args.dc = dc.data();
    args.dgates = dgates.data();
    args.dprojected = dprojected.data();
    args.slots = slots;
  }

  void collect_rows(int64_t s_begin, int64_t s_end) {
    dgate_rows.clear(), dprojected_rows.clear(), x_rows.clear();
    h_rows.clear(), m_rows.clear(), dx_rows.clear();
    const Schedule schedule = shape.schedule();
    for (int64_t s = s_begin; s < s_end; ++s) {
      const int64_t t = args.step(s), before = args.reverse ? t + 1 : t - 1;
      for (int64_t n = 0; n < schedule.rows_at(t); ++n) {
        const int64_t slot_row = s % slots * shape.N + n;
        const bool continues = before >= 0 && before < shape.T && n < schedule.rows_at(before);
        dgate_rows.push_back(dgates.data() + slot_row * gate_operands);
        x_rows.push_back(forward.x.input().row(schedule, t, n));
        h_rows.push_back(continues ? args.h.row(schedule, before, n)
                                   : forward.h0.array.data() + n * forward.h0.stride);
        dx_rows.push_back(dx.sequence().row(schedule, t, n));
        if (!shape.projected) continue;
        dprojected_rows.push_back(dprojected.data() + slot_row * width_operands);
        m_rows.push_back(forward.unprojected.data() + (schedule.offset(t) + n) * shape.H);
      }
    }
  }

  void finish_chunk(bool first, bool last, const Member& member) {
    const int64_t rows = dgate_rows.size();
    const auto [row_begin, row_end] = member.part(rows);
    const Array<C> panel("row_scratch",
                         kernels.row_product_scratch(shape.gates(), shape.I, in_place ? rows : 0));
    kernels.row_product({dgate_rows.data(), dx_rows.data(), shape.gates(), shape.I,
                         forward.w_ih.data(), in_place, adds_to_dx, panel.data()},
                        row_begin, row_end);
    for (int64_t row = 0; row < rows; row += kGradientRows) {
      const int64_t count = std::min(rows - row, kGradientRows);
      add_block(row, count, first && row == 0, last && row + count == rows, member);
    }
  }

  void add_block(int64_t row, int64_t rows, bool first, bool last, const Member& member) {
    const auto result = [&](Array<E>& array) {
      return last && stores_results ? array.data() : nullptr;
    };
    const auto [begin, end] = member.part(shape.gates());
    const Array<C> scratch(
        "outer_scratch",
        kernels.outer_product_scratch(shape.gates(), end - begin, shape.I, shape.P, rows));
    kernels.outer_product({dgate_rows.data() + row,
                           rows,
                           shape.gates(),
                           {{x_rows.data() + row, shape.I, wants_dw_ih ? dw_ih.data() : nullptr,
                             result(dw_ih_result)},
                            {h_rows.data() + row, shape.P, wants_dw_hh ? dw_hh.data() : nullptr,
                             result(dw_hh_result)}},
                           wants_db ? db.data() : nullptr,
                           !first,
                           scratch.data()},
                          begin, end);
    if (!shape.projected) return;
    const auto [first_row, last_row] = member.part(shape.P);
    const Array<C> other("outer_scratch", kernels.outer_product_scratch(
                                              shape.P, last_row - first_row, shape.H, 0, rows));
    kernels.outer_product({dprojected_rows.data() + row,
                           rows,
                           shape.P,
                           {{m_rows.data() + row, shape.H, dw_hr.data(), result(dw_hr_result)}, {}},
                           nullptr,
                           !first,
                           other.data()},
                          first_row, last_row);
  }

  void run(int threads) {
    set_arguments();
    GroupBarrier group;
    const int64_t panels = kernels.panels(std::max(shape.H, shape.P));
    const auto shares = random_shares<C>(draw, shape, threads, panels, group, !shape.projected);
    run_team(threads, [&](const Member& member) {
      pack_all(member);
      member.wait();
      for (int64_t s = 0; s < shape.T; s += chunk) {
        const int64_t s_end = std::min(s + chunk, shape.T);
        kernels.backward(args, shares[member.index], s, s_end);
        if (member.index == 0) collect_rows(s, s_end);
        member.wait();
        finish_chunk(s == 0, s_end == shape.T, member);
        member.wait();
      }
    });
  }

  void check(double tolerance) {
    if (kernels.depth == 2 && kernels.parts == 1) {
      run_naive_backward<E>(shape, naive);
    } else {
      run_naive_backward<C>(shape, naive);
    }
    const int64_t G = shape.gates();
    expect_near("dx", dx.matrix(shape), naive.dx, tolerance);
    expect(dx.gaps_untouched(shape), "dx was written between its rows");
    if (wants_dh0) expect_near("dh0", Matrix(dh.data(), shape.N, shape.P), naive.dh, tolerance);
    if (lstm) expect_near("dc0", Matrix(dc.data(), shape.N, shape.H), naive.dc, tolerance);
    const auto summed = [&](const Array<C>& sums, const Array<E>& result, int64_t rows,
                            int64_t columns) {
      return stores_results ? Matrix(result.data(), rows, columns)
                            : Matrix(sums.data(), rows, columns);
    };
    if (wants_dw_ih) {
      expect_near("dw_ih", summed(dw_ih, dw_ih_result, G, shape.I), naive.dw_ih, tolerance);
    }
    if (wants_dw_hh) {
      expect_near("dw_hh", summed(dw_hh, dw_hh_result, G, shape.P), naive.dw_hh, tolerance);
    }
    if (wants_db) expect_near("db", Matrix(db.data(), 1, G), naive.db, tolerance);
    if (shape.projected) {
      expect_near("dw_hr", summed(dw_hr, dw_hr_result, shape.P, shape.H), naive.dw_hr, tolerance);
    }
  }
};

}  // namespace fastrnn::sanitize
