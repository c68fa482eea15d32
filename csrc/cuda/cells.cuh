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

  // w_ih . x + bias, by gate.
  __device__ __forceinline__ void load_input(C (&pre)[kGateCount]) const {
    const int64_t gates = kGateCount * args.hidden;
    const C* x = static_cast<const C*>(args.projected) + (d * args.rows + row) * gates + j;
    const C* bias = static_cast<const C*>(args.bias) + d * gates + j;
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) pre[g] = x[g * args.hidden] + bias[g * args.hidden];
  }

  // h from the pre-activations; updates c and keeps what the backward pass reads.
  __device__ __forceinline__ E update(C (&pre)[kGateCount]) const {
    if constexpr (cell == Cell::lstm) {
      C* c = static_cast<C*>(args.c) + (d * args.schedule.rows + n) * args.hidden + j;
      C new_c = *c;
      const C h = lstm_pointwise_forward<Math<C>>(pre, new_c);
      *c = new_c;
      if (args.gates[d]) {
        E* gates = static_cast<E*>(args.gates[d]) + row * kGates * args.hidden + j;
#pragma unroll
        for (int g = 0; g < kGates; ++g) gates[g * args.hidden] = from_compute<E>(pre[g]);
        static_cast<E*>(args.cells[d])[row * args.hidden + j] = from_compute<E>(new_c);
      }
      return from_compute<E>(h);
    } else {
      return from_compute<E>(rnn_pointwise_forward<Math<C>, cell>(pre[0]));
    }
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

  const BackwardArgs& args;
  const Walk& walk;
  int64_t d, n, j;

  __device__ __forceinline__ C& dh() const {
    return static_cast<C*>(args.dh)[(d * args.schedule.rows + n) * args.hidden + j];
  }

  // Writes dgates of that step, and dc, from dh without dy.
  __device__ __forceinline__ void update(int64_t s, C dh) const {
    const int64_t hidden = args.hidden;
    const int64_t row = walk.first_row(s) + n;
    const int64_t column = (row * args.directions + d) * hidden + j;
    if (args.dy) dh += to_compute(static_cast<const E*>(args.dy)[column]);
    constexpr int kGateCount = gate_count(cell);
    E* dgates = static_cast<E*>(args.dgates) + (d * args.rows + row) * kGateCount * hidden + j;
    if constexpr (cell == Cell::lstm) {
      const int64_t state = (d * args.schedule.rows + n) * hidden + j;
      const E* cells = static_cast<const E*>(args.cells[d]);
      // The step that forward took before this one, where the row had one.
      const bool first = n >= walk.rows(s + 1);
      const C c_prev = to_compute(first ? static_cast<const E*>(args.c0)[state]
                                        : cells[(walk.first_row(s + 1) + n) * hidden + j]);
      C gate[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        gate[g] = to_compute(static_cast<const E*>(args.gates[d])[(row * kGates + g) * hidden + j]);
      }
      C dc = static_cast<C*>(args.dc)[state];
      lstm_pointwise_backward<Math<C>>(gate, to_compute(cells[row * hidden + j]), c_prev, dh, dc);
      static_cast<C*>(args.dc)[state] = dc;
#pragma unroll
      for (int g = 0; g < kGates; ++g) dgates[g * hidden] = from_compute<E>(gate[g]);
    } else {
      const C h = to_compute(static_cast<const E*>(args.h)[column]);
      dgates[0] = from_compute<E>(rnn_pointwise_backward<Math<C>, cell>(h, dh));
    }
  }
};

}  // namespace fastrnn::cuda
