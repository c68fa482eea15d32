#include "reference.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "buffers.h"

namespace fastrnn {
namespace {

using at::Tensor;

struct CellState {
  Tensor h, c;
};

// One step of one strand for its rows.
struct Step {
  CellState before, after;
  std::vector<Tensor> gate;  // activated, LSTM only
  Tensor unprojected;        // o * tanh(c), LSTM only
};

// One layer of all steps; rows are those of the steps, one after the other.
struct Layer {
  Tensor x;                              // (rows, I)
  std::vector<std::vector<Step>> steps;  // by direction, then t
  Tensor y;                              // (rows, D * P)
};

Step step_cell(const Stack& stack, const Tensor& x, const CellState& state,
               at::TensorList weights) {
  const auto bias = [&](int64_t i) {
    return stack.has_biases ? OptionalTensor(weights[i]) : std::nullopt;
  };
  const Tensor gates =
      at::linear(x, weights[0], bias(2)) + at::linear(state.h, weights[1], bias(3));
  if (stack.cell == Cell::rnn_tanh) return {state, {gates.tanh(), {}}, {}, {}};
  if (stack.cell == Cell::rnn_relu) return {state, {gates.relu(), {}}, {}, {}};
  std::vector<Tensor> gate = gates.chunk(kGates, 1);
  for (int g = 0; g < kGates; ++g) gate[g] = g == kCell ? gate[g].tanh() : gate[g].sigmoid();
  const Tensor c = gate[kForget] * state.c + gate[kInput] * gate[kCell];
  const Tensor m = gate[kOutput] * c.tanh();
  return {state, {stack.projected ? at::linear(m, weights.back()) : m, c}, gate, m};
}

// A state or its gradient of a direction, of which a step has run on the first rows: rows that have
// ended, or not begun, keep theirs.
Tensor update(const Stack& stack, const Tensor& state, const Tensor& running, int64_t rows) {
  if (rows == stack.batch) return running;
  return at::cat({running, state.narrow(0, rows, stack.batch - rows)});
}

// One direction of one layer over x (rows, I); leaves the final state.
std::vector<Step> run_direction(const Stack& stack, const Tensor& x, bool reverse, CellState& state,
                                at::TensorList weights) {
  const Schedule schedule = stack.schedule();
  std::vector<Step> steps(stack.steps);
  for (int64_t s = 0; s < stack.steps; ++s) {
    const int64_t t = schedule.step(s, reverse);
    const int64_t rows = schedule.rows_at(t);
    const CellState running = {state.h.narrow(0, 0, rows),
                               state.c.defined() ? state.c.narrow(0, 0, rows) : state.c};
    steps[t] = step_cell(stack, x.narrow(0, schedule.offset(t), rows), running, weights);
    state.h = update(stack, state.h, steps[t].after.h, rows);
    if (state.c.defined()) state.c = update(stack, state.c, steps[t].after.c, rows);
  }
  return steps;
}

// What f says of each step, one after the other.
template <typename F>
Tensor collect(const std::vector<Step>& steps, const F& f) {
  std::vector<Tensor> parts;
  parts.reserve(steps.size());
  for (const Step& step : steps) parts.push_back(f(step));
  return at::cat(parts);
}

// As as_rows took x, y or a gradient of one, and back.
Tensor as_sequence(const Stack& stack, const Tensor& rows, int64_t width) {
  if (stack.packed) return rows;
  if (!stack.batched) return rows.reshape({stack.steps, width});
  const Tensor sequence = rows.reshape({stack.steps, stack.batch, width});
  return stack.batch_first ? sequence.transpose(0, 1) : sequence;
}

at::TensorList weights_of(const Stack& stack, at::TensorList weights, int64_t strand) {
  return weights.slice(strand * stack.weights_per_strand(), stack.weights_per_strand());
}

// All layers; leaves the final states, by strand.
std::vector<Layer> run_layers(const Stack& stack, const Inputs& inputs,
                              const std::vector<Tensor>& noise, std::vector<CellState>& states) {
  const bool lstm = stack.cell == Cell::lstm;
  const at::TensorOptions options = inputs.x.options();
  const Tensor h = state_or_zeros(stack, inputs.h0, stack.width, options);
  const Tensor c = lstm ? state_or_zeros(stack, inputs.c0, stack.hidden, options) : Tensor();
  std::vector<Layer> layers(stack.layers);
  for (int64_t l = 0; l < stack.layers; ++l) {
    Layer& layer = layers[l];
    layer.x = l == 0 ? as_rows(stack, inputs.x, stack.input) : layers[l - 1].y;
    if (l > 0 && stack.drops_after(l - 1)) layer.x = layer.x * noise[l - 1];
    std::vector<Tensor> outputs;
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t strand = l * stack.directions + d;
      CellState state = {h[strand], lstm ? c[strand] : Tensor()};
      layer.steps.push_back(
          run_direction(stack, layer.x, d == 1, state, weights_of(stack, inputs.weights, strand)));
      outputs.push_back(collect(layer.steps[d], [](const Step& step) { return step.after.h; }));
      states.push_back(state);
    }
    layer.y = at::cat(outputs, 1);
  }
  return layers;
}

// From the gradients of a step's h and c to those of its pre-activations, and of c before it. Not
// of h before it: that is dgates . w_hh.
struct StepGradient {
  Tensor dgates, dc;
};
StepGradient step_back(const Stack& stack, const Step& step, const Tensor& dh, const Tensor& dc,
                       at::TensorList weights) {
  const Tensor& h = step.after.h;
  if (stack.cell == Cell::rnn_tanh) return {at::tanh_backward(dh, h), {}};
  if (stack.cell == Cell::rnn_relu) return {at::threshold_backward(dh, h, 0), {}};
  const Tensor &i = step.gate[kInput], &f = step.gate[kForget], &g = step.gate[kCell],
               &o = step.gate[kOutput];
  const Tensor dm = stack.projected ? dh.mm(weights.back()) : dh;
  const Tensor tanh_c = step.after.c.tanh();
  const Tensor d = dc + at::tanh_backward(dm * o, tanh_c);
  return {at::cat({at::sigmoid_backward(d * g, i), at::sigmoid_backward(d * step.before.c, f),
                   at::tanh_backward(d * i, g), at::sigmoid_backward(dm * tanh_c, o)},
                  1),
          d * f};
}

// The gradient of a weight, or of each sample's, from those of what it gave and from what it met.
// (mm and not matmul, which autograd's own vmap does sample by sample.)
Tensor differentiate_weight(const Tensor& gradient, const Tensor& rows,
                            std::optional<int64_t> samples) {
  if (!samples.has_value()) return gradient.t().mm(rows);
  return by_sample(gradient, *samples).transpose(1, 2).bmm(by_sample(rows, *samples));
}
Tensor differentiate_bias(const Tensor& gradient, std::optional<int64_t> samples) {
  return samples.has_value() ? by_sample(gradient, *samples).sum(1) : gradient.sum(0);
}

// Backward of run_direction. dstate: of the final state, left as of the initial one. Returns the
// gradient of x if it is wanted, and leaves those of the weights that are needed in dweights.
Tensor run_direction_back(const Stack& stack, const Tensor& x, bool reverse,
                          const std::vector<Step>& steps, const Tensor& dy, CellState& dstate,
                          at::TensorList weights, bool wants_dx,
                          std::vector<bool>::const_iterator needs, std::optional<int64_t> samples,
                          Tensor* dweights) {
  const Schedule schedule = stack.schedule();
  std::vector<Tensor> dgates(stack.steps), dh(stack.steps);
  for (int64_t s = stack.steps - 1; s >= 0; --s) {
    const int64_t t = schedule.step(s, reverse);
    const int64_t rows = schedule.rows_at(t);
    dh[t] = dstate.h.narrow(0, 0, rows) + dy.narrow(0, schedule.offset(t), rows);
    const Tensor dc = dstate.c.defined() ? dstate.c.narrow(0, 0, rows) : dstate.c;
    const StepGradient gradient = step_back(stack, steps[t], dh[t], dc, weights);
    dgates[t] = gradient.dgates;
    dstate.h = update(stack, dstate.h, gradient.dgates.mm(weights[1]), rows);
    if (dc.defined()) dstate.c = update(stack, dstate.c, gradient.dc, rows);
  }
  const Tensor of_gates = at::cat(dgates);
  if (needs[0]) dweights[0] = differentiate_weight(of_gates, x, samples);
  if (needs[1]) {
    dweights[1] = differentiate_weight(
        of_gates, collect(steps, [](const Step& step) { return step.before.h; }), samples);
  }
  if (stack.has_biases && (needs[2] || needs[3])) {
    dweights[2] = differentiate_bias(of_gates, samples);
    dweights[3] = dweights[2].clone();
  }
  if (stack.projected && needs[stack.weights_per_strand() - 1]) {
    dweights[stack.weights_per_strand() - 1] = differentiate_weight(
        at::cat(dh), collect(steps, [](const Step& step) { return step.unprojected; }), samples);
  }
  return wants_dx ? of_gates.mm(weights[0]) : Tensor();
}

// The noise of a run, drawn as draw_dropout draws it, but out of place: in place, vmap would refuse
// to draw for each sample.
std::vector<Tensor> draw_noise(const Stack& stack, const at::TensorOptions& options) {
  std::vector<Tensor> noise;
  for (int64_t layer = 0; stack.drops_after(layer); ++layer) {
    const Tensor kept = at::empty({stack.rows, stack.layer_width()}, options);
    noise.push_back(stack.dropout == 1
                        ? at::zeros_like(kept)
                        : at::bernoulli(kept, 1 - stack.dropout).div_(1 - stack.dropout));
  }
  return noise;
}

}  // namespace

