// The ops as C++ functions, to call them through torch's dispatcher, and when autograd is to.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace fastrnn {

using RecurrentSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    c10::string_view, const at::Tensor&, const std::optional<at::Tensor>&,
    const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, at::TensorList, int64_t,
    bool, bool, bool, double);
using CellSignature = std::tuple<at::Tensor, at::Tensor>(c10::string_view, const at::Tensor&,
                                                         const std::optional<at::Tensor>&,
                                                         const std::optional<at::Tensor>&,
                                                         at::TensorList, bool);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether autograd is to record a call on these.
inline bool wants_gradient(const at::Tensor& x, const std::optional<at::Tensor>& h0,
                           const std::optional<at::Tensor>& c0, at::TensorList weights) {
  const auto wants = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  return at::GradMode::is_enabled() &&
         (wants(x) || (h0.has_value() && wants(*h0)) || (c0.has_value() && wants(*c0)) ||
          std::any_of(weights.begin(), weights.end(), wants));
}

}  // namespace fastrnn
