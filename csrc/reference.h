// The stack in plain, differentiable tensor operations: slow, and the one that backward falls back
// to where its own result must be differentiable (create_graph=True).
#pragma once

#include <ATen/core/Tensor.h>

#include "stack.h"

namespace fastrnn {

// Outputs y, h_n, c_n, as the op recurrent; noise: what each layer's output but the last is
// multiplied with, (rows, D * P) each, empty without dropout.
std::vector<at::Tensor> run_reference(const Stack& stack, const Inputs& inputs,
                                      const std::vector<at::Tensor>& noise);

// The noise of a run, drawn as the op recurrent draws it.
std::vector<at::Tensor> draw_noise(const Stack& stack, const at::TensorOptions& options);

// The noise that a forward pass kept in its reserve.
std::vector<at::Tensor> reserved_noise(const Stack& stack, const at::Tensor& reserve);

}  // namespace fastrnn
