// torch.func's vmap over the arguments of a stack.
#pragma once

#include <ATen/functorch/BatchedTensorImpl.h>

#include <algorithm>

#include "stack.h"

namespace fastrnn {

// The innermost level of vmap of which a tensor has samples; 0 if it has none.
inline int64_t level_of(const at::Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? batched->level() : 0;
}
inline int64_t level_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? level_of(*tensor) : 0;
}
inline int64_t level_of(at::TensorList tensors) {
  int64_t level = 0;
  for (const at::Tensor& tensor : tensors) level = std::max(level, level_of(tensor));
  return level;
}

// A tensor beneath the transforms other than vmap that have wrapped it. (The sizes of a packed
// sequence's steps are data, on which none acts.)
at::Tensor unwrapped(at::Tensor tensor);
inline OptionalTensor unwrapped(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(unwrapped(*tensor)) : std::nullopt;
}

// Whether another transform than vmap has wrapped a tensor, at any level.
inline bool is_differentiated(const at::Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? is_differentiated(batched->value())
                 : tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

}  // namespace fastrnn
