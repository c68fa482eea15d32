// The forward pass of one direction, drawn at random.
#pragma once

#include "driver.h"

namespace fastrnn::sanitize {

// What the backward pass reads of it, too.
template <typename E>
struct ForwardRun {
  using C = Compute<E>;

  const Kernels<E>& kernels;
  const Shape& shape;
  Draw& draw;
  const bool lstm = shape.cell == Cell::lstm;
  const bool kept;             // what the backward pass needs
  const bool in_place;         // the weights are read where they lie
  const bool packs_ih;         // else w_ih alone is not packed as a whole
  bool packs_as_used = false;  // whether the shares pack w_ih and w_hh
  const double scale = 1 / std::sqrt(double(shape.H + shape.I));

  Rows<E> x{"x", draw, shape, shape.I, true};
  const Rows<E>* input = &x;  // or what a layer below leaves
  State<E> h0{"h0", draw, shape.N, shape.P}, c0{"c0", draw, shape.N, shape.H};
  Array<E> w_ih = random_array<E>("w_ih", draw, shape.gates() * shape.I, scale);
  Array<E> w_hh = random_array<E>("w_hh", draw, shape.gates() * shape.P, scale);
  const bool has_biases = !draw.one_in(4);
  Array<E> b_ih = random_array<E>("b_ih", draw, shape.gates());
  Array<E> b_hh = random_array<E>("b_hh", draw, shape.gates());
  Array<E> w_hr = random_array<E>("w_hr", draw, shape.projected ? shape.P * shape.H : 0, scale);
  Array<C> packed_ih{"packed_ih", kernels.packed_gates(shape.cell, shape.I, shape.H)};
  Array<C> packed_hh{"packed_hh", kernels.packed_gates(shape.cell, shape.P, shape.H)};
  Array<C> bias{"bias", kernels.cell_panels(shape.cell, shape.H) * kPanelVectors * kernels.lanes};
  Array<C> packed_w_hr{"packed_w_hr",
                       shape.projected ? kernels.packed_columns(shape.H, shape.P) : 0};
  Rows<E> h{"h", draw, shape, shape.P};
  Array<E> h_n{"h_n", shape.N * shape.P, draw.one_in(3)};
  Array<E> c_n{"c_n", lstm ? shape.N * shape.H : 0, draw.one_in(3)};
  Array<C> c{"c", lstm && !kIsComputed<E> ? shape.N * shape.H : 0, draw.one_in(3)};
  Array<E> gates{"gates", lstm && kept ? shape.rows() * 4 * shape.H : 0};
  Array<E> c_all{"c_all", lstm && kept ? shape.rows() * shape.H : 0};
  Array<E> unprojected{"unprojected",
                       shape.projected ? (kept ? shape.rows() : shape.N) * shape.H : 0};
  // One step's h may be the final one.
  const bool h_is_final = shape.T == 1 && h.row == shape.P && draw.one_in(2);

  ForwardRun(const Kernels<E>& kernels, const Shape& shape, Draw& draw, bool kept)
      : kernels(kernels),
        shape(shape),
        draw(draw),
        kept(kept),
        in_place(draw.one_in(shape.T == 1 ? 2 : 8)),
        packs_ih(!in_place && (shape.rows() > kMostHoisted || !draw.one_in(3))) {
    x.fill(draw, shape);
  }

  ForwardArgs<E> arguments() {
    ForwardArgs<E> a{};
    a.cell = shape.cell;
    a.reverse = shape.reverse;
    a.steps_before = in_place;
    a.schedule = shape.schedule();
    a.input = shape.I;
    a.hidden = shape.H;
    a.width = shape.P;
    a.x = input->input();
    // In the product with the number of the first step that is computed.
    if (planted_fault == "overflow" && shape.reverse && shape.T > 2) a.x.step_stride = INT64_MAX;
    a.h0 = h0.array.data();
    a.h0_stride = h0.stride;
    a.c0 = c0.array.data();
    a.c0_stride = c0.stride;
    a.w_ih = w_ih.data();
    a.w_hh = w_hh.data();
    a.packed_ih = packs_ih ? packed_ih.data() : nullptr;
    a.packed_hh = in_place ? nullptr : packed_hh.data();
    a.bias = bias.data();
    a.w_hr = shape.projected ? w_hr.data() : nullptr;
    a.packed_w_hr = packs_hr() ? packed_w_hr.data() : nullptr;
    a.h = h.sequence();
    a.h_n = h_is_final ? h.array.data() : h_n.data();
    if (lstm) {
      a.c_n = c_n.data();
      if constexpr (kIsComputed<E>) {
        a.c = reinterpret_cast<C*>(a.c_n);
      } else {
        a.c = c.data();
      }
    }
    if (gates.size() > 0) {
      a.gates = gates.data();
      a.c_all = c_all.data();
    }
    a.unprojected = unprojected.data();
    return a;
  }

