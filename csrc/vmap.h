// torch.func's vmap over the inputs of a stack.
#pragma once

#include <ATen/functorch/BatchedTensorImpl.h>

#include "stack.h"

namespace fastrnn {

// The innermost level of vmap of which a tensor has samples; 0 if it has none.
inline int64_t level_of(const at::Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? batched->level() : 0;
}

// Whether another transform than vmap has wrapped a tensor, at any level.
inline bool is_differentiated(const at::Tensor& tensor) {
  const auto* const batched = at::functorch::maybeGetBatchedImpl(tensor);
  return batched ? is_differentiated(batched->value())
                 : tensor.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
}

// The samples of a level of vmap.
struct Samples {
  int64_t level;
  c10::SymInt count;
};

// The innermost samples of x and the states, where vmap's rule for the op recurrent folds them into
// the batch. Not where they have weights of their own or there are none, nor if an argument is to
// be differentiated by a transform; nor with dropout, whose masks follow vmap's randomness.
inline std::optional<Samples> find_folded(const Inputs& inputs, double dropout) {
  const auto& [x, batch_sizes, h0, c0, weights] = inputs;
  if (dropout > 0 || (batch_sizes.has_value() && level_of(*batch_sizes) > 0)) return std::nullopt;
  std::optional<Samples> samples;
  for (const OptionalTensor& each : {OptionalTensor(x), h0, c0}) {
    if (!each.has_value()) continue;
    if (is_differentiated(*each)) return std::nullopt;
    const int64_t level = level_of(*each);
    if (level == 0 || (samples.has_value() && level <= samples->level)) continue;
    const auto* const batched = at::functorch::maybeGetBatchedImpl(*each);
    samples = {level, batched->value().sym_size(batched->bdim())};
  }
  if (!samples.has_value() || samples->count == 0) return std::nullopt;
  for (const at::Tensor& weight : weights) {
    if (is_differentiated(weight) || level_of(weight) >= samples->level) return std::nullopt;
  }
  return samples;
}

}  // namespace fastrnn
