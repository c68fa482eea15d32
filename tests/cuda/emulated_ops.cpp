// The CUDA path of the ops on CPU tensors: loaded after fastrnn, it takes the place of the CPU
// kernels, and the launchers that it is linked with run under the emulator.
#include "../../csrc/cell.h"
#include "../../csrc/gpu.h"
#include "../../csrc/op_bodies.h"
#include "../../csrc/signatures.h"

namespace fastrnn {
namespace gpu {

cuda::Stream current_stream() { return nullptr; }

}  // namespace gpu

namespace {

struct EmulatedBackend {
  static constexpr auto forward = gpu::run_forward;
  static constexpr auto backward = gpu::run_backward;
};

// As cell.cpp has it for devices without a kernel of their own.
std::tuple<at::Tensor, at::Tensor> cell(c10::string_view mode, const at::Tensor& x,
                                        const std::optional<at::Tensor>& h0,
                                        const std::optional<at::Tensor>& c0, at::TensorList weights,
                                        bool has_biases) {
  return run_cell(call_recurrent, mode, x, h0, c0, weights, has_biases);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  register_kernels<EmulatedBackend>(m);
  m.impl("cell", cell);
}

}  // namespace fastrnn
