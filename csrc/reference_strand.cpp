#include "reference_strand.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "buffers.h"

namespace fastrnn::plain {
namespace {

using at::Tensor;
using Steps = std::vector<Tensor>;  // a tensor for each step

bool is_lstm(const Strand& strand) { return strand.stack.cell == Cell::lstm; }

// Calls step(t, state) for every step, in order or backward, with the rows of the state that it
// runs on, and takes from it the rows after it: those that have ended, or not begun, keep theirs.
// Returns the last state.
template <typename Step>
CellState run_steps(const Strand& strand, bool backward, CellState state, const Step& step) {
  const Stack& stack = strand.stack;
  const Schedule schedule = stack.schedule();
  for (int64_t s = 0; s < stack.steps; ++s) {
    const int64_t t = schedule.step(backward ? stack.steps - 1 - s : s, strand.reverse);
    const int64_t rows = schedule.rows_at(t);
    if (rows == stack.batch) {
      state = step(t, state);
      continue;
    }
    const auto first = [&](const Tensor& all) {
      return all.defined() ? all.narrow(0, 0, rows) : all;
    };
    const auto replaced = [&](const Tensor& all, const Tensor& after) {
      return all.defined() ? at::cat({after, all.narrow(0, rows, stack.batch - rows)}) : all;
    };
    const CellState after = step(t, CellState{first(state.h), first(state.c)});
    state = {replaced(state.h, after.h), replaced(state.c, after.c)};
  }
  return state;
}

Tensor transposed(const Tensor& weight) {
  return weight.defined() ? weight.transpose(-2, -1) : weight;
}

// rows . weight, where both are there; of weights that are each sample's, by sample.
Tensor multiply(const Tensor& rows, const Tensor& weight, std::optional<int64_t> samples) {
  if (!rows.defined() || !weight.defined()) return {};
  if (!samples.has_value()) return rows.mm(weight);
  // For flatten autograd's own vmap, which is not torch.func's, has no rule.
  return by_sample(rows, *samples)
      .bmm(weight)
      .transpose(0, 1)
      .reshape_symint({rows.sym_size(0), weight.sym_size(-1)});
}

// A bias's tangent in every row.
Tensor repeat(const Stack& stack, const Tensor& bias, std::optional<int64_t> samples) {
  if (!bias.defined()) return bias;
  if (!samples.has_value()) return bias.unsqueeze(0).expand({stack.rows, -1});
  return bias.repeat({stack.rows / *samples, 1});
}

// start, which may be undefined, + a . b, or a * b.
Tensor add_product(const Tensor& start, const Tensor& a, const Tensor& b) {
  return start.defined() ? at::addmm(start, a, b) : a.mm(b);
}
Tensor add_elements(const Tensor& start, const Tensor& a, const Tensor& b) {
  return start.defined() ? at::addcmul(start, a, b) : a * b;
}

// From the gradient of an Elman cell's h to that of its pre-activation, and for tangents the other
// way.
Tensor through_activation(const Strand& strand, const Tensor& rows, const Tensor& h) {
  return strand.stack.cell == Cell::rnn_tanh ? at::tanh_backward(rows, h)
                                             : at::threshold_backward(rows, h, 0);
}

}  // namespace

const Tensor& Rows::all() const {
  if (!all_.defined() && defined()) {
    all_ = at::cat(steps_);
    steps_.clear();  // not to hold their memory twice
  }
  return all_;
}

Tensor Rows::at(int64_t t) const {
  if (!defined()) return {};
  if (steps_.empty()) {
    const Schedule schedule = stack_->schedule();
    std::vector<int64_t> sizes(stack_->steps);
    for (int64_t s = 0; s < stack_->steps; ++s) sizes[s] = schedule.rows_at(s);
    steps_ = all_.split_with_sizes(sizes);
  }
  return steps_[t];
}

Tensor plus(const Tensor& a, const Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a + b;
}

Tensor weight_gradient(const Tensor& gradient, const Tensor& rows, std::optional<int64_t> samples) {
  // (mm and not matmul, which autograd's own vmap does sample by sample.)
  if (!samples.has_value()) return gradient.t().mm(rows);
  return by_sample(gradient, *samples).transpose(1, 2).bmm(by_sample(rows, *samples));
}
Tensor bias_gradient(const Tensor& gradient, std::optional<int64_t> samples) {
  return samples.has_value() ? by_sample(gradient, *samples).sum(1) : gradient.sum(0);
}

Weights::Weights(const Stack& stack, at::TensorList all, int64_t strand) {
  const int64_t count = stack.weights_per_strand();
  const at::TensorList own = all.slice(strand * count, count);
  w_ih = own[0];
  w_hh = own[1];
  if (stack.has_biases) b_ih = own[2], b_hh = own[3];
  if (stack.projected) w_hr = own.back();
}

Outputs run(const Strand& strand, const Tensor& x, const CellState& initial) {
  const Stack& stack = strand.stack;
  const Weights& weights = strand.weights;
  const Tensor w_hh = transposed(weights.w_hh), w_hr = transposed(weights.w_hr);
  const OptionalTensor bias = stack.has_biases ? OptionalTensor(weights.b_ih) : std::nullopt;
  const Rows of_x(stack, plus(at::linear(x, weights.w_ih, bias), weights.b_hh));
  Steps h_before(stack.steps), c_before(stack.steps), h(stack.steps), tanh_c(stack.steps),
      unprojected(stack.steps);
  std::array<Steps, kGates> gate;
  gate.fill(Steps(stack.steps));
  const CellState last =
      run_steps(strand, /*backward=*/false, initial, [&](int64_t t, CellState state) {
        h_before[t] = state.h;
        c_before[t] = state.c;
        const Tensor gates = at::addmm(of_x.at(t), state.h, w_hh);
        if (is_lstm(strand)) {
          const Steps parts = gates.chunk(kGates, 1);
          for (Gate g : {kInput, kForget, kOutput}) gate[g][t] = parts[g].sigmoid();
          gate[kCell][t] = parts[kCell].tanh();
          state.c = at::addcmul(gate[kForget][t] * state.c, gate[kInput][t], gate[kCell][t]);
          tanh_c[t] = state.c.tanh();
          unprojected[t] = gate[kOutput][t] * tanh_c[t];
          state.h = stack.projected ? unprojected[t].mm(w_hr) : unprojected[t];
        } else {
          state.h = stack.cell == Cell::rnn_tanh ? gates.tanh() : gates.relu();
        }
        h[t] = state.h;
        return state;
      });
  return {x,
          {Rows(stack, h_before), Rows(stack, c_before)},
          Rows(stack, h),
          {Rows(stack, gate[0]), Rows(stack, gate[1]), Rows(stack, gate[2]), Rows(stack, gate[3])},
          Rows(stack, tanh_c),
          Rows(stack, unprojected),
          last};
}

Outputs recall(const Strand& strand, const Tensor& x, const CellState& initial, const Kept& kept) {
  const Stack& stack = strand.stack;
  const Rows h(stack, kept.h), c(stack, kept.c);
  Steps h_before(stack.steps), c_before(stack.steps);
  const CellState last =
      run_steps(strand, /*backward=*/false, initial, [&](int64_t t, const CellState& state) {
        h_before[t] = state.h;
        c_before[t] = state.c;
        return CellState{h.at(t), c.at(t)};
      });
  const CellStates before{Rows(stack, h_before), Rows(stack, c_before)};
  if (!is_lstm(strand)) return {x, before, h, {}, {}, {}, last};
  const Steps gates = kept.gates.view({stack.rows, kGates, stack.hidden}).unbind(1);
  const auto gate = [&](Gate g) { return Rows(stack, gates[g]); };
  return {x,
          before,
          h,
          {gate(kInput), gate(kForget), gate(kCell), gate(kOutput)},
          Rows(stack, kept.c.tanh()),
          stack.projected ? Rows(stack, kept.unprojected) : h,
          last};
}

Slopes differentiate(const Strand& strand, const Outputs& outputs) {
  if (!is_lstm(strand)) return {};
  const Tensor &i = outputs.gate[kInput].all(), &f = outputs.gate[kForget].all(),
               &g = outputs.gate[kCell].all(), &o = outputs.gate[kOutput].all(),
               &tanh_c = outputs.tanh_c.all();
  const Tensor gates =
      at::cat({at::sigmoid_backward(g, i), at::sigmoid_backward(outputs.before.c.all(), f),
               at::tanh_backward(i, g), at::sigmoid_backward(tanh_c, o)},
              1);
  return {Rows(strand.stack, gates), Rows(strand.stack, at::tanh_backward(o, tanh_c))};
}

Tangents push(const Strand& strand, const Outputs& outputs, const Slopes& slopes, const Tensor& x,
              const CellState& initial, const Weights& weights, std::optional<int64_t> samples) {
  const Stack& stack = strand.stack;
  const Tensor w_hh = transposed(strand.weights.w_hh), w_hr = transposed(strand.weights.w_hr);
  Tensor direct = multiply(x, transposed(strand.weights.w_ih), std::nullopt);
  direct = plus(direct, multiply(outputs.x, transposed(weights.w_ih), samples));
  if (weights.w_hh.defined()) {
    direct = plus(direct, multiply(outputs.before.h.all(), transposed(weights.w_hh), samples));
  }
  for (const Tensor& bias : {weights.b_ih, weights.b_hh}) {
    direct = plus(direct, repeat(stack, bias, samples));
  }
  const Rows into_gates(stack, direct);
  Rows into_h;
  if (weights.w_hr.defined()) {
    into_h = {stack, multiply(outputs.unprojected.all(), transposed(weights.w_hr), samples)};
  }
  Steps gates(stack.steps), h_before(stack.steps), c_before(stack.steps), h(stack.steps),
      c(stack.steps), unprojected(stack.steps);
  const CellState last =
      run_steps(strand, /*backward=*/false, initial, [&](int64_t t, CellState state) {
        h_before[t] = state.h;
        c_before[t] = state.c;
        gates[t] = add_product(into_gates.at(t), state.h, w_hh);
        if (is_lstm(strand)) {
          const Steps parts = (gates[t] * slopes.gates.at(t)).chunk(kGates, 1);
          c[t] = at::addcmul(parts[kInput] + parts[kForget] + parts[kCell],
                             outputs.gate[kForget].at(t), state.c);
          unprojected[t] = at::addcmul(parts[kOutput], slopes.c.at(t), c[t]);
          h[t] = stack.projected ? add_product(into_h.at(t), unprojected[t], w_hr) : unprojected[t];
        } else {
          h[t] = through_activation(strand, gates[t], outputs.h.at(t));
        }
        return CellState{h[t], c[t]};
      });
  return {x,
          Rows(stack, gates),
          {Rows(stack, h_before), Rows(stack, c_before)},
          Rows(stack, h),
          Rows(stack, c),
          Rows(stack, unprojected),
          last};
}

Gradients pull(const Strand& strand, const Outputs& outputs, const Slopes& slopes,
               const Sources& sources, const CellState& last, bool wants_x) {
  const Stack& stack = strand.stack;
  const Weights& weights = strand.weights;
  const Rows into_gates(stack, sources.gates), into_h(stack, sources.h), into_c(stack, sources.c),
      into_unprojected(stack, sources.unprojected);
  const CellStates into_before{{stack, sources.before.h}, {stack, sources.before.c}};
  Steps gates(stack.steps), h(stack.steps), c(stack.steps), unprojected(stack.steps);
  const CellState first =
      run_steps(strand, /*backward=*/true, last, [&](int64_t t, CellState state) {
        h[t] = plus(state.h, into_h.at(t));
        if (is_lstm(strand)) {
          unprojected[t] =
              plus(stack.projected ? h[t].mm(weights.w_hr) : h[t], into_unprojected.at(t));
          c[t] = at::addcmul(plus(state.c, into_c.at(t)), slopes.c.at(t), unprojected[t]);
          const Tensor results = at::cat({c[t], c[t], c[t], unprojected[t]}, 1);
          gates[t] = add_elements(into_gates.at(t), slopes.gates.at(t), results);
          state.c = add_elements(into_before.c.at(t), outputs.gate[kForget].at(t), c[t]);
        } else {
          gates[t] = through_activation(strand, h[t], outputs.h.at(t));
        }
        state.h = add_product(into_before.h.at(t), gates[t], weights.w_hh);
        return state;
      });
  const Rows all_gates(stack, std::move(gates));
  Tensor x;
  if (wants_x) x = plus(all_gates.all().mm(weights.w_ih), sources.x);
  return {x, all_gates, Rows(stack, h), Rows(stack, c), Rows(stack, unprojected), first};
}

Sources curve(const Strand& strand, const Outputs& outputs, const Tangents& tangents,
              const Gradients& gradients, const Weights& weight_tangents,
              std::optional<int64_t> samples) {
  Sources sources;
  const Tensor& dgates = gradients.gates.all();
  sources.x = multiply(dgates, weight_tangents.w_ih, samples);
  sources.before.h = multiply(dgates, weight_tangents.w_hh, samples);
  // Below, a statement for each product, so that what is between is let go of. The second
  // derivative of a sigmoid s is its first times 1 - 2 * s, of a tanh its first times -2 * tanh.
  if (strand.stack.cell == Cell::rnn_tanh) {
    sources.h = gradients.h.all() * tangents.gates.all();
    sources.h = sources.h * outputs.h.all();
    sources.h = sources.h * -2;
  }
  if (!is_lstm(strand)) return sources;
  const Tensor &i = outputs.gate[kInput].all(), &f = outputs.gate[kForget].all(),
               &g = outputs.gate[kCell].all(), &o = outputs.gate[kOutput].all(),
               &c_before = outputs.before.c.all(), &tanh_c = outputs.tanh_c.all();
  const Tensor &dc = gradients.c.all(), &dm = gradients.unprojected.all();
  // Tangents of the gates and of tanh(c).
  const Steps of_gates = tangents.gates.all().chunk(kGates, 1);
  const Tensor ti = at::sigmoid_backward(of_gates[kInput], i),
               tf = at::sigmoid_backward(of_gates[kForget], f),
               tg = at::tanh_backward(of_gates[kCell], g),
               to = at::sigmoid_backward(of_gates[kOutput], o),
               tc = at::tanh_backward(tangents.c.all(), tanh_c);
  // The tangent of c is tf * c_before + f * its tangent + ti * g + i * tg, that of the unprojected
  // output to * tanh_c + o * tc.
  const auto twice = [](const Tensor& s) { return at::rsub(s, 1, 2); };
  Steps into_gates(kGates);
  into_gates[kInput] = dc * at::addcmul(at::sigmoid_backward(tg, i), ti * g, twice(i));
  into_gates[kForget] =
      dc * at::addcmul(at::sigmoid_backward(tangents.before.c.all(), f), tf * c_before, twice(f));
  into_gates[kCell] = dc * at::addcmul(at::tanh_backward(ti, g), tg * i, g, -2);
  into_gates[kOutput] = dm * at::addcmul(at::sigmoid_backward(tc, o), to * tanh_c, twice(o));
  sources.gates = at::cat(into_gates, 1);
  sources.c = dm * at::addcmul(at::tanh_backward(to, tanh_c), tc * o, tanh_c, -2);
  sources.before.c = dc * tf;
  if (strand.stack.projected) {
    sources.unprojected = multiply(gradients.h.all(), weight_tangents.w_hr, samples);
  }
  return sources;
}

}  // namespace fastrnn::plain
