// What the ops do, for any backend. A Backend has static functions forward and backward with the
// signatures of run_forward and run_backward (stack.h).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "buffers.h"
#include "dropout.h"
#include "reserve.h"
#include "signatures.h"

namespace fastrnn {

template <typename Backend>
Outputs run(const Options& options, const Inputs& inputs, bool training) {
  const Stack stack = check_arguments(options, inputs);
  const at::TensorOptions like = inputs.x.options();
  const bool lstm = stack.cell == Cell::lstm;
  Outputs out = {at::empty(stack.output_sizes(), like),
                 at::empty(stack.state_sizes(stack.width), like),
                 lstm ? at::empty(stack.state_sizes(stack.hidden), like) : at::empty({0}, like),
                 training ? empty_buffer(stack.reserve_size(), like) : at::Tensor()};
  if (stack.rows > 0) Backend::forward(stack, inputs, out);
  return out;
}

template <typename Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor> recurrent(const Options& options,
                                                         const Inputs& inputs) {
  Outputs out = run<Backend>(options, inputs, /*training=*/false);
  return {std::move(out.y), std::move(out.h_n), std::move(out.c_n)};
}

template <typename Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> recurrent_forward(const Options& options,
                                                                             const Inputs& inputs) {
  Outputs out = run<Backend>(options, inputs, /*training=*/true);
  return {std::move(out.y), std::move(out.h_n), std::move(out.c_n), std::move(out.reserve)};
}

// Raises c10::Error unless a tensor of the backward pass, if it is given, is like x and of that
// size.
inline void check_like(const char* name, const OptionalTensor& given, const at::Tensor& x,
                       at::IntArrayRef sizes) {
  if (!given.has_value()) return;
  TORCH_CHECK(given->defined() && given->device() == x.device() &&
                  given->scalar_type() == x.scalar_type() && given->layout() == at::kStrided,
              "fastrnn: ", name, " must be a dense tensor like x");
  TORCH_CHECK(given->sizes() == sizes, "fastrnn: ", name, " must have size ", sizes, ", got ",
              given->sizes());
  check_memory(*given);
}

// Raises c10::Error unless the rows of each step are those of so many samples.
inline void check_samples(const Stack& stack, int64_t samples) {
  const auto divides = [&](int64_t rows) { return rows % samples == 0; };
  TORCH_CHECK(samples > 0 && divides(stack.batch) &&
                  std::all_of(stack.batch_sizes.begin(), stack.batch_sizes.end(), divides),
              "fastrnn: samples must divide the rows of each step, got ", samples);
}

// The reserve, checked, as the runs read it: a saved-tensor hook may have given it other strides,
// and samples may share one.
inline at::Tensor checked_reserve(const at::Tensor& reserve, const at::Tensor& x,
                                  const Stack& stack, int64_t samples) {
  const int64_t size = stack.reserve_size(), given = reserve.numel();
  const bool shared =
      0 < given && given < size && size % given == 0 && samples % (size / given) == 0;
  check_like("reserve", reserve, x, {shared ? given : size});
  const at::Tensor kept = reserve.contiguous();
  return shared ? repeat_rows(stack, kept, size / given) : kept;
}

// A state's gradient, to be worked on: a copy of the one given, or zeros. Undefined where none is
// given and none wanted.
inline at::Tensor working_copy(const OptionalTensor& gradient, bool wanted, at::IntArrayRef sizes,
                               const at::Tensor& x) {
  const at::TensorOptions options = x.options().dtype(compute_type(x.scalar_type()));
  if (gradient.has_value()) return at::empty(sizes, options).copy_(*gradient);
  return wanted ? at::zeros(sizes, options) : at::Tensor();
}

template <typename Backend>
std::vector<at::Tensor> recurrent_backward(const Options& options, const Inputs& inputs,
                                           const OutputGradients& of_outputs, const at::Tensor& y,
                                           const at::Tensor& reserve,
                                           const c10::List<bool>& needs_list,
                                           std::optional<int64_t> samples) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const auto& [dy, dh_n, dc_n] = of_outputs;
  const Stack stack = check_arguments(options, inputs);
  check_like("dy", dy, x, stack.output_sizes());
  const std::vector<int64_t> h_sizes = stack.state_sizes(stack.width);
  const std::vector<int64_t> c_sizes =
      stack.cell == Cell::lstm ? stack.state_sizes(stack.hidden) : std::vector<int64_t>{0};
  check_like("dh_n", dh_n, x, h_sizes);
  check_like("dc_n", dc_n, x, c_sizes);
  check_like("y", y, x, stack.output_sizes());
  if (samples.has_value()) check_samples(stack, *samples);
  const at::Tensor kept = checked_reserve(reserve, x, stack, samples.value_or(1));
  const std::vector<bool> needs = needs_list.vec();
  check_needs(needs, weights);

