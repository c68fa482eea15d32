// Autograd of the op recurrent: forward through recurrent_forward, backward through
// recurrent_backward, or through the reference where the gradients must themselves be
// differentiable. Tangents of forward-mode AD come from the reference too.
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "reference.h"
#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether the gradient is a batch of them under vmap (autograd's is_grads_batched).
bool is_batched(const Tensor& gradient) {
  constexpr c10::DispatchKeySet batched(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  return gradient.defined() && gradient.key_set().has_any(batched);
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

void save(AutogradContext* ctx, const Options& options) {
  ctx->saved_data["mode"] = std::string(options.mode);
  ctx->saved_data["num_layers"] = options.num_layers;
  ctx->saved_data["has_biases"] = options.has_biases;
  ctx->saved_data["bidirectional"] = options.bidirectional;
  ctx->saved_data["batch_first"] = options.batch_first;
  ctx->saved_data["dropout"] = options.dropout;
}

// As they were saved; mode is ctx's.
Options saved_options(AutogradContext* ctx) {
  return {ctx->saved_data["mode"].toStringRef(),   ctx->saved_data["num_layers"].toInt(),
          ctx->saved_data["has_biases"].toBool(),  ctx->saved_data["bidirectional"].toBool(),
          ctx->saved_data["batch_first"].toBool(), ctx->saved_data["dropout"].toDouble()};
}

// Watches a tensor for writes, after which a saved variable would refuse to be read. An empty
// tensor that shares its version counter, and not its memory, is something that ctx can keep.
void watch(AutogradContext* ctx, const Tensor& tensor) {
  namespace impl = torch::autograd::impl;
  Tensor counter = at::empty({0});
  impl::set_version_counter(counter, impl::version_counter(tensor));
  ctx->saved_data["version"] = static_cast<int64_t>(tensor._version());
  ctx->saved_data["version_counter"] = std::move(counter);
}
bool saw_write(AutogradContext* ctx) {
  return ctx->saved_data["version_counter"].toTensor()._version() !=
         ctx->saved_data["version"].toInt();
}

// The tensors that are saved, in order; the weights are last.
enum Saved { kX, kH0, kC0, kBatchSizes, kY, kReserve, kWeights };

struct Recurrent : torch::autograd::Function<Recurrent> {
  // The differentiable arguments come first: backward returns a gradient for each in this order.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList weights,
                               const OptionalTensor& batch_sizes, const Options& options) {
    static const auto op = find_op<ForwardSignature>("fastrnn::recurrent_forward");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, reserve] =
        op.call(options.mode, x, batch_sizes, h0, c0, weights, options.num_layers,
                options.has_biases, options.bidirectional, options.batch_first, options.dropout);
    // An alias that is made below autograd has a version counter of its own.
    variable_list saved = {x,
                           h0.value_or(Tensor()),
                           c0.value_or(Tensor()),
                           batch_sizes.value_or(Tensor()),
                           at::alias(y),
                           reserve};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    save(ctx, options);
    watch(ctx, y);
    return {y, h_n, c_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList weights = at::TensorList(saved).slice(kWeights);
    // Inputs in the order of forward, and whether each wants its gradient.
    variable_list inputs = {saved[kX], saved[kH0], saved[kC0]};
    inputs.insert(inputs.end(), weights.begin(), weights.end());
    std::vector<bool> needs(inputs.size());
    size_t edge = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      needs[i] = inputs[i].defined() && ctx->needs_input_grad(edge);
      edge += inputs[i].defined();
    }
    const bool plain =
        at::GradMode::is_enabled() || std::any_of(gradients.begin(), gradients.end(), is_batched);
    const variable_list wanted = plain ? reference(ctx, gradients, saved, inputs, needs)
                                       : fused(ctx, gradients, saved, weights, needs);
    // One result for every argument of forward, undefined for the last two.
    variable_list results(inputs.size() + 2);
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (needs[i]) results[i] = wanted[next++];
    }
    return results;
  }

 private:
  static variable_list fused(AutogradContext* ctx, const variable_list& gradients,
                             const variable_list& saved, at::TensorList weights,
                             const std::vector<bool>& needs) {
    static const auto op = find_op<BackwardSignature>("fastrnn::recurrent_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    c10::List<bool> needs_list;
    for (const bool need : needs) needs_list.push_back(need);
    const Options options = saved_options(ctx);
    const Tensor y = saw_write(ctx) ? output_again(options, saved) : saved[kY];
    return op.call(options.mode, optional(gradients[0]), optional(gradients[1]),
                   optional(gradients[2]), saved[kX], optional(saved[kBatchSizes]),
                   optional(saved[kH0]), optional(saved[kC0]), weights, y, saved[kReserve],
                   options.num_layers, options.has_biases, options.bidirectional,
                   options.batch_first, options.dropout, needs_list);
  }

  // y, to which the caller has written since.
  static Tensor output_again(const Options& options, const variable_list& saved) {
    static const auto op = find_op<OutputAgainSignature>("fastrnn::output_again");
    return op.call(options.mode, saved[kX], optional(saved[kBatchSizes]), optional(saved[kH0]),
                   optional(saved[kC0]), at::TensorList(saved).slice(kWeights), saved[kReserve],
                   options.num_layers, options.has_biases, options.bidirectional,
                   options.batch_first, options.dropout);
  }

  static variable_list reference(AutogradContext* ctx, const variable_list& gradients,
                                 const variable_list& saved, const variable_list& inputs,
                                 const std::vector<bool>& needs) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    // Gradients of this call alone: what one input hands on to another, before it, and hooks on
    // them, are not passed through here.
    variable_list own;
    for (const Tensor& input : inputs) own.push_back(input.defined() ? at::alias(input) : input);
    const at::TensorList weights = at::TensorList(own).slice(3);
    const OptionalTensor batch_sizes = optional(saved[kBatchSizes]);
    const OptionalTensor h0 = optional(own[kH0]), c0 = optional(own[kC0]);
    const Inputs differentiable{own[kX], batch_sizes, h0, c0, weights};
    const Stack stack = check_arguments(saved_options(ctx), differentiable);
    const variable_list outputs =
        run_reference(stack, differentiable, reserved_noise(stack, saved[kReserve]));
    variable_list differentiated, output_gradients, wanted;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
      differentiated.push_back(outputs[i]);
      output_gradients.push_back(gradients[i]);
    }
    for (size_t i = 0; i < own.size(); ++i) {
      if (needs[i]) wanted.push_back(own[i]);
    }
    if (differentiated.empty()) return variable_list(wanted.size());
    return torch::autograd::grad(differentiated, wanted, output_gradients,
                                 /*retain_graph=*/create_graph, create_graph,
                                 /*allow_unused=*/true);
  }
};

std::tuple<Tensor, Tensor, Tensor> recurrent_autograd(
    c10::string_view mode, const Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, int64_t num_layers,
    bool has_biases, bool bidirectional, bool batch_first, double dropout) {
  const Options options{mode, num_layers, has_biases, bidirectional, batch_first, dropout};
  if (wants_tangent(x, h0, c0, weights)) {
    const Inputs inputs{x, batch_sizes, h0, c0, weights};
    const Stack stack = check_arguments(options, inputs);
    const std::vector<Tensor> outputs =
        run_reference(stack, inputs, draw_noise(stack, x.options()));
    return {outputs[0].contiguous(), outputs[1], outputs[2]};
  }
  if (!wants_gradient(x, h0, c0, weights)) {
    static const auto op = find_op<RecurrentSignature>("fastrnn::recurrent");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(mode, x, batch_sizes, h0, c0, weights, num_layers, has_biases, bidirectional,
                   batch_first, dropout);
  }
  const variable_list outputs = Recurrent::apply(x, h0, c0, weights, batch_sizes, options);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) { m.impl("recurrent", recurrent_autograd); }

}  // namespace fastrnn
