// The ops as C++ functions, to call them through torch's dispatcher, and when autograd is to.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>
#include <vector>

#include "stack.h"

namespace fastrnn {

template <typename Results>
using RunSignature = Results(c10::string_view mode, const at::Tensor& x,
                             const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                             const OptionalTensor& c0, at::TensorList weights, int64_t num_layers,
                             bool has_biases, bool bidirectional, bool batch_first,
                             const OptionalTensor& masks, double dropout);
using RecurrentSignature = RunSignature<std::tuple<at::Tensor, at::Tensor, at::Tensor>>;
using ForwardSignature = RunSignature<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>>;
using BackwardSignature = std::vector<at::Tensor>(
    c10::string_view mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
    const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, const at::Tensor& y,
    const at::Tensor& reserve, int64_t num_layers, bool has_biases, bool bidirectional,
    bool batch_first, const OptionalTensor& masks, double dropout, const c10::List<bool>& needs,
    std::optional<c10::SymInt> samples);
using OutputAgainSignature = at::Tensor(c10::string_view mode, const at::Tensor& x,
                                        const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                                        const OptionalTensor& c0, at::TensorList weights,
                                        const at::Tensor& reserve, int64_t num_layers,
                                        bool has_biases, bool bidirectional, bool batch_first,
                                        const OptionalTensor& masks, double dropout);
using CellSignature = std::tuple<at::Tensor, at::Tensor>(c10::string_view mode, const at::Tensor& x,
                                                         const OptionalTensor& h0,
                                                         const OptionalTensor& c0,
                                                         at::TensorList weights, bool has_biases);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The ops, through the dispatcher.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> call_recurrent(const Options& options,
                                                                     const Inputs& inputs) {
  static const auto op = find_op<RecurrentSignature>("fastrnn::recurrent");
  return op.call(options.mode, inputs.x, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights,
                 options.num_layers, options.has_biases, options.bidirectional, options.batch_first,
                 inputs.masks, options.dropout);
}
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> call_forward(
    const Options& options, const Inputs& inputs) {
  static const auto op = find_op<ForwardSignature>("fastrnn::recurrent_forward");
  return op.call(options.mode, inputs.x, inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights,
                 options.num_layers, options.has_biases, options.bidirectional, options.batch_first,
                 inputs.masks, options.dropout);
}
inline std::vector<at::Tensor> call_backward(const Options& options, const Inputs& inputs,
                                             const OutputGradients& gradients, const at::Tensor& y,
                                             const at::Tensor& reserve,
                                             const c10::List<bool>& needs,
                                             const std::optional<c10::SymInt>& samples) {
  static const auto op = find_op<BackwardSignature>("fastrnn::recurrent_backward");
  return op.call(options.mode, gradients.y, gradients.h_n, gradients.c_n, inputs.x,
                 inputs.batch_sizes, inputs.h0, inputs.c0, inputs.weights, y, reserve,
                 options.num_layers, options.has_biases, options.bidirectional, options.batch_first,
                 inputs.masks, options.dropout, needs, samples);
}
inline std::tuple<at::Tensor, at::Tensor> call_cell(c10::string_view mode, const Inputs& inputs,
                                                    bool has_biases) {
  static const auto op = find_op<CellSignature>("fastrnn::cell");
  return op.call(mode, inputs.x, inputs.h0, inputs.c0, inputs.weights, has_biases);
}

// The other way round, what an op does, of a function that takes what those take:
// m.impl("recurrent", run_op<f>).
template <auto f>
auto run_op(c10::string_view mode, const at::Tensor& x, const OptionalTensor& batch_sizes,
            const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
            int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first,
            const OptionalTensor& masks, double dropout) {
  return f(Options{mode, num_layers, has_biases, bidirectional, batch_first, dropout},
           Inputs{x, batch_sizes, h0, c0, weights, masks});
}
// Int: of samples, int64_t where there are no symbols.
template <auto f, typename Int = c10::SymInt>
auto backward_op(c10::string_view mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
                 const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& batch_sizes,
                 const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                 const at::Tensor& y, const at::Tensor& reserve, int64_t num_layers,
                 bool has_biases, bool bidirectional, bool batch_first, const OptionalTensor& masks,
                 double dropout, const c10::List<bool>& needs, std::optional<Int> samples) {
  return f(Options{mode, num_layers, has_biases, bidirectional, batch_first, dropout},
           Inputs{x, batch_sizes, h0, c0, weights, masks}, OutputGradients{dy, dh_n, dc_n}, y,
           reserve, needs, samples);
}
template <auto f>
auto output_again_op(c10::string_view mode, const at::Tensor& x, const OptionalTensor& batch_sizes,
                     const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                     const at::Tensor& reserve, int64_t num_layers, bool has_biases,
                     bool bidirectional, bool batch_first, const OptionalTensor& masks,
                     double dropout) {
  return f(Options{mode, num_layers, has_biases, bidirectional, batch_first, dropout},
           Inputs{x, batch_sizes, h0, c0, weights, masks}, reserve);
}

// As an op takes a tensor that may be undefined.
inline OptionalTensor optional(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

inline at::Tensor tensor_of(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

// An op's differentiable arguments: x, h0, c0 and the weights, undefined where there are none.
inline std::vector<at::Tensor> list(const Inputs& inputs) {
  std::vector<at::Tensor> all = {inputs.x, tensor_of(inputs.h0), tensor_of(inputs.c0)};
  all.insert(all.end(), inputs.weights.begin(), inputs.weights.end());
  return all;
}

enum : int64_t { kX, kH0, kC0, kFirstWeight };  // places in list()

// And the masks, which are not differentiated.
inline std::vector<at::Tensor> list_all(const Inputs& inputs) {
  std::vector<at::Tensor> all = list(inputs);
  all.push_back(tensor_of(inputs.masks));
  return all;
}

// Whether the reserve of a run has no elements, whatever its input is. It is then not saved: hooks
// of saved tensors meet data alone.
inline bool keeps_nothing(const Options& options) {
  return options.mode != "LSTM" && options.num_layers == 1;
}
inline at::Tensor reserve_or_empty(const at::Tensor& saved, const at::Tensor& x) {
  return saved.defined() ? saved : at::empty({0}, x.options());
}

// Raises c10::Error unless there is one entry for each of list().
inline void check_needs(const std::vector<bool>& needs, at::TensorList weights) {
  const size_t count = kFirstWeight + weights.size();
  TORCH_CHECK(needs.size() == count, "fastrnn: needs must have ", count, " entries, got ",
              needs.size());
}

// What recurrent_backward returned for `needs`, each in its argument's place in list().
template <typename Needs>
std::vector<at::Tensor> in_places(const std::vector<at::Tensor>& gradients, const Needs& needs) {
  std::vector<at::Tensor> places(needs.size());
  size_t next = 0;
  for (size_t i = 0; i < needs.size(); ++i) {
    if (needs[i]) places[i] = gradients[next++];
  }
  return places;
}

// Gradients of y, h_n and c_n, of which some may be undefined.
inline OutputGradients as_gradients(at::TensorList tensors) {
  return {optional(tensors[0]), optional(tensors[1]), optional(tensors[2])};
}

// Whether there is a gradient at all: from none, as of torch's own operations, there come none.
inline bool any_defined(at::TensorList gradients) {
  return std::any_of(gradients.begin(), gradients.end(),
                     [](const at::Tensor& t) { return t.defined(); });
}

// Whether predicate(tensor) holds for one of an op's differentiable arguments.
template <typename Predicate>
bool any_argument(const Inputs& inputs, const Predicate& predicate) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  return predicate(x) || (h0.has_value() && predicate(*h0)) || (c0.has_value() && predicate(*c0)) ||
         std::any_of(weights.begin(), weights.end(), predicate);
}

// Whether autograd is to record a call on these.
inline bool wants_gradient(const Inputs& inputs) {
  return at::GradMode::is_enabled() &&
         any_argument(inputs, [](const at::Tensor& t) { return t.requires_grad(); });
}

// Whether forward-mode AD is active, on whatever thread: its levels are the process's.
inline bool in_forward_ad() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// None has where forward-mode AD is switched off on this thread.
inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Whether the results of a call on these are to have tangents.
inline bool wants_tangent(const Inputs& inputs) {
  return in_forward_ad() && any_argument(inputs, has_tangent);
}

}  // namespace fastrnn
