#include "reference.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "buffers.h"
#include "dropout.h"
#include "reference_strand.h"
#include "reserve.h"
#include "signatures.h"
#include "vmap.h"

namespace fastrnn {
namespace {

using at::Tensor;
using plain::CellState;
using plain::plus;
using plain::Strand;
using Tensors = std::vector<Tensor>;

// As as_rows took x, y or a gradient of one, and back.
Tensor as_sequence(const Stack& stack, const Tensor& rows, int64_t width) {
  if (stack.packed) return rows;
  if (!stack.batched) return rows.reshape({stack.steps, width});
  const Tensor sequence = rows.reshape({stack.steps, stack.batch, width});
  return stack.batch_first ? sequence.transpose(0, 1) : sequence;
}

// What a pass over the layers leaves: of each strand, and y, or what it brought to x, (rows, ...).
template <typename OfStrand>
struct Passed {
  std::vector<OfStrand> strands;
  Tensor rows;
};

// A stack's forward pass.
class Forward {
 public:
  Forward(const Stack& stack, const Inputs& inputs, const Kept& kept = {})
      : stack_(stack),
        weights_(inputs.weights),
        masks_(inputs.masks),
        options_(inputs.x.options()) {
    const std::vector<CellState> initial = states(inputs.h0, inputs.c0);
    std::optional<ReserveParts<Tensor>> reserved;
    if (kept.y.defined()) reserved.emplace(reserve_views(stack, kept.reserve));
    outputs = rise<plain::Outputs>(
        as_rows(stack, inputs.x, stack.input), [&](int64_t s, const Tensor& x) {
          return reserved ? plain::recall(strand(s), x, initial[s], kept_by(*reserved, kept.y, s))
                          : plain::run(strand(s), x, initial[s]);
        });
  }

  Passed<plain::Outputs> outputs;

 protected:
  Strand strand(int64_t s) const {
    return {stack_, s % stack_.directions == 1, {stack_, weights_, s}};
  }

  // What the run kept of strand s.
  plain::Kept kept_by(const ReserveParts<Tensor>& reserved, const Tensor& y, int64_t s) const {
    const int64_t layer = s / stack_.directions, first = s % stack_.directions * stack_.width;
    const Tensor rows = layer + 1 < stack_.layers ? reserved.outputs[layer]
                                                  : as_rows(stack_, y, stack_.layer_width());
    const auto& [gates, c_all, unprojected] = reserved.parts[s];
    return {rows.narrow(1, first, stack_.width), gates, c_all, unprojected};
  }

  // By strand; zeros where none are given.
  std::vector<CellState> states(const OptionalTensor& h, const OptionalTensor& c) const {
    const bool lstm = stack_.cell == Cell::lstm;
    const Tensor all_h = state_or_zeros(stack_, h, stack_.width, options_);
    const Tensor all_c = lstm ? state_or_zeros(stack_, c, stack_.hidden, options_) : Tensor();
    std::vector<CellState> states;
    for (int64_t s = 0; s < stack_.strands(); ++s) {
      states.push_back({all_h[s], lstm ? all_c[s] : Tensor()});
    }
    return states;
  }

  // From x, or its tangent, to y's. run(s, x) is strand s's.
  template <typename OfStrand, typename Run>
  Passed<OfStrand> rise(Tensor x, const Run& run) const {
    Passed<OfStrand> passed;
    for (int64_t l = 0; l < stack_.layers; ++l) {
      if (l > 0) x = drop(l - 1, x);
      Tensors h;
      for (int64_t d = 0; d < stack_.directions; ++d) {
        passed.strands.push_back(run(l * stack_.directions + d, x));
        h.push_back(passed.strands.back().h.all());
      }
      x = h.size() == 1 ? h[0] : at::cat(h, 1);
    }
    passed.rows = x;
    return passed;
  }

  // A layer's output as the next meets it, or what the next brought to it as it meets the layer.
  Tensor drop(int64_t layer, const Tensor& rows) const {
    return stack_.drops_after(layer)
               ? rows * mask_of(stack_, *masks_, layer) * dropout_scale(stack_, rows.scalar_type())
               : rows;
  }

  const Stack& stack_;
  const at::TensorList weights_;
  const OptionalTensor& masks_;
  const at::TensorOptions options_;
};

// And the passes of tangents and gradients that follow it.
class Derivatives : public Forward {
 public:
  Derivatives(const Stack& stack, const Inputs& inputs, const Kept& kept = {})
      : Forward(stack, inputs, kept) {
    for (int64_t s = 0; s < stack.strands(); ++s) {
      slopes_.push_back(plain::differentiate(strand(s), outputs.strands[s]));
    }
  }

