// Autograd of the op recurrent: forward through recurrent_forward, backward through
// recurrent_backward, whose own derivatives are in derivatives.cpp.
#include <ATen/ops/alias.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void save(AutogradContext* ctx, const Options& options) {
  ctx->saved_data["mode"] = std::string(options.mode);
  ctx->saved_data["num_layers"] = options.num_layers;
  ctx->saved_data["has_biases"] = options.has_biases;
  ctx->saved_data["bidirectional"] = options.bidirectional;
  ctx->saved_data["batch_first"] = options.batch_first;
  ctx->saved_data["dropout"] = options.dropout;
}

OptionalTensor saved_sizes(AutogradContext* ctx) {
  const auto found = ctx->saved_data.find("batch_sizes");
  return found == ctx->saved_data.end() ? std::nullopt : OptionalTensor(found->second.toTensor());
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

// What is saved of x. A tensor made under inference_mode, which cannot be saved, is copied where
// torch.nn copies x, as it does not lie step after step.
Tensor saved_input(const Tensor& x, bool batch_first) {
  if (!x.is_inference()) return x;
  const bool steps_apart = batch_first && x.dim() == 3;
  return (steps_apart ? x.transpose(0, 1) : x).is_contiguous() ? x : x.clone();
}

// Places of the tensors that are saved; the first three are those of list(), the weights are last.
enum : int64_t { kY = kFirstWeight, kReserve, kMasks, kWeights };

// A C++ Function, which compiled autograd takes and torch.func refuses; the nodes of
// derivatives.cpp, which do the same under torch.func, it does not take.
struct Recurrent : torch::autograd::Function<Recurrent> {
  // The differentiable arguments come first: backward returns a gradient for each in this order.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList weights,
                               const OptionalTensor& batch_sizes, const OptionalTensor& masks,
                               const Options& options) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, reserve] = call_forward(options, {x, batch_sizes, h0, c0, weights, masks});
    const Tensor input = saved_input(x, options.batch_first);
    // An alias that is made below autograd has a version counter of its own.
    variable_list saved = {input,
                           tensor_of(h0),
                           tensor_of(c0),
                           at::alias(y),
                           keeps_nothing(options) ? Tensor() : reserve,
                           tensor_of(masks)};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    // Sizes are no data for hooks; and torch.nn reads them in the forward pass alone, after which
    // the caller may write to them.
    if (batch_sizes.has_value()) ctx->saved_data["batch_sizes"] = batch_sizes->clone();
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
    c10::List<bool> needs;
    size_t edge = 0;
    for (const Tensor& input : inputs) {
      needs.push_back(input.defined() && ctx->needs_input_grad(edge));
      edge += input.defined();
    }
    variable_list results;
    if (any_defined(gradients)) {
      results = in_places(differentiate(ctx, gradients, saved, weights, needs), needs);
    }
    // One for every argument of forward, undefined for the last three.
    results.resize(inputs.size() + 3);
    return results;
  }

 private:
  static variable_list differentiate(AutogradContext* ctx, const variable_list& gradients,
                                     const variable_list& saved, at::TensorList weights,
                                     const c10::List<bool>& needs) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Options options = saved_options(ctx);
    const OptionalTensor sizes = saved_sizes(ctx);
    const OptionalTensor h0 = optional(saved[kH0]), c0 = optional(saved[kC0]);
    const OptionalTensor masks = optional(saved[kMasks]);
    const Inputs inputs{saved[kX], sizes, h0, c0, weights, masks};
    const Tensor reserve = reserve_or_empty(saved[kReserve], saved[kX]);
    const Tensor y = saw_write(ctx) ? output_again(options, inputs, reserve) : saved[kY];
    return call_backward(options, inputs, as_gradients(gradients), y, reserve, needs,
                         /*samples=*/std::nullopt);
  }

  // y, to which the caller has written since.
  static Tensor output_again(const Options& options, const Inputs& inputs, const Tensor& reserve) {
    static const auto op = find_op<OutputAgainSignature>("fastrnn::output_again");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(options.mode, inputs.x, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights,
                   reserve, options.num_layers, options.has_biases, options.bidirectional,
                   options.batch_first, inputs.masks, options.dropout);
  }
};

std::tuple<Tensor, Tensor, Tensor> recurrent(const Options& options, const Inputs& inputs) {
  const bool records = wants_gradient(inputs);
  // Under torch.func's transforms torch refuses a C++ Function: derivatives.cpp.
  const bool transformed = records && c10::impl::tls_is_dispatch_key_included(
                                          c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
  if (transformed || wants_tangent(inputs)) {
    const auto [y, h_n, c_n, reserve] = call_forward(options, inputs);
    return {y, h_n, c_n};
  }
  if (!records) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_recurrent(options, inputs);
  }
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const variable_list outputs = Recurrent::apply(x, h0, c0, weights, batch_sizes, masks, options);
  return {outputs[0], outputs[1], outputs[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) { m.impl("recurrent", run_op<recurrent>); }

}  // namespace fastrnn