  int64_t panels() const { return kernels.cell_panels(shape.cell, shape.H); }
  bool packs_hr() const { return shape.projected && !(in_place && kernels.reads_in_place); }

  // Of a share's own scratch.
  Array<C> scratch_for(const Share<C>& share) const {
    const ForwardSizes sizes = {shape.T,
                                shape.I,
                                shape.H,
                                shape.P,
                                packs_ih,
                                !in_place,
                                shape.projected,
                                share.row_end - share.row_begin,
                                share.panel_end - share.panel_begin};
    return Array<C>("scratch", kernels.forward_scratch(sizes));
  }

  // This member's part.
  void pack(const Member& member) const {
    const auto [begin, end] = member.part(panels());
    kernels.pack_bias(shape.cell, has_biases ? b_ih.data() : nullptr,
                      has_biases ? b_hh.data() : nullptr, shape.H, bias.data(), begin, end);
    if (packs_ih && !packs_as_used) {
      kernels.pack_gates(shape.cell, w_ih.data(), shape.I, shape.H, packed_ih.data(), begin, end);
    }
    if (!in_place && !packs_as_used) {
      kernels.pack_gates(shape.cell, w_hh.data(), shape.P, shape.H, packed_hh.data(), begin, end);
    }
    if (!packs_hr()) return;
    const auto [first, last] = member.part(kernels.panels(shape.P));
    kernels.pack_gates(Cell::rnn_tanh, w_hr.data(), shape.H, shape.P, packed_w_hr.data(), first,
                       last);
  }

  void run(int threads) {
    const ForwardArgs<E> args = arguments();
    GroupBarrier group;
    auto shares = random_shares<C>(draw, shape, threads, panels(), group, true);
    const int64_t range = draw.one_in(2) ? shape.T : draw.integer(1, shape.T);
    packs_as_used = shares[0].row_end - shares[0].row_begin == shape.N && draw.one_in(2);
    std::vector<Array<C>> scratch;
    for (Share<C>& share : shares) {
      share.packs = packs_as_used;
      scratch.push_back(scratch_for(share));
      share.scratch = scratch.back().data();
    }
    run_team(threads, [&](const Member& member) {
      pack(member);
      member.wait();
      for (int64_t s = 0; s < shape.T; s += range) {
        kernels.forward(args, shares[member.index], s, std::min(s + range, shape.T));
      }
    });
  }

  void check(double tolerance) {
    NaiveForward naive;
    naive.x = input->matrix(shape);
    naive.w_ih = Matrix(w_ih.data(), shape.gates(), shape.I);
    naive.w_hh = Matrix(w_hh.data(), shape.gates(), shape.P);
    naive.w_hr = Matrix(w_hr.data(), shape.projected ? shape.P : 0, shape.H);
    naive.h0 = h0.matrix(shape.N, shape.P);
    naive.c0 = c0.matrix(shape.N, shape.H);
    naive.bias.assign(shape.gates(), 0);
    for (int64_t j = 0; has_biases && j < shape.gates(); ++j) {
      naive.bias[j] = to_double(b_ih.data()[j]) + to_double(b_hh.data()[j]);
    }
    if (planted_fault == "value") naive.w_ih.data.back() += 1;
    run_naive_forward<E>(shape, naive);
    expect_near("h", h.matrix(shape), naive.h, tolerance);
    expect(h.gaps_untouched(shape), "h was written between its rows");
    const E* final_h = h_is_final ? h.array.data() : h_n.data();
    expect_near("h_n", Matrix(final_h, shape.N, shape.P), naive.h0, tolerance);
    if (lstm) expect_near("c_n", Matrix(c_n.data(), shape.N, shape.H), naive.c0, tolerance);
    if (gates.size() > 0) {
      expect_near("gates", Matrix(gates.data(), shape.rows(), 4 * shape.H), naive.gates, tolerance);
      expect_near("c_all", Matrix(c_all.data(), shape.rows(), shape.H), naive.c_all, tolerance);
    }
    if (kept && shape.projected) {
      expect_near("unprojected", Matrix(unprojected.data(), shape.rows(), shape.H),
                  naive.unprojected, tolerance);
    }
  }
};

}  // namespace fastrnn::sanitize