  // Of tangents of x, h0, c0 and the weights, undefined where there are none.
  Passed<plain::Tangents> push(at::TensorList tangents, std::optional<int64_t> samples) const {
    const std::vector<CellState> initial = states(optional(tangents[kH0]), optional(tangents[kC0]));
    const Tensor& dx = tangents[kX];
    return rise<plain::Tangents>(
        dx.defined() ? as_rows(stack_, dx, stack_.input) : dx, [&](int64_t s, const Tensor& x) {
          return plain::push(strand(s), outputs.strands[s], slopes_[s], x, initial[s],
                             weight_tangents(tangents, s), samples);
        });
  }

  Passed<plain::Gradients> pull(const OutputGradients& gradients, bool wants_x) const {
    return descend(output_rows(gradients.y), states(gradients.h_n, gradients.c_n), wants_x,
                   [](int64_t) { return plain::Sources(); });
  }

  // Of the sum of gradients * tangents that these passes carried, of which is left what weights'
  // gradients are made of.
  Passed<plain::Gradients> pull_back(Passed<plain::Tangents>& pushed,
                                     Passed<plain::Gradients>& pulled,
                                     const SecondTangents& tangents, bool wants_x) const {
    const auto& [y, h_n, c_n] = tangents.of_gradients;
    return descend(output_rows(y), states(h_n, c_n), wants_x, [&](int64_t s) {
      plain::Tangents& up = pushed.strands[s];
      plain::Gradients& down = pulled.strands[s];
      const plain::Sources sources =
          plain::curve(strand(s), outputs.strands[s], up, down,
                       weight_tangents(tangents.of_inputs, s), tangents.samples);
      up.gates = up.h = up.c = down.c = down.unprojected = {};
      if (!stack_.projected) down.h = {};
      return sources;
    });
  }

 private:
  Tensor output_rows(const OptionalTensor& y) const {
    return y.has_value() ? as_rows(stack_, *y, stack_.layer_width()) : Tensor();
  }
  plain::Weights weight_tangents(at::TensorList tangents, int64_t s) const {
    return {stack_, tangents.slice(kFirstWeight), s};
  }

  // From the gradients of y (undefined: zeros) and the final states to that of x, if it is wanted.
  // sources_of(s): what strand s meets beside.
  template <typename SourcesOf>
  Passed<plain::Gradients> descend(Tensor dy, const std::vector<CellState>& last, bool wants_x,
                                   const SourcesOf& sources_of) const {
    std::vector<plain::Gradients> strands(stack_.strands());
    for (int64_t l = stack_.layers - 1; l >= 0; --l) {
      Tensor dx;
      for (int64_t d = 0; d < stack_.directions; ++d) {
        const int64_t s = l * stack_.directions + d;
        plain::Sources sources = sources_of(s);
        if (dy.defined()) {
          sources.h = plus(sources.h, dy.narrow(1, d * stack_.width, stack_.width));
        }
        strands[s] = plain::pull(strand(s), outputs.strands[s], slopes_[s], sources, last[s],
                                 wants_x || l > 0);
        dx = plus(dx, strands[s].x);
      }
      dy = l > 0 ? drop(l - 1, dx) : dx;
    }
    return {std::move(strands), dy};
  }

