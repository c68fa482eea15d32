// A stack of recurrent layers: the ops' arguments, as given and checked, and its runs on a CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace fastrnn {

using OptionalTensor = std::optional<at::Tensor>;
inline const OptionalTensor kNone;

// The ops' tensors, as ops.cpp describes them. Refers to the caller's.
struct Inputs {
  const at::Tensor& x;
  const OptionalTensor &batch_sizes, &h0, &c0;
  at::TensorList weights;
  const OptionalTensor& masks = kNone;
};

// Their other arguments.
struct Options {
  c10::string_view mode;
  int64_t num_layers;
  bool has_biases, bidirectional, batch_first;
  double dropout = 0;
};

// Gradients of the ops' results, or their tangents; zeros where none is given.
struct OutputGradients {
  OptionalTensor y, h_n, c_n;
};

// A strand is one direction of one layer.
constexpr int64_t weights_per_strand(bool has_biases, bool projected) {
  return 2 + 2 * has_biases + projected;
}

// Inputs and Options, checked: L layers of D directions over T steps of at most N rows; I, H, P as
// in kernels.h.
struct Stack {
  Cell cell;
  int64_t layers, directions;
  bool has_biases, projected;
  bool packed, batched, batch_first;
  bool drops;      // there are masks of dropout
  double dropout;  // its probability
  int64_t steps, batch, input, hidden, width;
  int64_t rows;                               // of all steps together
  std::vector<int64_t> batch_sizes, offsets;  // packed only, (T) each
  // Of the cores of a team: other work wants them too (contention.h), or they lie far apart
  // (distance.h).
  bool contended, distant;

  Schedule schedule() const {
    return {steps, batch, packed ? batch_sizes.data() : nullptr, packed ? offsets.data() : nullptr};
  }
  int64_t strands() const { return layers * directions; }
  int64_t gates() const { return hidden * gate_count(cell); }
  int64_t layer_width() const { return directions * width; }
  int64_t layer_input(int64_t layer) const { return layer == 0 ? input : layer_width(); }
  // Of the first layer and of the others. A narrower one may take more memory of a kernel.
  std::array<int64_t, 2> layer_inputs() const { return {input, layer_input(layers - 1)}; }
  int64_t widest_input() const {
    const auto [first, others] = layer_inputs();
    return others > first ? others : first;
  }
  int64_t weights_per_strand() const { return fastrnn::weights_per_strand(has_biases, projected); }
  bool drops_after(int64_t layer) const { return drops && layer + 1 < layers; }

  std::vector<int64_t> output_sizes() const;
  std::vector<int64_t> state_sizes(int64_t state_width) const;  // of h_n (P) and c_n (H)
  int64_t reserve_size() const;  // elements that the forward pass keeps for the backward pass
};

// Whether there are kernels for that dtype.
inline bool is_fused(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

// Raises c10::Error (RuntimeError in Python) unless the kernels can run on these arguments.
Stack check_arguments(const Options& options, const Inputs& inputs);

// What a run computes: contiguous tensors, to be filled.
struct Outputs {
  at::Tensor y, h_n, c_n;  // c_n is empty for Elman
  at::Tensor reserve;      // reserve_size() elements for run_backward; undefined in inference
};

void run_forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs);

struct Gradients {
  // The batch holds so many samples, row n one of sample n % samples, whose weights have gradients
  // of their own.
  int64_t samples;
  at::Tensor dy;  // undefined: zeros
  // (L * D, N, P or H), of compute_type: those of h_n and c_n on entry, of h0 (if wants_dh0) and c0
  // on return. Undefined if those are zeros and these not wanted.
  at::Tensor dh, dc;
  bool wants_dh0;
  // To be filled, contiguous; undefined where not wanted. Those of a weight's samples lie one after
  // the other.
  at::Tensor dx;
  std::vector<at::Tensor> dweights;
};

// y is as run_forward left it, but may have any strides.
void run_backward(const Stack& stack, const Inputs& inputs, const at::Tensor& y,
                  const at::Tensor& reserve, const Gradients& gradients);

}  // namespace fastrnn
