// One element of one step: its pre-activations or gradient in, everything that the step leaves
// behind out. The arithmetic is cell_math.h's; this is where its operands lie.
#pragma once

#include "device.cuh"

namespace fastrnn::cuda {

// Element (row n of the batch, hidden unit j) of direction d at step s, forward.
template <typename E, Cell cell>
struct ForwardElement {
  using C = Compute<E>;
  static constexpr int kGateCount = gate_count(cell);

  const ForwardArgs& args;
  int64_t d, n, j;
  int64_t row;  // among all rows

  // What the step starts from beside h: w_ih . x + the biases, by gate, and c.
  struct Operands {
    C pre[kGateCount];
    C c;
  };
  __device__ __forceinline__ void load(Operands& operands) const {
    const int64_t gates = kGateCount * args.hidden;
    const C* x = static_cast<const C*>(args.input_products) + (d * args.rows + row) * gates + j;
    const E* b_ih = static_cast<const E*>(args.b_ih[d]);
    const E* b_hh = static_cast<const E*>(args.b_hh[d]);
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) {
      operands.pre[g] = x[g * args.hidden];
      if (!b_ih) continue;
      const int64_t i = g * args.hidden + j;
      operands.pre[g] += to_compute(b_ih[i]) + to_compute(b_hh[i]);
    }
    if constexpr (cell == Cell::lstm) operands.c = c();
  }

  // h, once w_hh . h is added to the pre-activations; updates c and keeps what the backward pass
  // reads.
  __device__ __forceinline__ E update(Operands& operands) const {
    C(&pre)[kGateCount] = operands.pre;
    if constexpr (cell == Cell::lstm) {
      const C h = lstm_pointwise_forward<Math<C>>(pre, operands.c);
      c() = operands.c;
      if (args.gates[d]) {
        E* gates = static_cast<E*>(args.gates[d]) + row * kGates * args.hidden + j;
#pragma unroll
        for (int g = 0; g < kGates; ++g) gates[g * args.hidden] = from_compute<E>(pre[g]);
        static_cast<E*>(args.c_all[d])[row * args.hidden + j] = from_compute<E>(operands.c);
      }
      return from_compute<E>(h);
    } else {
      return from_compute<E>(rnn_pointwise_forward<Math<C>, cell>(pre[0]));
    }
  }

  __device__ __forceinline__ C& c() const {
    return static_cast<C*>(args.c)[(d * args.schedule.rows + n) * args.hidden + j];
  }
  __device__ __forceinline__ E& h() const {
    return static_cast<E*>(args.h)[(row * args.directions + d) * args.hidden + j];
  }
  __device__ __forceinline__ E& h_n() const {
    return static_cast<E*>(args.h_n)[(d * args.schedule.rows + n) * args.hidden + j];
  }
};

// Likewise backward, at step s of the way back.
template <typename E, Cell cell>
struct BackwardElement {
  using C = Compute<E>;
  static constexpr int kGateCount = gate_count(cell);

  const BackwardArgs& args;
  const Walk& walk;
  int64_t d, n, j;

  __device__ __forceinline__ int64_t state() const {
    return (d * args.schedule.rows + n) * args.hidden + j;
  }
  __device__ __forceinline__ C& dh() const { return static_cast<C*>(args.dh)[state()]; }

  // What the step reads beside dh.
  struct Operands {
    C dy;
    C gate[kGateCount];  // LSTM: activations; Elman: h
    C c, c_prev, dc;     // LSTM only
  };
  __device__ __forceinline__ void load(int64_t s, Operands& operands) const {
    const int64_t hidden = args.hidden, row = walk.first_row(s) + n;
    const int64_t column = (row * args.directions + d) * hidden + j;
    operands.dy = args.dy ? to_compute(static_cast<const E*>(args.dy)[column]) : C(0);
    if constexpr (cell == Cell::lstm) {
      const E* gates = static_cast<const E*>(args.gates[d]) + row * kGateCount * hidden + j;
#pragma unroll
      for (int g = 0; g < kGateCount; ++g) operands.gate[g] = to_compute(gates[g * hidden]);
      const E* c_all = static_cast<const E*>(args.c_all[d]);
      operands.c = to_compute(c_all[row * hidden + j]);
      // Of the step that forward took before this one, where the row had one.
      operands.c_prev =
          to_compute(n >= walk.rows(s + 1) ? static_cast<const E*>(args.c0)[state()]
                                           : c_all[(walk.first_row(s + 1) + n) * hidden + j]);
      operands.dc = static_cast<const C*>(args.dc)[state()];
    } else {
      operands.gate[0] = to_compute(static_cast<const E*>(args.h)[column]);
    }
  }

  // Writes dgates of that step, and dc, from dh without dy.
  __device__ __forceinline__ void update(int64_t s, C dh, Operands& operands) const {
    dh += operands.dy;
    C(&gate)[kGateCount] = operands.gate;
    if constexpr (cell == Cell::lstm) {
      lstm_pointwise_backward<Math<C>>(gate, operands.c, operands.c_prev, dh, operands.dc);
      static_cast<C*>(args.dc)[state()] = operands.dc;
    } else {
      gate[0] = rnn_pointwise_backward<Math<C>, cell>(gate[0], dh);
    }
    const int64_t hidden = args.hidden, row = walk.first_row(s) + n;
    E* dgates = static_cast<E*>(args.dgates) + (d * args.rows + row) * kGateCount * hidden + j;
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) dgates[g * hidden] = from_compute<E>(gate[g]);
  }
};

}  // namespace fastrnn::cuda