std::vector<Tensor> run_reference(const Stack& stack, const Inputs& inputs,
                                  const std::vector<Tensor>& noise) {
  std::vector<CellState> states;
  const std::vector<Layer> layers = run_layers(stack, inputs, noise, states);
  std::vector<Tensor> h_n, c_n;
  for (const CellState& state : states) {
    h_n.push_back(state.h);
    c_n.push_back(state.c);
  }
  const bool lstm = stack.cell == Cell::lstm;
  return {as_sequence(stack, layers.back().y, stack.layer_width()),
          at::stack(h_n).reshape(stack.state_sizes(stack.width)),
          lstm ? at::stack(c_n).reshape(stack.state_sizes(stack.hidden))
               : at::zeros({0}, inputs.x.options())};
}

std::vector<Tensor> run_reference_backward(const Stack& stack, const Inputs& inputs,
                                           const std::vector<Tensor>& noise,
                                           const OutputGradients& gradients,
                                           const std::vector<bool>& needs,
                                           std::optional<int64_t> samples) {
  const bool lstm = stack.cell == Cell::lstm;
  const at::TensorOptions options = inputs.x.options();
  std::vector<CellState> states;
  const std::vector<Layer> layers = run_layers(stack, inputs, noise, states);
  const Tensor dh = state_or_zeros(stack, gradients.h_n, stack.width, options);
  const Tensor dc = lstm ? state_or_zeros(stack, gradients.c_n, stack.hidden, options) : Tensor();
  Tensor dy = gradients.y.has_value() ? as_rows(stack, *gradients.y, stack.layer_width())
                                      : at::zeros({stack.rows, stack.layer_width()}, options);
  std::vector<Tensor> dh0(stack.strands()), dc0(stack.strands()), dweights(inputs.weights.size());
  for (int64_t l = stack.layers - 1; l >= 0; --l) {
    const bool wants_dx = l > 0 || needs[0];
    Tensor dx;
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t strand = l * stack.directions + d;
      CellState dstate = {dh[strand], lstm ? dc[strand] : Tensor()};
      const Tensor part =
          run_direction_back(stack, layers[l].x, d == 1, layers[l].steps[d],
                             dy.narrow(1, d * stack.width, stack.width), dstate,
                             weights_of(stack, inputs.weights, strand), wants_dx,
                             needs.begin() + 3 + strand * stack.weights_per_strand(), samples,
                             dweights.data() + strand * stack.weights_per_strand());
      dx = d == 0 || !wants_dx ? part : dx + part;
      dh0[strand] = dstate.h;
      dc0[strand] = dstate.c;
    }
    dy = l > 0 && stack.drops_after(l - 1) ? dx * noise[l - 1] : dx;
  }
  std::vector<Tensor> wanted;
  if (needs[0]) wanted.push_back(as_sequence(stack, dy, stack.input));
  if (needs[1] && inputs.h0.has_value()) {
    wanted.push_back(at::stack(dh0).reshape(stack.state_sizes(stack.width)));
  }
  if (needs[2] && inputs.c0.has_value()) {
    wanted.push_back(at::stack(dc0).reshape(stack.state_sizes(stack.hidden)));
  }
  for (size_t i = 0; i < dweights.size(); ++i) {
    if (needs[3 + i]) wanted.push_back(dweights[i]);
  }
  return wanted;
}

std::tuple<Tensor, Tensor, Tensor> recurrent_reference(const Options& options,
                                                       const Inputs& inputs) {
  const Stack stack = check_arguments(options, inputs);
  const std::vector<Tensor> outputs =
      run_reference(stack, inputs, draw_noise(stack, inputs.x.options()));
  return {outputs[0].contiguous(), outputs[1], outputs[2]};
}

std::vector<Tensor> reserved_noise(const Stack& stack, const Tensor& reserve) {
  return reserve_views(stack, reserve).noise;
}

}  // namespace fastrnn
