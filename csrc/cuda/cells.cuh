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

  // The biases of a unit, by gate, which all steps share.
  struct Biases {
    C of_gate[kGateCount] = {};
  };
  __device__ __forceinline__ static Biases load_biases(const ForwardArgs& args, int64_t d,
                                                       int64_t j) {
    Biases biases;
    const E* b_ih = static_cast<const E*>(args.b_ih[d]);
    const E* b_hh = static_cast<const E*>(args.b_hh[d]);
    if (!b_ih || j >= args.hidden) return biases;
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) {
      const int64_t i = g * args.hidden + j;
      biases.of_gate[g] = to_compute(b_ih[i]) + to_compute(b_hh[i]);
    }
    return biases;
  }

  // What the step starts from beside h: w_ih . x, by gate, and c. Only loaded here: whatever used
  // them would wait for them, and a warp does nothing else meanwhile.
  struct Operands {
    C pre[kGateCount];
    C c;
  };
  __device__ __forceinline__ void load(Operands& operands) const {
    const int64_t gates = kGateCount * args.hidden;
    const C* x = static_cast<const C*>(args.input_products) + (d * args.rows + row) * gates + j;
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) operands.pre[g] = x[g * args.hidden];
    if constexpr (cell == Cell::lstm) operands.c = c();
  }

  // h, from w_hh . h by gate; updates c and keeps what the backward pass reads.
  template <typename Product>
  __device__ __forceinline__ E update(Operands& operands, const Biases& biases,
                                      Product&& product) const {
    C(&pre)[kGateCount] = operands.pre;
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) pre[g] = pre[g] + biases.of_gate[g] + product(g);
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

  // What the step reads beside dh, as it lies: see ForwardElement.
  struct Operands {
    E dy;
    E gate[kGateCount];  // LSTM: activations; Elman: h
    E c, c_prev;         // LSTM only
    C dc;
  };
  __device__ __forceinline__ void load(int64_t s, Operands& operands) const {
    const int64_t hidden = args.hidden, row = walk.first_row(s) + n;
    const int64_t column = (row * args.directions + d) * hidden + j;
    operands.dy = args.dy ? static_cast<const E*>(args.dy)[column] : from_compute<E>(C(0));
    if constexpr (cell == Cell::lstm) {
      const E* gates = static_cast<const E*>(args.gates[d]) + row * kGateCount * hidden + j;
#pragma unroll
      for (int g = 0; g < kGateCount; ++g) operands.gate[g] = gates[g * hidden];
      const E* c_all = static_cast<const E*>(args.c_all[d]);
      operands.c = c_all[row * hidden + j];
      // Of the step that forward took before this one, where the row had one.
      const E* const c_prev = n >= walk.rows(s + 1)
                                  ? static_cast<const E*>(args.c0) + state()
                                  : c_all + (walk.first_row(s + 1) + n) * hidden + j;
      operands.c_prev = *c_prev;
      operands.dc = static_cast<const C*>(args.dc)[state()];
    } else {
      operands.gate[0] = static_cast<const E*>(args.h)[column];
    }
  }

  // Writes dgates of that step, and dc, from dh without dy.
  __device__ __forceinline__ void update(int64_t s, C dh, const Operands& operands) const {
    dh += to_compute(operands.dy);
    C gate[kGateCount];
#pragma unroll
    for (int g = 0; g < kGateCount; ++g) gate[g] = to_compute(operands.gate[g]);
    if constexpr (cell == Cell::lstm) {
      C dc = operands.dc;
      lstm_pointwise_backward<Math<C>>(gate, to_compute(operands.c), to_compute(operands.c_prev),
                                       dh, dc);
      static_cast<C*>(args.dc)[state()] = dc;
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
