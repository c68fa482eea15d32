// Derivatives of the ops recurrent_forward and recurrent_backward, as torch's own operations have
// them: at any level of torch.func's transforms, and in forward-mode AD. Values and gradients stay
// fused; tangents, and gradients of gradients, come from the reference.
#include <ATen/functorch/TensorWrapper.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/clone.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <mutex>
#include <string>

#include "reference.h"
#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// How torch holds nodes: by std::shared_ptr in its version 2.10, by its own pointers in 2.13.
using NodePointer = decltype(std::declval<Node&>().getptr());

template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// The sizes of a packed sequence's steps: data, on which no transform acts, though it may have
// wrapped them.
OptionalTensor unwrapped(const OptionalTensor& sizes) {
  if (!sizes.has_value()) return sizes;
  Tensor tensor = *sizes;
  while (const auto* const wrapper = at::functorch::maybeGetTensorWrapper(tensor)) {
    tensor = wrapper->value();
  }
  return tensor;
}

// A node of tensors that are differentiated, in order, and others that the gradients need.
class Recorded : public Node {
 public:
  // The ops' arguments beside.
  std::string mode;
  int64_t num_layers;
  bool has_biases, bidirectional, batch_first;
  double dropout;
  OptionalTensor batch_sizes;

  void save(const Options& options, const OptionalTensor& sizes, const variable_list& inputs,
            const variable_list& others) {
    mode = options.mode;
    num_layers = options.num_layers;
    has_biases = options.has_biases;
    bidirectional = options.bidirectional;
    batch_first = options.batch_first;
    dropout = options.dropout;
    batch_sizes = sizes;
    set_next_edges(torch::autograd::collect_next_edges(inputs));
    for (const Tensor& input : inputs) saved_.emplace_back(input, /*is_output=*/false);
    for (const Tensor& other : others) saved_.emplace_back(other, /*is_output=*/false);
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) variable.reset_data();
  }

 protected:
  Options options() const {
    return {mode, num_layers, has_biases, bidirectional, batch_first, dropout};
  }
  // Those that were saved, the inputs first.
  variable_list unpack() {
    variable_list tensors;
    for (const SavedVariable& variable : saved_) tensors.push_back(variable.unpack(getptr()));
    return tensors;
  }

 private:
  std::vector<SavedVariable> saved_;
};

// Places in the lists that are saved: of forward's, and of backward's after its three gradients.
enum { kX, kH0, kC0, kWeights };

class ForwardNode : public Recorded {
 public:
  std::string name() const override { return "fastrnn::RecurrentBackward"; }

  // Of y, h_n and c_n, to those of x, h0, c0 and the weights.
  variable_list apply(variable_list&& gradients) override {
    static const auto op = find_op<BackwardSignature>("fastrnn::recurrent_backward");
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = unpack();
    const size_t count = num_outputs();
    const at::TensorList inputs = at::TensorList(saved).slice(0, count);
    const Tensor &y = saved[count], &reserve = saved[count + 1];
    variable_list results(count);
    if (!gradients[0].defined() && !gradients[1].defined() && !gradients[2].defined()) {
      return results;
    }
    c10::List<bool> needs;
    for (size_t i = 0; i < count; ++i) {
      needs.push_back(inputs[i].defined() && task_should_compute_output(i));
    }
    const variable_list wanted = op.call(
        mode, optional(gradients[0]), optional(gradients[1]), optional(gradients[2]), inputs[kX],
        batch_sizes, optional(inputs[kH0]), optional(inputs[kC0]), inputs.slice(kWeights), y,
        reserve, num_layers, has_biases, bidirectional, batch_first, dropout, needs, std::nullopt);
    size_t next = 0;
    for (size_t i = 0; i < count; ++i) {
      if (needs[i]) results[i] = wanted[next++];
    }
    return results;
  }
};

std::optional<int64_t> as_number(const std::optional<c10::SymInt>& value) {
  if (!value.has_value()) return std::nullopt;
  return value->guard_int(__FILE__, __LINE__);
}

// A call of recurrent_backward, whose arguments are dy, dh_n, dc_n, x, h0, c0 and the weights, as
// the reference takes it.
struct PlainBackward {
  OptionalTensor dy, dh_n, dc_n, sizes, h0, c0;
  Inputs inputs;
  Stack stack;
  variable_list noise;
  OutputGradients gradients{dy, dh_n, dc_n};

  PlainBackward(const Options& options, const OptionalTensor& batch_sizes, at::TensorList arguments,
                const Tensor& reserve)
      : dy(optional(arguments[0])),
        dh_n(optional(arguments[1])),
        dc_n(optional(arguments[2])),
        sizes(unwrapped(batch_sizes)),
        h0(optional(arguments[3 + kH0])),
        c0(optional(arguments[3 + kC0])),
        inputs{arguments[3 + kX], sizes, h0, c0, arguments.slice(3 + kWeights)},
        stack(check_arguments(options, inputs)),
        noise(reserved_noise(stack, reserve)) {}
  PlainBackward(const PlainBackward&) = delete;
};

class BackwardNode : public Recorded {
 public:
  std::vector<bool> needs;
  std::optional<c10::SymInt> samples;