  std::vector<plain::Slopes> slopes_;
};

// A state, or its gradient, that each strand has, as the ops give it.
template <typename OfStrand>
CellState join_states(const Stack& stack, const std::vector<OfStrand>& strands,
                      CellState OfStrand::* state) {
  Tensors h, c;
  for (const OfStrand& strand : strands) {
    h.push_back((strand.*state).h);
    c.push_back((strand.*state).c);
  }
  return {
      at::stack(h).reshape(stack.state_sizes(stack.width)),
      stack.cell == Cell::lstm ? at::stack(c).reshape(stack.state_sizes(stack.hidden)) : Tensor()};
}

Tensors output_tangents(const Stack& stack, const Passed<plain::Tangents>& pushed) {
  const CellState last = join_states(stack, pushed.strands, &plain::Tangents::last);
  return {as_sequence(stack, pushed.rows, stack.layer_width()), last.h, last.c};
}

// Adds the gradients of the weights, those that are needed, of what `met` them: the strands'
// Outputs, or their Tangents. needs and gradients: of x, h0, c0 and the weights.
template <typename Met>
void add_weight_gradients(const Stack& stack, const std::vector<plain::Gradients>& strands,
                          const std::vector<Met>& met, const std::vector<bool>& needs,
                          std::optional<int64_t> samples, Tensors& gradients) {
  const int64_t count = stack.weights_per_strand();
  for (int64_t s = 0; s < stack.strands(); ++s) {
    const auto add = [&](int64_t place, const plain::Rows& gradient, const plain::Rows& rows) {
      const int64_t i = kFirstWeight + s * count + place;
      if (!needs[i] || !rows.defined()) return;
      gradients[i] =
          plus(gradients[i], plain::weight_gradient(gradient.all(), rows.all(), samples));
    };
    add(0, strands[s].gates, plain::Rows(stack, met[s].x));
    add(1, strands[s].gates, met[s].before.h);
    if (stack.projected) add(count - 1, strands[s].h, met[s].unprojected);
  }
}

// Gradients of x, h0, c0 and the weights, of which those may be undefined that are not needed.
Tensors input_gradients(const Stack& stack, const Passed<plain::Gradients>& pulled,
                        const Passed<plain::Outputs>& outputs, const std::vector<bool>& needs,
                        std::optional<int64_t> samples) {
  const CellState first = join_states(stack, pulled.strands, &plain::Gradients::first);
  Tensors gradients = {needs[0] ? as_sequence(stack, pulled.rows, stack.input) : Tensor(), first.h,
                       first.c};
  gradients.resize(needs.size());
  add_weight_gradients(stack, pulled.strands, outputs.strands, needs, samples, gradients);
  for (int64_t s = 0; stack.has_biases && s < stack.strands(); ++s) {
    const int64_t b_ih = kFirstWeight + s * stack.weights_per_strand() + 2, b_hh = b_ih + 1;
    if (!needs[b_ih] && !needs[b_hh]) continue;
    gradients[b_ih] = plain::bias_gradient(pulled.strands[s].gates.all(), samples);
    gradients[b_hh] = gradients[b_ih].clone();
  }
  return gradients;
}

}  // namespace

std::vector<Tensor> run_reference(const Stack& stack, const Inputs& inputs) {
  const Passed<plain::Outputs> outputs = Forward(stack, inputs).outputs;
  const CellState last = join_states(stack, outputs.strands, &plain::Outputs::last);
  return {as_sequence(stack, outputs.rows, stack.layer_width()), last.h,
          last.c.defined() ? last.c : at::zeros({0}, inputs.x.options())};
}

std::vector<Tensor> run_reference_backward(const Stack& stack, const Inputs& inputs,
                                           const OutputGradients& gradients,
                                           const std::vector<bool>& needs,
                                           std::optional<int64_t> samples) {
  check_needs(needs, inputs.weights);
  const Derivatives passes(stack, inputs);
  const Tensors found =
      input_gradients(stack, passes.pull(gradients, needs[0]), passes.outputs, needs, samples);
  const Tensors given = list(inputs);
  Tensors wanted;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i] && given[i].defined()) wanted.push_back(found[i]);
  }
  return wanted;
}

std::vector<Tensor> push_reference(const Stack& stack, const Inputs& inputs, const Kept& kept,
                                   at::TensorList tangents) {
  const Derivatives passes(stack, inputs, kept);
  return output_tangents(stack, passes.push(tangents, /*samples=*/std::nullopt));
}

std::vector<Tensor> differentiate_reference_backward(const Stack& stack, const Inputs& inputs,
                                                     const Kept& kept,
                                                     const OutputGradients& gradients,
                                                     const SecondTangents& tangents,
                                                     const std::vector<bool>& needs,
                                                     std::optional<int64_t> samples) {
  const Derivatives passes(stack, inputs, kept);
  Passed<plain::Tangents> pushed = passes.push(tangents.of_inputs, tangents.samples);
  Tensors results = output_tangents(stack, pushed);
  const std::vector<bool> input_needs(needs.begin() + results.size(), needs.end());
  if (std::find(input_needs.begin(), input_needs.end(), true) != input_needs.end()) {
    Passed<plain::Gradients> first = passes.pull(gradients, /*wants_x=*/false);
    const Passed<plain::Gradients> second =
        passes.pull_back(pushed, first, tangents, input_needs[0]);
    Tensors found = input_gradients(stack, second, passes.outputs, input_needs, samples);
    add_weight_gradients(stack, first.strands, pushed.strands, input_needs, samples, found);
    results.insert(results.end(), found.begin(), found.end());
  }
  results.resize(needs.size());
  for (size_t i = 0; i < needs.size(); ++i) {
    if (!needs[i]) results[i].reset();
  }
  return results;
}

}  // namespace fastrnn
