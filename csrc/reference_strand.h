// One direction of one layer in plain, differentiable tensor operations: its outputs, their
// tangents and gradients, and gradients of those.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "stack.h"

namespace fastrnn::plain {

// What a strand has of all steps: step by step, or (rows, width), one step after the other: as
// asked for last. Undefined: zeros.
class Rows {
 public:
  Rows() = default;
  Rows(const Stack& stack, std::vector<at::Tensor> steps)
      : stack_(&stack), steps_(std::move(steps)) {}
  Rows(const Stack& stack, at::Tensor all) : stack_(&stack), all_(std::move(all)) {}

  bool defined() const { return all_.defined() || (!steps_.empty() && steps_[0].defined()); }
  const at::Tensor& all() const;
  at::Tensor at(int64_t t) const;

 private:
  const Stack* stack_ = nullptr;
  mutable at::Tensor all_;
  mutable std::vector<at::Tensor> steps_;
};

// A state, or a tangent or gradient of one, of N rows or of those of a step: h is as wide as P, c,
// LSTM only, as H.
struct CellState {
  at::Tensor h, c;
};
struct CellStates {
  Rows h, c;
};

// A strand's weights, or tangents of them: undefined where there are none. Such tangents may be
// each sample's own, along a first dimension; row n of a step is one of sample n % samples.
struct Weights {
  at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;

  Weights(const Stack& stack, at::TensorList all, int64_t strand);
};

struct Strand {
  const Stack& stack;
  bool reverse;
  Weights weights;
};

// What a strand computes. LSTM only: gate (activated), tanh_c and unprojected, which is o * tanh(c)
// and, without a projection, h.
struct Outputs {
  at::Tensor x;  // (rows, I), as given
  CellStates before;
  Rows h;
  std::array<Rows, kGates> gate;
  Rows tanh_c, unprojected;
  CellState last;
};
Outputs run(const Strand& strand, const at::Tensor& x, const CellState& initial);

// What a fused run kept of it, as ReserveParts: (rows, ...); undefined where it keeps none.
struct Kept {
  at::Tensor h, gates, c, unprojected;
};
Outputs recall(const Strand& strand, const at::Tensor& x, const CellState& initial,
               const Kept& kept);

// Derivatives of an LSTM's steps: of c by the pre-activations of i, f and g, and of the unprojected
// output by that of o, (rows, 4 * H); and of the unprojected output by c.
struct Slopes {
  Rows gates, c;
};
Slopes differentiate(const Strand& strand, const Outputs& outputs);

// Tangents of Outputs; gates: of the pre-activations.
struct Tangents {
  at::Tensor x;
  Rows gates;
  CellStates before;
  Rows h, c, unprojected;
  CellState last;
};
// From those of x, the initial state and the weights.
Tangents push(const Strand& strand, const Outputs& outputs, const Slopes& slopes,
              const at::Tensor& x, const CellState& initial, const Weights& weights,
              std::optional<int64_t> samples);

// Gradients of x (if it is wanted), the pre-activations, each step's results and the initial state.
struct Gradients {
  at::Tensor x;
  Rows gates, h, c, unprojected;
  CellState first;
};
// What a pass of gradients meets on its way: added to those of the same names, `before` to those of
// the state before each step.
struct Sources {
  at::Tensor x, gates, h, c, unprojected;
  CellState before;
};
// last: the gradient of the final state.
Gradients pull(const Strand& strand, const Outputs& outputs, const Slopes& slopes,
               const Sources& sources, const CellState& last, bool wants_x);

// The sum of gradients * tangents depends on the outputs: its gradients by them, as sources.
Sources curve(const Strand& strand, const Outputs& outputs, const Tangents& tangents,
              const Gradients& gradients, const Weights& weight_tangents,
              std::optional<int64_t> samples);

// The gradient of a weight (each sample's, if there are samples), from those of what it gave and
// from what it met; and that of a bias.
at::Tensor weight_gradient(const at::Tensor& gradient, const at::Tensor& rows,
                           std::optional<int64_t> samples);
at::Tensor bias_gradient(const at::Tensor& gradient, std::optional<int64_t> samples);

// The sum of those of two tensors that are defined.
at::Tensor plus(const at::Tensor& a, const at::Tensor& b);

}  // namespace fastrnn::plain
