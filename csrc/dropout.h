// Dropout between layers, with masks that were drawn before.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>

#include "stack.h"

namespace fastrnn {

// The mask of a layer's output, (rows, D * P).
inline at::Tensor mask_of(const Stack& stack, const at::Tensor& masks, int64_t layer) {
  return masks.select(0, layer).reshape({stack.rows, stack.layer_width()});
}

// By what those elements are multiplied that a mask keeps: as torch.nn rounds it.
inline double dropout_scale(const Stack& stack, at::ScalarType type) {
  if (stack.dropout == 1) return 0;
  if (type == at::kDouble) return 1 / (1 - stack.dropout);
  const float scale = 1 / static_cast<float>(1 - stack.dropout);
  if (type == at::kHalf) return static_cast<float>(at::Half(scale));
  if (type == at::kBFloat16) return static_cast<float>(at::BFloat16(scale));
  return scale;
}

// Computes in C. The mask's elements are 0 and 1. What is dropped is multiplied by 0, so that NaN
// stays.
template <typename C, typename E>
void drop_elements(const uint8_t* mask, const E* rows, E* result, int64_t count, C scale) {
  constexpr int64_t kWorthAThread = 1 << 15;
  at::parallel_for(0, count, kWorthAThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      result[i] = static_cast<E>(static_cast<C>(rows[i]) * (static_cast<C>(mask[i]) * scale));
    }
  });
}

// What dropout leaves of a layer's output or its gradient, (rows, D * P) and contiguous, in
// `result`, which may be `rows` itself. On a CPU not by torch's operation, which takes memory for a
// copy of the mask.
inline void drop(const Stack& stack, const at::Tensor& masks, int64_t layer, const at::Tensor& rows,
                 at::Tensor& result) {
  const at::ScalarType type = rows.scalar_type();
  const double scale = dropout_scale(stack, type);
  if (!rows.is_cpu()) {
    at::mul_out(result, rows, mask_of(stack, masks, layer)).mul_(scale);
    return;
  }
  const at::Tensor mask = masks.select(0, layer).contiguous();
  const auto run = [&](auto element, auto as_computed) {
    using E = decltype(element);
    drop_elements(static_cast<const uint8_t*>(mask.const_data_ptr()), rows.const_data_ptr<E>(),
                  result.mutable_data_ptr<E>(), rows.numel(), as_computed);
  };
  switch (type) {
    case at::kDouble: return run(double{}, scale);
    case at::kHalf: return run(at::Half{}, static_cast<float>(scale));
    case at::kBFloat16: return run(at::BFloat16{}, static_cast<float>(scale));
    default: return run(float{}, static_cast<float>(scale));
  }
}

// The same in a new tensor.
inline at::Tensor dropped(const Stack& stack, const at::Tensor& masks, int64_t layer,
                          const at::Tensor& rows) {
  at::Tensor result = at::empty_like(rows);
  drop(stack, masks, layer, rows, result);
  return result;
}

}  // namespace fastrnn