  std::string name() const override { return "fastrnn::RecurrentBackwardBackward"; }

  // Of the gradients that recurrent_backward gave, to those of dy, dh_n, dc_n, x, h0, c0 and the
  // weights.
  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const variable_list saved = unpack();
    const at::TensorList inputs = at::TensorList(saved).slice(0, saved.size() - 1);
    if (std::none_of(gradients.begin(), gradients.end(),
                     [](const Tensor& t) { return t.defined(); })) {
      return variable_list(inputs.size());
    }
    // recurrent_backward gave what was wanted and there, in this order.
    variable_list tangents(needs.size());
    size_t next = 0;
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i] && inputs[3 + i].defined()) tangents[i] = gradients[next++];
    }
    std::vector<bool> wanted;
    for (size_t i = 0; i < inputs.size(); ++i) {
      wanted.push_back(inputs[i].defined() && task_should_compute_output(i));
    }
    const PlainBackward call(options(), batch_sizes, inputs, saved.back());
    return differentiate_reference_backward(call.stack, call.inputs, call.noise, call.gradients,
                                            tangents, wanted, as_number(samples));
  }
};

// Gives fused results the tangents that the reference's have.
void push_forward(const variable_list& results, const variable_list& plain) {
  for (size_t i = 0; i < plain.size(); ++i) {
    if (!has_tangent(plain[i])) continue;
    results[i]._set_fw_grad(plain[i]._fw_grad(/*level=*/0), /*level=*/0, /*is_inplace_op=*/false);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(c10::string_view mode, const Tensor& x,
                                                   const OptionalTensor& batch_sizes,
                                                   const OptionalTensor& h0,
                                                   const OptionalTensor& c0, at::TensorList weights,
                                                   int64_t num_layers, bool has_biases,
                                                   bool bidirectional, bool batch_first,
                                                   double dropout, const OptionalTensor& token) {
  static const auto op = find_op<ForwardSignature>("fastrnn::recurrent_forward");
  const bool records = wants_gradient(x, h0, c0, weights);
  auto [y, h_n, c_n, reserve, kept] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, reserve] = op.call(mode, x, batch_sizes, h0, c0, weights, num_layers,
                                          has_biases, bidirectional, batch_first, dropout, token);
    // The caller may write to y.
    const Tensor kept = records ? y.clone() : Tensor();
    return std::make_tuple(y, h_n, c_n, reserve, kept);
  }();
  const Options options{mode, num_layers, has_biases, bidirectional, batch_first, dropout};
  if (records) {
    const auto node = make_node<ForwardNode>();
    node->save(options, batch_sizes, list({x, batch_sizes, h0, c0, weights}), {kept, reserve});
    for (const Tensor& output : {y, h_n, c_n}) torch::autograd::set_history(output, node);
  }
  if (wants_tangent(x, h0, c0, weights)) {
    const OptionalTensor sizes = unwrapped(batch_sizes);
    const Inputs inputs{x, sizes, h0, c0, weights};
    const Stack stack = check_arguments(options, inputs);
    push_forward({y, h_n, c_n}, run_reference(stack, inputs, reserved_noise(stack, reserve)));
  }
  return {y, h_n, c_n, reserve};
}

variable_list backward(c10::string_view mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
                       const OptionalTensor& dc_n, const Tensor& x,
                       const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                       const OptionalTensor& c0, at::TensorList weights, const Tensor& y,
                       const Tensor& reserve, int64_t num_layers, bool has_biases,
                       bool bidirectional, bool batch_first, double dropout,
                       const c10::List<bool>& needs, std::optional<c10::SymInt> samples) {
  static const auto op = find_op<BackwardSignature>("fastrnn::recurrent_backward");
  variable_list results = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(mode, dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights, y, reserve, num_layers,
                   has_biases, bidirectional, batch_first, dropout, needs, samples);
  }();
  if (!at::GradMode::is_enabled() && !in_forward_ad()) return results;
  variable_list inputs = {tensor_of(dy), tensor_of(dh_n), tensor_of(dc_n)};
  const variable_list of_forward = list({x, batch_sizes, h0, c0, weights});
  inputs.insert(inputs.end(), of_forward.begin(), of_forward.end());
  const Options options{mode, num_layers, has_biases, bidirectional, batch_first, dropout};
  const auto any = [&](const auto& predicate) {
    return std::any_of(inputs.begin(), inputs.end(),
                       [&](const Tensor& t) { return t.defined() && predicate(t); });
  };
  if (at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); })) {
    const auto node = make_node<BackwardNode>();
    node->needs = needs.vec();
    node->samples = samples;
    node->save(options, batch_sizes, inputs, {reserve});
    for (const Tensor& result : results) torch::autograd::set_history(result, node);
  }
  if (propagates_tangents() && any(has_tangent)) {
    const PlainBackward call(options, batch_sizes, inputs, reserve);
    push_forward(results, run_reference_backward(call.stack, call.inputs, call.noise,
                                                 call.gradients, needs.vec(), as_number(samples)));
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("recurrent_forward", forward);
  m.impl("recurrent_backward", backward);
}

}  // namespace fastrnn
