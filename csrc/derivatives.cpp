// Derivatives of the ops recurrent_forward and recurrent_backward, as torch's own operations have
// them: at any level of torch.func's transforms, and in forward-mode AD. Values and gradients stay
// fused; tangents, and gradients of gradients, are the reference's passes over what those kept.

#include <ATen/functorch/TensorWrapper.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>

#include "reference.h"
#include "signatures.h"
#include "vmap.h"

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

// A node of tensors that are differentiated, in order, and others that the gradients need.
class Recorded : public Node {
 public:
  // The ops' arguments beside.
  Options options;
  OptionalTensor batch_sizes;

  // call: of the forward pass, whose are y and reserve, too. Of y and the sizes copies are kept:
  // the caller may write to them.
  void save(const Options& given, const Inputs& call, const variable_list& inputs, const Tensor& y,
            const Tensor& reserve) {
    mode_ = given.mode;
    options = given;
    options.mode = mode_;
    set_next_edges(torch::autograd::collect_next_edges(inputs));
    for (const Tensor& input : inputs) saved_.emplace_back(input, /*is_output=*/false);
    const Tensor copy = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (call.batch_sizes.has_value()) batch_sizes = call.batch_sizes->clone();
      return y.clone();
    }();
    saved_.emplace_back(copy, /*is_output=*/false);
    saved_.emplace_back(keeps_nothing(options) ? Tensor() : reserve, /*is_output=*/false);
    saved_.emplace_back(tensor_of(call.masks), /*is_output=*/false);
  }
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) variable.reset_data();
  }

 protected:
  struct Saved {
    variable_list inputs;
    Tensor y, reserve;
    OptionalTensor masks;
  };
  Saved unpack() {
    variable_list tensors;
    for (const SavedVariable& variable : saved_) tensors.push_back(variable.unpack(getptr()));
    const auto rest = tensors.end() - 3;
    const Tensor y = rest[0], reserve = reserve_or_empty(rest[1], y);
    return {{tensors.begin(), rest}, y, reserve, optional(rest[2])};
  }

 private:
  std::string mode_;
  std::vector<SavedVariable> saved_;  // inputs, y, reserve, masks
};

// In the lists that BackwardNode saves, forward's begins after the gradients of y, h_n and c_n.
constexpr int64_t kOfForward = 3;

class ForwardNode : public Recorded {
 public:
  std::string name() const override { return "fastrnn::RecurrentBackward"; }

  // Of y, h_n and c_n, to those of x, h0, c0 and the weights.
  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto [inputs, y, reserve, masks] = unpack();
    if (!any_defined(gradients)) return variable_list(inputs.size());
    c10::List<bool> needs;
    for (size_t i = 0; i < inputs.size(); ++i) needs.push_back(task_should_compute_output(i));
    const OptionalTensor h0 = optional(inputs[kH0]), c0 = optional(inputs[kC0]);
    const at::TensorList weights = at::TensorList(inputs).slice(kFirstWeight);
    const variable_list wanted =
        call_backward(options, {inputs[kX], batch_sizes, h0, c0, weights, masks},
                      as_gradients(gradients), y, reserve, needs, /*samples=*/std::nullopt);
    return in_places(wanted, needs);
  }
};

std::optional<int64_t> as_number(const std::optional<c10::SymInt>& value) {
  if (!value.has_value()) return std::nullopt;
  return value->guard_int(__FILE__, __LINE__);
}

// A call's arguments, of which these are x, h0, c0 and the weights, as the reference takes them.
struct PlainCall {
  OptionalTensor sizes, h0, c0;
  Inputs inputs;
  Stack stack;

  PlainCall(const Options& options, const OptionalTensor& batch_sizes, at::TensorList arguments,
            const OptionalTensor& masks)
      : sizes(unwrapped(batch_sizes)),
        h0(optional(arguments[kH0])),
        c0(optional(arguments[kC0])),
        inputs{arguments[kX], sizes, h0, c0, arguments.slice(kFirstWeight), masks},
        stack(check_arguments(options, inputs)) {}
  PlainCall(const PlainCall&) = delete;
};

// Whether nothing differentiates what is made of a tensor, at this level of torch.func's
// transforms, in whose wrapper it may be, or at one that is outside.
bool is_constant(const Tensor& tensor) {
  if (!tensor.defined()) return true;
  const auto* const wrapper = at::functorch::maybeGetTensorWrapper(tensor);
  const Tensor& inner = wrapper ? wrapper->value() : tensor;
  const bool transformed = level_of(inner) > 0 || is_differentiated(inner);
  const bool requires_grad = tensor.requires_grad() || inner.requires_grad();
  return !transformed && !has_tangent(tensor) && !has_tangent(inner) &&
         !(at::GradMode::is_enabled() && requires_grad);
}

// What the fused run left, if it may serve in place of another: it has no derivatives.
Kept usable(const PlainCall& call, const Kept& kept) {
  const variable_list inputs = list_all(call.inputs);
  return std::all_of(inputs.begin(), inputs.end(), is_constant) ? kept : Kept();
}

