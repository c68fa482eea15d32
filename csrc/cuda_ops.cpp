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
  template <typename... Args>
  static void forward(const Stack& stack, const at::Tensor& x, const Args&... args) {
    const c10::cuda::CUDAGuard guard(x.device());
    gpu::run_forward(stack, x, args...);
  }
  template <typename... Args>
  static void backward(const Stack& stack, const at::Tensor& dy, const at::Tensor& dh,
                       const at::Tensor& dc, bool wants_dh0, const at::Tensor& x,
                       const Args&... args) {
    const c10::cuda::CUDAGuard guard(x.device());
    gpu::run_backward(stack, dy, dh, dc, wants_dh0, x, args...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) { register_kernels<CudaBackend>(m); }

}  // namespace fastrnn
