#include "reference.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <array>

#include "buffers.h"

namespace fastrnn {
namespace {

using at::Tensor;

struct CellState {
  Tensor h, c;
};

// One step of one cell for the rows of x.
CellState step_cell(const Stack& stack, const Tensor& x, const CellState& state,
                    at::TensorList weights) {
  const auto bias = [&](int64_t i) {
    return stack.has_biases ? std::optional<Tensor>(weights[i]) : std::nullopt;
  };
  const Tensor gates =
      at::linear(x, weights[0], bias(2)) + at::linear(state.h, weights[1], bias(3));
  if (stack.cell == Cell::rnn_tanh) return {gates.tanh(), {}};
  if (stack.cell == Cell::rnn_relu) return {gates.relu(), {}};
  const std::vector<Tensor> gate = gates.chunk(kGates, 1);
  const Tensor c = gate[kForget].sigmoid() * state.c + gate[kInput].sigmoid() * gate[kCell].tanh();
  const Tensor h = gate[kOutput].sigmoid() * c.tanh();
  return {stack.projected ? at::linear(h, weights.back()) : h, c};
}

// One direction of one layer over x (rows, I). Returns its output (rows, P); leaves the final
// state.
Tensor run_cell(const Stack& stack, const Tensor& x, bool reverse, CellState& state,
                at::TensorList weights) {
  const Schedule schedule = stack.schedule();
  std::vector<Tensor> outputs(stack.steps);
  for (int64_t s = 0; s < stack.steps; ++s) {
    const int64_t t = reverse ? stack.steps - 1 - s : s;
    const int64_t rows = schedule.rows_at(t);
    // Rows that have ended, or not begun, keep their state.
    const auto update = [&](const Tensor& state, const Tensor& running) {
      if (!state.defined() || rows == stack.batch) return running;
      return at::cat({running, state.narrow(0, rows, stack.batch - rows)});
    };
    const auto running = [&](const Tensor& state) {
      return state.defined() ? state.narrow(0, 0, rows) : state;
    };
    const CellState next = step_cell(stack, x.narrow(0, schedule.offset(t), rows),
                                     {running(state.h), running(state.c)}, weights);
    outputs[t] = next.h;
    state = {update(state.h, next.h), update(state.c, next.c)};
  }
  return at::cat(outputs);
}

// Sizes are numbers here: as a tensor, a transform would wrap them and hide their data.
std::optional<Tensor> as_tensor(const at::OptionalIntArrayRef& batch_sizes) {
  if (!batch_sizes.has_value()) return std::nullopt;
  return at::from_blob(const_cast<int64_t*>(batch_sizes->data()),
                       {static_cast<int64_t>(batch_sizes->size())}, at::kLong);
}

// The op reference: without dropout, which draws at random.
std::tuple<Tensor, Tensor, Tensor> reference(
    c10::string_view mode, const Tensor& x, at::OptionalIntArrayRef batch_sizes,
    const std::optional<Tensor>& h0, const std::optional<Tensor>& c0, at::TensorList weights,
    int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first) {
  const std::optional<Tensor> sizes = as_tensor(batch_sizes);
  const Inputs inputs{x, sizes, h0, c0, weights};
  const Stack stack = check_arguments(
      {mode, num_layers, has_biases, bidirectional, batch_first, /*dropout=*/0}, inputs);
  const std::vector<Tensor> outputs = run_reference(stack, inputs, {});
  return {outputs[0], outputs[1], outputs[2]};
}

// The op check: raises what recurrent would, before a transform rearranges the arguments.
void check(c10::string_view mode, const Tensor& x, at::OptionalIntArrayRef batch_sizes,
           const std::optional<Tensor>& h0, const std::optional<Tensor>& c0, at::TensorList weights,
           int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first,
           double dropout) {
  const std::optional<Tensor> sizes = as_tensor(batch_sizes);
  check_arguments({mode, num_layers, has_biases, bidirectional, batch_first, dropout},
                  {x, sizes, h0, c0, weights});
}

}  // namespace

std::vector<Tensor> run_reference(const Stack& stack, const Inputs& inputs,
                                  const std::vector<Tensor>& noise) {
  const Tensor& x = inputs.x;
  const bool lstm = stack.cell == Cell::lstm;
  const auto initial = [&](const std::optional<Tensor>& given, int64_t width) {
    const std::array<int64_t, 3> sizes = {stack.cells(), stack.batch, width};
    return given.has_value() ? given->reshape(sizes) : at::zeros(sizes, x.options());
  };
  const Tensor h = initial(inputs.h0, stack.width);
  const Tensor c = lstm ? initial(inputs.c0, stack.hidden) : Tensor();
  Tensor layer_input =
      (stack.batch_first ? x.transpose(0, 1) : x).reshape({stack.rows, stack.input});
  std::vector<Tensor> h_n, c_n;
  const int64_t per_cell = stack.weights_per_cell();
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    std::vector<Tensor> outputs;
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t cell = layer * stack.directions + d;
      CellState state = {h[cell], lstm ? c[cell] : Tensor()};
      outputs.push_back(run_cell(stack, layer_input, d == 1, state,
                                 inputs.weights.slice(cell * per_cell, per_cell)));
      h_n.push_back(state.h);
      if (lstm) c_n.push_back(state.c);
    }
    layer_input = at::cat(outputs, 1);
    if (stack.drops_after(layer)) layer_input = layer_input * noise[layer];
  }
  Tensor y = layer_input;
  if (stack.batch_first) {
    y = y.reshape({stack.steps, stack.batch, stack.layer_width()}).transpose(0, 1);
  } else {
    y = y.reshape(stack.output_sizes());
  }
  return {
      y, at::stack(h_n).reshape(stack.state_sizes(stack.width)),
      lstm ? at::stack(c_n).reshape(stack.state_sizes(stack.hidden)) : at::zeros({0}, x.options())};
}

std::vector<Tensor> draw_noise(const Stack& stack, const at::TensorOptions& options) {
  std::vector<Tensor> noise;
  for (int64_t layer = 0; stack.drops_after(layer); ++layer) {
    draw_dropout(noise.emplace_back(at::empty({stack.rows, stack.layer_width()}, options)),
                 stack.dropout);
  }
  return noise;
}

std::vector<Tensor> reserved_noise(const Stack& stack, const Tensor& reserve) {
  return reserve_views(stack, reserve).noise;
}

// Made of differentiable ops, so that every transform of torch.func sees through it.
TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def(
      "reference(str mode, Tensor x, int[]? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights,"
      " int num_layers, bool has_biases, bool bidirectional, bool batch_first) "
      "-> (Tensor y, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "check(str mode, Tensor x, int[]? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first, float dropout) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("reference", reference);
  m.impl("check", check);
}

// What the alias above does not reach: under vmap too they are the ops that they are made of.
TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatchedDecomposition, m) {
  m.impl("reference", reference);
  m.impl("check", check);
}

}  // namespace fastrnn