  const auto sizes_of = [&](const at::Tensor& weight) {
    std::vector<int64_t> sizes = weight.sizes().vec();
    if (samples.has_value()) sizes.insert(sizes.begin(), *samples);
    return sizes;
  };

  const bool wants_dh0 = needs[kH0] && h0.has_value(), wants_dc0 = needs[kC0] && c0.has_value();
  Gradients gradients{samples.value_or(1),
                      dy.value_or(at::Tensor()),
                      working_copy(dh_n, wants_dh0, h_sizes, x),
                      working_copy(dc_n, wants_dc0, c_sizes, x),
                      wants_dh0,
                      needs[kX] ? at::empty(x.sizes(), x.options()) : at::Tensor(),
                      std::vector<at::Tensor>(weights.size())};
  for (size_t i = 0; i < weights.size(); ++i) {
    // Without rows there is no run to fill them.
    if (needs[kFirstWeight + i]) {
      gradients.dweights[i] = stack.rows > 0 ? at::empty(sizes_of(weights[i]), x.options())
                                             : at::zeros(sizes_of(weights[i]), x.options());
    }
  }
  if (stack.rows > 0) Backend::backward(stack, inputs, y, kept, gradients);
  std::vector<at::Tensor> wanted;
  if (needs[kX]) wanted.push_back(gradients.dx);
  if (wants_dh0) wanted.push_back(gradients.dh.to(x.scalar_type()));
  if (wants_dc0) wanted.push_back(gradients.dc.to(x.scalar_type()));
  for (const at::Tensor& dweight : gradients.dweights) {
    if (dweight.defined()) wanted.push_back(dweight);
  }
  return wanted;
}

// The last layer's input, which a forward pass kept, as an x without batch_first. There are two
// layers or more.
inline at::Tensor reserved_input(const Stack& stack, const at::Tensor& reserve,
                                 const OptionalTensor& masks) {
  const int64_t below = stack.layers - 2;
  at::Tensor rows = reserve_views(stack, reserve).outputs[below];
  if (stack.drops) rows = dropped(stack, *masks, below, rows);
  if (stack.packed || !stack.batched) return rows;
  return rows.view({stack.steps, stack.batch, stack.layer_width()});
}

template <typename Backend>
at::Tensor output_again(const Options& options, const Inputs& inputs, const at::Tensor& reserve) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const Stack stack = check_arguments(options, inputs);
  const at::Tensor kept = checked_reserve(reserve, x, stack, /*samples=*/1);
  const bool alone = stack.layers == 1;
  const at::Tensor input = alone ? x : reserved_input(stack, kept, masks);
  const auto of_last = [&](const OptionalTensor& state) {
    return state.has_value() ? OptionalTensor(state->slice(0, -stack.directions)) : state;
  };
  const OptionalTensor h = of_last(h0), c = of_last(c0);
  const at::TensorList last =
      weights.slice((stack.layers - 1) * stack.directions * stack.weights_per_strand());
  const Options of_last_layer{options.mode, /*num_layers=*/1, options.has_biases,
                              options.bidirectional,
                              /*batch_first=*/alone && options.batch_first};
  const at::Tensor y = run<Backend>(of_last_layer, {input, batch_sizes, h, c, last}, false).y;
  return stack.batch_first && !alone ? y.transpose(0, 1).contiguous() : y;
}

// Registers the ops' kernels for one dispatch key.
template <typename Backend>
void register_kernels(torch::Library& library) {
  library.impl("recurrent", run_op<recurrent<Backend>>);
  library.impl("recurrent_forward", run_op<recurrent_forward<Backend>>);
  library.impl("recurrent_backward", backward_op<recurrent_backward<Backend>, int64_t>);
  library.impl("output_again", output_again_op<output_again<Backend>>);
}

}  // namespace fastrnn
