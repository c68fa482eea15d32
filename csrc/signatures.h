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

using RecurrentSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    c10::string_view mode, const at::Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, int64_t num_layers,
    bool has_biases, bool bidirectional, bool batch_first, double dropout);
using ForwardSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    c10::string_view mode, const at::Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, int64_t num_layers,
    bool has_biases, bool bidirectional, bool batch_first, double dropout,
    const OptionalTensor& token);
using BackwardSignature = std::vector<at::Tensor>(
    c10::string_view mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
    const OptionalTensor& dc_n, const at::Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, const at::Tensor& y,
    const at::Tensor& reserve, int64_t num_layers, bool has_biases, bool bidirectional,
    bool batch_first, double dropout, const c10::List<bool>& needs,
    std::optional<c10::SymInt> samples);
using OutputAgainSignature = at::Tensor(c10::string_view mode, const at::Tensor& x,
                                        const OptionalTensor& batch_sizes, const OptionalTensor& h0,
                                        const OptionalTensor& c0, at::TensorList weights,
                                        const at::Tensor& reserve, int64_t num_layers,
                                        bool has_biases, bool bidirectional, bool batch_first,
                                        double dropout);
using CellSignature = std::tuple<at::Tensor, at::Tensor>(c10::string_view mode, const at::Tensor& x,
                                                         const OptionalTensor& h0,
                                                         const OptionalTensor& c0,
                                                         at::TensorList weights, bool has_biases);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
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

constexpr int64_t kFirstWeight = 3;  // its place in list()

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

// Whether there is a gradient at all: from none, as of torch's own operations, there come none.
inline bool any_defined(at::TensorList gradients) {
  return std::any_of(gradients.begin(), gradients.end(),
                     [](const at::Tensor& t) { return t.defined(); });
}

// Whether predicate(tensor) holds for one of an op's differentiable arguments.
template <typename Predicate>
bool any_argument(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                  at::TensorList weights, const Predicate& predicate) {
  return predicate(x) || (h0.has_value() && predicate(*h0)) || (c0.has_value() && predicate(*c0)) ||
         std::any_of(weights.begin(), weights.end(), predicate);
}

// Whether autograd is to record a call on these.
inline bool wants_gradient(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                           at::TensorList weights) {
  return at::GradMode::is_enabled() &&
         any_argument(x, h0, c0, weights, [](const at::Tensor& t) { return t.requires_grad(); });
}

// Whether forward-mode AD is active, on whatever thread: its levels are the process's.
inline bool in_forward_ad() {
  return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// None has where forward-mode AD is switched off on this thread.
inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

// Whether the results of a call on these are to have tangents.
inline bool wants_tangent(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                          at::TensorList weights) {
  return in_forward_ad() && any_argument(x, h0, c0, weights, has_tangent);
}

}  // namespace fastrnn
