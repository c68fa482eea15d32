// The tensors of a run on a GPU.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "gpu.h"

namespace fastrnn::gpu {

DeviceSchedule::DeviceSchedule(const Stack& stack, const at::TensorOptions& options,
                               cuda::Stream stream)
    : schedule_{stack.steps, stack.batch, nullptr, nullptr} {
  if (!stack.packed) return;
  storage_ = at::empty({2, stack.steps}, options.dtype(at::kLong));
  int64_t* const sizes = storage_.mutable_data_ptr<int64_t>();
  int64_t* const offsets = sizes + stack.steps;
  check(cuda::launch_fill_schedule(stack.batch_sizes.data(), stack.steps, sizes, offsets, stream));
  schedule_.sizes = sizes;
  schedule_.offsets = offsets;
}

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor result = out;
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(result, a, b);
  } else if (a.is_cuda() && a.scalar_type() == at::kHalf &&
             at::globalContext().allowFP16AccumulationCuBLAS()) {
    // Who allows sums in float16 gets them: torch then refuses those in float32.
    at::Tensor rounded = at::empty(out.sizes(), a.options());
    at::mm_out(rounded, a, b);
    result.copy_(rounded);
  } else if (a.is_cuda()) {
    at::mm_out(result, a, b, out.scalar_type());
  } else {  // torch has that product for CUDA alone
    at::mm_out(result, a.to(out.scalar_type()), b.to(out.scalar_type()));
  }
}

void copy_rows(const Stack& stack, const at::Tensor& rows, const at::Tensor& sequence) {
  const int64_t width = rows.size(1);
  if (stack.batch_first) {
    sequence.transpose(0, 1).copy_(rows.view({stack.steps, stack.batch, width}));
  } else {
    sequence.view({stack.rows, width}).copy_(rows);
  }
}

Weights::Weights(const Stack& stack, at::TensorList all, int64_t strand) {
  const int64_t count = stack.weights_per_strand();
  const at::TensorList mine = all.slice(strand * count, count);
  w_ih = mine[0];
  w_hh = mine[1].contiguous();
  if (stack.has_biases) {
    b_ih = mine[2].contiguous();
    b_hh = mine[3].contiguous();
  }
  if (stack.projected) w_hr = mine[count - 1];
}

}  // namespace fastrnn::gpu
