// A cell as a stack of one layer and one step.
#pragma once

#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/variable.h>

#include <tuple>

#include "stack.h"

namespace fastrnn {

// Raises c10::Error unless x is (N, I) or (I).
inline void check_cell_input(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 1 || x.dim() == 2, "fastrnn: x must have 1 or 2 dimensions, got ",
              x.dim());
}

// A state (N, H) or (H) as that of one layer, (1, N, H) or (1, H).
inline OptionalTensor as_stacked(const OptionalTensor& state) {
  return state.has_value() ? OptionalTensor(state->unsqueeze(0)) : std::nullopt;
}

// A state of one layer, (1, N, H) or (1, H), without that dimension. No op reads the tensor again,
// so the result is no view of it: it may be detached or written to in place, as torch.nn's. But
// selective checkpointing may keep the tensor, and is to see such a write.
inline at::Tensor unstacked(const at::Tensor& state) {
  namespace impl = torch::autograd::impl;
  at::Tensor result = at::_unsafe_view_symint(state, state.sym_sizes().slice(1));
  impl::set_version_counter(result, impl::version_counter(state));
  return result;
}

// Calls `run`, which does what recurrent does; returns h and c.
template <typename Run>
std::tuple<at::Tensor, at::Tensor> run_cell(const Run& run, c10::string_view mode,
                                            const at::Tensor& x, const OptionalTensor& h0,
                                            const OptionalTensor& c0, at::TensorList weights,
                                            bool has_biases) {
  TORCH_CHECK(weights.size() == (has_biases ? 4 : 2), "fastrnn: a cell has ", has_biases ? 4 : 2,
              " weights, got ", weights.size());
  check_cell_input(x);
  const auto [y, h_n, c_n] =
      run(Options{mode, /*num_layers=*/1, has_biases, /*bidirectional=*/false,
                  /*batch_first=*/false},
          Inputs{x.unsqueeze(0), std::nullopt, as_stacked(h0), as_stacked(c0), weights});
  return {unstacked(h_n), mode == "LSTM" ? unstacked(c_n) : c_n};
}

// The op cell, made of recurrent and views: for every dispatch key that has no kernel of its own.
std::tuple<at::Tensor, at::Tensor> cell_of_recurrent(c10::string_view mode, const at::Tensor& x,
                                                     const OptionalTensor& h0,
                                                     const OptionalTensor& c0,
                                                     at::TensorList weights, bool has_biases);

}  // namespace fastrnn