// Derivatives of a call of recurrent_backward on `values`, which are dy, dh_n, dc_n, x, h0, c0 and
// the weights; as differentiate_reference_backward.
variable_list differentiate(const Options& options, const OptionalTensor& batch_sizes,
                            at::TensorList values, const OptionalTensor& masks, const Kept& kept,
                            at::TensorList tangents, std::optional<int64_t> tangent_samples,
                            const std::vector<bool>& needs, std::optional<int64_t> samples) {
  const PlainCall call(options, batch_sizes, values.slice(kOfForward), masks);
  return differentiate_reference_backward(
      call.stack, call.inputs, usable(call, kept), as_gradients(values),
      {tangents.slice(kOfForward), as_gradients(tangents), tangent_samples}, needs, samples);
}

class BackwardNode : public Recorded {
 public:
  std::vector<bool> needs;  // of the gradients that recurrent_backward gave
  std::optional<c10::SymInt> samples;

  std::string name() const override { return "fastrnn::RecurrentBackwardBackward"; }

  // Of the gradients that recurrent_backward gave, to those of dy, dh_n, dc_n, x, h0, c0 and the
  // weights.
  variable_list apply(variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto [inputs, y, reserve, masks] = unpack();
    if (!any_defined(gradients)) return variable_list(inputs.size());
    variable_list tangents(kOfForward);  // none of dy, dh_n and dc_n
    const variable_list of_forward = in_places(gradients, needs);
    tangents.insert(tangents.end(), of_forward.begin(), of_forward.end());
    std::vector<bool> wanted;
    for (size_t i = 0; i < inputs.size(); ++i) wanted.push_back(task_should_compute_output(i));
    return differentiate(options, batch_sizes, inputs, masks, {y, reserve}, tangents,
                         as_number(samples), wanted, std::nullopt);
  }
};

// Tensors without their tangents, and the tangents alone, undefined where there are none.
variable_list primals(at::TensorList tensors) {
  variable_list found;
  for (const Tensor& t : tensors) found.push_back(t.defined() ? t._fw_primal(/*level=*/0) : t);
  return found;
}
variable_list tangents_of(at::TensorList tensors) {
  variable_list found;
  for (const Tensor& t : tensors) found.push_back(t.defined() ? t._fw_grad(/*level=*/0) : t);
  return found;
}
void set_tangents(const variable_list& results, at::TensorList tangents) {
  for (size_t i = 0; i < results.size(); ++i) {
    if (!tangents[i].defined()) continue;
    results[i]._set_fw_grad(tangents[i], /*level=*/0, /*is_inplace_op=*/false);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Options& options, const Inputs& inputs) {
  const auto [y, h_n, c_n, reserve] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(options, inputs);
  }();
  const variable_list all = list(inputs);
  variable_list tangents;
  if (wants_tangent(inputs)) {
    const variable_list values = primals(all), given = tangents_of(all);
    const PlainCall call(options, inputs.batch_sizes, values, inputs.masks);
    const Kept kept = usable(call, {y, reserve});
    tangents = push_reference(call.stack, call.inputs, kept, given);
  }
  if (wants_gradient(inputs)) {
    const auto node = make_node<ForwardNode>();
    node->save(options, inputs, all, y, reserve);
    for (const Tensor& output : {y, h_n, c_n}) torch::autograd::set_history(output, node);
  }
  if (!tangents.empty()) set_tangents({y, h_n, c_n}, tangents);
  return {y, h_n, c_n, reserve};
}

variable_list backward(const Options& options, const Inputs& of_call,
                       const OutputGradients& gradients, const Tensor& y, const Tensor& reserve,
                       const c10::List<bool>& needs, const std::optional<c10::SymInt>& samples) {
  const variable_list of_forward = list(of_call);
  variable_list inputs = {tensor_of(gradients.y), tensor_of(gradients.h_n),
                          tensor_of(gradients.c_n)};
  inputs.insert(inputs.end(), of_forward.begin(), of_forward.end());
  const auto any = [&](const auto& predicate) {
    return std::any_of(inputs.begin(), inputs.end(),
                       [&](const Tensor& t) { return t.defined() && predicate(t); });
  };
  const variable_list results = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(options, of_call, gradients, y, reserve, needs, samples);
  }();
  std::vector<bool> given;  // which of them are in results
  for (size_t i = 0; i < needs.size(); ++i) given.push_back(needs[i] && of_forward[i].defined());
  variable_list tangents;
  if (in_forward_ad() && any(has_tangent)) {
    std::vector<bool> wanted(kOfForward, false);
    wanted.insert(wanted.end(), given.begin(), given.end());
    const variable_list found =
        differentiate(options, of_call.batch_sizes, primals(inputs), of_call.masks,
                      {y._fw_primal(/*level=*/0), reserve}, tangents_of(inputs), std::nullopt,
                      wanted, as_number(samples));
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) tangents.push_back(found[i]);
    }
  }
  if (at::GradMode::is_enabled() && any([](const Tensor& t) { return t.requires_grad(); })) {
    const auto node = make_node<BackwardNode>();
    node->needs = given;
    node->samples = samples;
    node->save(options, of_call, inputs, y, reserve);
    for (const Tensor& result : results) torch::autograd::set_history(result, node);
  }
  if (!tangents.empty()) set_tangents(results, tangents);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("recurrent_forward", run_op<forward>);
  m.impl("recurrent_backward", backward_op<backward>);
}

}  // namespace fastrnn
