// Tensors as the kernels see them.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <vector>

#include "call_memory.h"
#include "isa.h"
#include "stack.h"

namespace fastrnn {

// An uninitialised tensor of that many elements.
inline at::Tensor empty_buffer(int64_t elements, const at::TensorOptions& options) {
  at::Tensor buffer = at::empty({elements}, options);
  if (buffer.is_cpu()) ask_for_huge_pages(buffer.mutable_data_ptr(), buffer.nbytes());
  return buffer;
}

// Raises c10::Error unless a tensor's storage reaches to its last element: it may have been freed
// or shrunk since. That is no refusal ("fastrnn: ..."), after which torch.nn would be asked, whose
// LSTM reads what is no longer there. To be called before torch itself reads the tensor, to copy it
// say.
inline void check_memory(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.numel() == 0 ||
                  tensor.storage().nbytes() >=
                      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(),
                                                       tensor.itemsize(), tensor.storage_offset()),
              "the memory of a tensor that fastrnn is to read was freed");
}
inline void check_memory(const Inputs& inputs) {
  check_memory(inputs.x);
  if (inputs.h0.has_value()) check_memory(*inputs.h0);
  if (inputs.c0.has_value()) check_memory(*inputs.c0);
  for (const at::Tensor& weight : inputs.weights) check_memory(weight);
  if (inputs.masks.has_value()) check_memory(*inputs.masks);
}

// A tensor's elements as the kernels name their type.
template <typename E>
const E* elements(const at::Tensor& tensor) {
  return static_cast<const E*>(tensor.const_data_ptr());
}
template <typename E>
E* mutable_elements(const at::Tensor& tensor) {
  return static_cast<E*>(tensor.mutable_data_ptr());
}

// Calls f(E{}) for the type of a tensor's elements, as the kernels are to take them.
template <typename F>
auto with_element(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat:
      switch (float32_products()) {
        case Float32Products::float32: return f(float{});
        case Float32Products::two_bfloat16: return f(HighFloat{});
        case Float32Products::one_bfloat16: return f(MediumFloat{});
      }
      TORCH_CHECK(false, "fastrnn: no kernels for these products of float32");
    case at::kDouble: return f(double{});
    case at::kHalf: return f(Half{});
    case at::kBFloat16: return f(BFloat16{});
    default: TORCH_CHECK(false, "fastrnn: no kernels for ", type);
  }
}

// The type that sums of elements are kept in.
inline at::ScalarType compute_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// x, y or dy as a sequence of rows, to be read.
template <typename E>
Sequence<const E> input_sequence(const Stack& stack, const at::Tensor& x) {
  const E* data = elements<E>(x);
  if (stack.packed) return {data, 0, x.stride(0)};
  if (!stack.batched) return {data, x.stride(0), 0};
  return {data, x.stride(stack.batch_first ? 1 : 0), x.stride(stack.batch_first ? 0 : 1)};
}

// y or dx, contiguous, as a sequence of rows, to be written.
template <typename E>
Sequence<E> output_sequence(const Stack& stack, const at::Tensor& y) {
  E* data = mutable_elements<E>(y);
  const int64_t width = y.size(-1);
  if (stack.batch_first) return {data, width, stack.steps * width};
  return {data, stack.batch * width, width};
}

// A buffer (rows, width) of the driver's own, step after step.
template <typename E>
Sequence<E> row_sequence(const Stack& stack, E* data, int64_t width) {
  return {data, stack.batch * width, width};
}

template <typename E>
Sequence<E> columns_from(const Sequence<E>& sequence, int64_t column) {
  if (!sequence.data) return sequence;
  return {sequence.data + column, sequence.step_stride, sequence.row_stride};
}

template <typename E>
Sequence<const E> read_only(const Sequence<E>& sequence) {
  return {sequence.data, sequence.step_stride, sequence.row_stride};
}

// The weights of one strand.
template <typename E>
struct StrandWeights {
  const E *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;

  StrandWeights(const Stack& stack, const std::vector<at::Tensor>& weights, int64_t strand) {
    const at::Tensor* first = weights.data() + strand * stack.weights_per_strand();
    w_ih = elements<E>(first[0]);
    w_hh = elements<E>(first[1]);
    b_ih = stack.has_biases ? elements<E>(first[2]) : nullptr;
    b_hh = stack.has_biases ? elements<E>(first[3]) : nullptr;
    w_hr = stack.projected ? elements<E>(first[stack.weights_per_strand() - 1]) : nullptr;
  }
};

inline std::vector<at::Tensor> contiguous_all(at::TensorList tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

inline at::Tensor rows_contiguous(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

// A state (L * D, N, width) by strand; a missing one is a row of zeros.
template <typename E>
struct State {
  const E* data;
  int64_t strand_stride, row_stride;

  State(const at::Tensor& given, const E* zeros, int64_t batch, int64_t width)
      : data(given.defined() ? elements<E>(given) : zeros),
        strand_stride(given.defined() ? batch * width : 0),
        row_stride(given.defined() ? width : 0) {}

  const E* of_strand(int64_t strand) const { return data + strand * strand_stride; }
};

// A state or its gradient, (L * D, N, width); zeros where none is given.
inline at::Tensor state_or_zeros(const Stack& stack, const OptionalTensor& given, int64_t width,
                                 const at::TensorOptions& options) {
  const std::array<int64_t, 3> sizes = {stack.strands(), stack.batch, width};
  return given.has_value() ? given->reshape(sizes) : at::zeros(sizes, options);
}

// x, y or a gradient of one, (rows, width) step after step: a view where the layout allows. Asks
// the tensor for no size, which one of vmap's that is compiled for any size does not tell.
inline at::Tensor as_rows(const Stack& stack, const at::Tensor& sequence, int64_t width) {
  const at::Tensor by_step = stack.batch_first ? sequence.transpose(0, 1) : sequence;
  return by_step.reshape({stack.rows, width});
}

// Rows of step after step, of each of which row n is one of sample n % samples, by sample.
inline at::Tensor by_sample(const at::Tensor& rows, int64_t samples) {
  return rows.view({-1, samples, rows.size(1)}).transpose(0, 1);
}

inline at::Tensor contiguous_state(const OptionalTensor& state) {
  return state.has_value() ? state->contiguous() : at::Tensor();
}

}  // namespace fastrnn
