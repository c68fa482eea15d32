// The stack in plain, differentiable tensor operations, forward and backward, and the derivatives
// of both: slower than the kernels, and what calls come to whose results must themselves be
// differentiable, or that a transform is to see through.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "stack.h"

namespace fastrnn {

// Outputs y, h_n, c_n, as the op recurrent.
std::vector<at::Tensor> run_reference(const Stack& stack, const Inputs& inputs);

// Gradients of x, h0, c0 and the weights, as the op recurrent_backward; samples is that op's.
std::vector<at::Tensor> run_reference_backward(const Stack& stack, const Inputs& inputs,
                                               const OutputGradients& gradients,
                                               const std::vector<bool>& needs,
                                               std::optional<int64_t> samples);

// What a fused run left: its output and its reserve, which samples may share. Without them the
// stack is run again, as it must be where results are to be differentiable.
struct Kept {
  at::Tensor y, reserve;
};

// Tangents of x, h0, c0 and the weights, undefined where there are none, to those of y, h_n and c_n
// (undefined for Elman).
std::vector<at::Tensor> push_reference(const Stack& stack, const Inputs& inputs, const Kept& kept,
                                       at::TensorList tangents);

// Tangents, as push_reference takes them, and those of gradients that run_reference_backward takes.
// Those of weights may be each sample's own.
struct SecondTangents {
  at::TensorList of_inputs;
  OutputGradients of_gradients;
  std::optional<int64_t> samples;
};

// Derivatives of run_reference_backward. The sum of what it returns (of all inputs) times their
// tangents has gradients by dy, dh_n, dc_n, x, h0, c0 and the weights: those that `needs` names are
// returned, the others undefined. As second derivatives are symmetric, those from x on are the
// tangents of what it returns, to which tangents of dy, dh_n and dc_n add theirs.
// samples: of weights' gradients that are returned.
std::vector<at::Tensor> differentiate_reference_backward(
    const Stack& stack, const Inputs& inputs, const Kept& kept, const OutputGradients& gradients,
    const SecondTangents& tangents, const std::vector<bool>& needs, std::optional<int64_t> samples);

}  // namespace fastrnn
