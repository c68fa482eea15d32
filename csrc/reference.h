// The stack in plain, differentiable tensor operations, forward and backward: slow, and what calls
// come to whose results must themselves be differentiable, or that a transform is to see through.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "stack.h"

namespace fastrnn {

// Outputs y, h_n, c_n, as the op recurrent; noise: what each layer's output but the last is
// multiplied with, (rows, D * P) each; not read without dropout.
std::vector<at::Tensor> run_reference(const Stack& stack, const Inputs& inputs,
                                      const std::vector<at::Tensor>& noise);

// Gradients of outputs; zeros where none is given. Refers to the caller's.
struct OutputGradients {
  const OptionalTensor &y, &h_n, &c_n;
};

// Gradients of x, h0, c0 and the weights, as the op recurrent_backward; samples is that op's.
std::vector<at::Tensor> run_reference_backward(const Stack& stack, const Inputs& inputs,
                                               const std::vector<at::Tensor>& noise,
                                               const OutputGradients& gradients,
                                               const std::vector<bool>& needs,
                                               std::optional<int64_t> samples);

// Gradients of dy, dh_n, dc_n, x, h0, c0 and the weights that `needs` names, the others undefined:
// of the sum of what run_reference_backward returns times `tangents`, of x, h0, c0 and the weights,
// undefined where nothing is to be multiplied.
std::vector<at::Tensor> differentiate_reference_backward(const Stack& stack, const Inputs& inputs,
                                                         const std::vector<at::Tensor>& noise,
                                                         const OutputGradients& gradients,
                                                         const std::vector<at::Tensor>& tangents,
                                                         const std::vector<bool>& needs,
                                                         std::optional<int64_t> samples);

// The op recurrent, dropout and all.
std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent_reference(const Options& options,
                                                                   const Inputs& inputs);

// The noise that a forward pass kept in its reserve.
std::vector<at::Tensor> reserved_noise(const Stack& stack, const at::Tensor& reserve);

}  // namespace fastrnn
