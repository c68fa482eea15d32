// The ops' kernels for the CUDA key: on the device of x, in torch's current stream. Nothing here or
// below waits for the device, so all of it can be captured in a CUDA graph.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "gpu.h"
#include "op_bodies.h"

namespace fastrnn {
namespace gpu {

cuda::Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace gpu

namespace {

struct CudaBackend {
  static void forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs) {
    const c10::cuda::CUDAGuard guard(inputs.x.device());
    gpu::run_forward(stack, inputs, outputs);
  }
  static void backward(const Stack& stack, const Inputs& inputs, const at::Tensor& y,
                       const at::Tensor& reserve, const Gradients& gradients) {
    const c10::cuda::CUDAGuard guard(inputs.x.device());
    gpu::run_backward(stack, inputs, y, reserve, gradients);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { register_kernels<CudaBackend>(m); }

}  // namespace fastrnn
