// The stack on the CUDA kernels. What lies here knows tensors and the kernels' plain interface, and
// no CUDA header: on CPU tensors, with emulated kernels, the same code is tested without a GPU.
#pragma once

#include "buffers.h"
#include "cuda/kernels.h"
#include "reserve.h"

namespace fastrnn::gpu {

// run_forward and run_backward of stack.h, for tensors on the current device.
void run_forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs);
void run_backward(const Stack& stack, const Inputs& inputs, const at::Tensor& y,
                  const at::Tensor& reserve, const Gradients& gradients);

// The stream that kernels go to. Whoever registers the ops defines it.
cuda::Stream current_stream();

// The teams of a persistent kernel for a layer; none where it runs step by step.
std::optional<cuda::Teams> choose_forward_teams(const Stack& stack, cuda::Element element);
std::optional<cuda::Teams> choose_backward_teams(const Stack& stack, cuda::Element element);

// Raises c10::Error unless a launcher succeeded: a failure, and so no "fastrnn: ...", which means
// arguments that torch.nn may take after all (is_refusal in fastrnn/_fused.py).
inline void check(int error) {
  TORCH_CHECK(error == 0, "CUDA error in fastrnn: ", cuda::take_error(error));
}

// Likewise of a persistent kernel, but false where the device refused so many blocks.
inline bool check_persistent(int error) {
  const bool refused = cuda::is_too_large(error);
  if (refused) {
    cuda::take_error(error);
  } else {
    check(error);
  }
  return !refused;
}

inline cuda::Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return cuda::Element::f32;
    case at::kDouble: return cuda::Element::f64;
    case at::kHalf: return cuda::Element::f16;
    case at::kBFloat16: return cuda::Element::bf16;
    default: TORCH_CHECK(false, "fastrnn: no kernels for ", type);
  }
}

// The schedule with sizes and offsets in device memory.
class DeviceSchedule {
 public:
  DeviceSchedule(const Stack& stack, const at::TensorOptions& options, cuda::Stream stream);
  const Schedule& get() const { return schedule_; }

 private:
  at::Tensor storage_;
  Schedule schedule_;
};

// out = a . b, of two matrices; out may be float32 where they are of 16 bits.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// Writes rows (rows, width) to y or dx.
void copy_rows(const Stack& stack, const at::Tensor& rows, const at::Tensor& sequence);

// The weights of one direction of one layer; undefined where there are none. What the kernels read
// is contiguous.
struct Weights {
  at::Tensor w_ih, w_hh, b_ih, b_hh, w_hr;

  Weights(const Stack& stack, at::TensorList all, int64_t strand);
};

// What both passes' launchers take of a layer.
template <typename Args>
Args layer_args(const Stack& stack, cuda::Element element, const Schedule& schedule) {
  Args args{};
  args.element = element;
  args.cell = stack.cell;
  args.directions = stack.directions;
  args.schedule = schedule;
  args.rows = stack.rows;
  args.hidden = stack.hidden;
  return args;
}

}  // namespace fastrnn::gpu
