// The arithmetic of one cell element, forward and backward, written once.
//
// M says what a kernel computes on: M::V is a SIMD vector on the CPU, a float on a GPU, and M's
// static functions fma, sigmoid, tanh, positive_part and zero_unless_positive work on it.
// Gate order is PyTorch's: i, f, g, o.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_INLINE __host__ __device__ __forceinline__
#else
#define FASTRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fastrnn {

enum class Cell : int { lstm, rnn_tanh, rnn_relu };

enum Gate : int { kInput, kForget, kCell, kOutput, kGates };

// Rows of weight_ih and weight_hh for each hidden unit.
FASTRNN_INLINE constexpr int gate_count(Cell cell) { return cell == Cell::lstm ? kGates : 1; }

// The cell state of one LSTM element. In: the four pre-activations in gate, and c of the previous
// step. Out: the four activations in gate. Returns c of this step.
// Source: Hochreiter & Schmidhuber (1997); gates as in torch.nn.LSTM.
template <typename M, typename V = typename M::V>
FASTRNN_INLINE V lstm_pointwise_c(V (&gate)[kGates], V c) {
  gate[kInput] = M::sigmoid(gate[kInput]);
  gate[kForget] = M::sigmoid(gate[kForget]);
  gate[kCell] = M::tanh(gate[kCell]);
  gate[kOutput] = M::sigmoid(gate[kOutput]);
  return M::fma(gate[kForget], c, gate[kInput] * gate[kCell]);
}

// As that, and h, which it returns: c is replaced by that of this step.
template <typename M, typename V = typename M::V>
FASTRNN_INLINE V lstm_pointwise_forward(V (&gate)[kGates], V& c) {
  c = lstm_pointwise_c<M>(gate, c);
  return gate[kOutput] * M::tanh(c);
}

// Gradient of lstm_pointwise_forward. In: the four activations in gate, c and c_prev of this step,
// dh, and dc from the step that followed. Out: gradients of the pre-activations in gate, and of
// c_prev in dc.
template <typename M, typename V = typename M::V>
FASTRNN_INLINE void lstm_pointwise_backward(V (&gate)[kGates], V c, V c_prev, V dh, V& dc) {
  const V i = gate[kInput], f = gate[kForget], g = gate[kCell], o = gate[kOutput];
  const V tanh_c = M::tanh(c);
  const V d = M::fma(dh * o, 1 - tanh_c * tanh_c, dc);
  gate[kInput] = d * g * (i * (1 - i));
  gate[kForget] = d * c_prev * (f * (1 - f));
  gate[kCell] = d * i * (1 - g * g);
  gate[kOutput] = dh * tanh_c * (o * (1 - o));
  dc = d * f;
}

// One Elman element: h from its pre-activation. Source: Elman (1990), as in torch.nn.RNN.
template <typename M, Cell cell, typename V = typename M::V>
FASTRNN_INLINE V rnn_pointwise_forward(V pre) {
  if constexpr (cell == Cell::rnn_tanh) {
    return M::tanh(pre);
  } else {
    return M::positive_part(pre);
  }
}

// Gradient of rnn_pointwise_forward, from its result h and dh.
template <typename M, Cell cell, typename V = typename M::V>
FASTRNN_INLINE V rnn_pointwise_backward(V h, V dh) {
  if constexpr (cell == Cell::rnn_tanh) {
    return dh * (1 - h * h);
  } else {
    return M::zero_unless_positive(dh, h);
  }
}

}  // namespace fastrnn
