// The ops: schemas, and their kernels for the CPU key. torch's dispatcher, autograd (autograd.cpp)
// and compiler (fastrnn/_fakes.py holds the fakes) meet here.
#include "call_memory.h"
#include "contention.h"
#include "distance.h"
#include "isa.h"
#include "op_bodies.h"

namespace fastrnn {

// Dimensions are torch.nn's. x: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or, with
// batch_sizes, the data of a PackedSequence (rows, I). h0 (L * D, N, P) and c0 (L * D, N, H), both
// without N for unbatched x; zeros where none. weights: torch.nn's _flat_weights. masks: which
// elements of the outputs of all layers but the last dropout keeps, (L - 1, T, N, D * P) also with
// batch_first, for other x (L - 1, T or rows, D * P); they are divided by 1 - dropout. Returns y,
// h_n, c_n; c_n is empty for Elman.
TORCH_LIBRARY(fastrnn, m) {
  // batch_sizes are read on the host: in a CUDA graph that Inductor makes, later calls would run
  // with those of the first. Ops whose outputs have N, which they alone tell, it leaves out anyway.
  const std::vector<at::Tag> reads_sizes = {at::Tag::pt2_compliant_tag, at::Tag::cudagraph_unsafe};
  m.def(
      "recurrent(str mode, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, int num_layers, bool has_biases, bool bidirectional, bool batch_first, "
      "Tensor? masks=None, float dropout=0.) -> (Tensor y, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
  // As recurrent; the reserve holds what recurrent_backward needs beside the arguments and y,
  // Stack::reserve_size() elements, of which there may be none.
  m.def(
      "recurrent_forward(str mode, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, int num_layers, bool has_biases, bool bidirectional, bool batch_first, "
      "Tensor? masks=None, float dropout=0.) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)",
      {at::Tag::pt2_compliant_tag});
  // Gradients of x, h0, c0 and each weight: of those that are given and that needs asks for, in
  // this order. samples: the batch holds so many, row n one of sample n % samples; gradients of
  // weights are then (samples, ...), each sample's own. The reserve may be one that samples share:
  // that of rows n / copies, where copies divides samples.
  m.def(
      "recurrent_backward(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, "
      "Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor y, Tensor reserve, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first, Tensor? masks, "
      "float dropout, bool[] needs, SymInt? samples=None) -> Tensor[]",
      reads_sizes);
  // y of recurrent_forward once more: only the last layer is computed, whose input the reserve has.
  m.def(
      "output_again(str mode, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, Tensor reserve, int num_layers, bool has_biases, bool bidirectional, "
      "bool batch_first, Tensor? masks=None, float dropout=0.) -> Tensor",
      reads_sizes);
  m.def("cpu_capability() -> str", cpu_capability);
  m.def("amx_dtypes() -> str[]", amx_dtypes);
  m.def("matmul_precisions() -> str[]", matmul_precisions);
  m.def("release_memory() -> ()", CallMemory::release);
  // Whether calls heed what teams find out about the cores. Tests want several threads anyway, or
  // (assume_distant, until the next heed_cores) what is done where cores are distant.
  m.def("heed_cores(bool heeds) -> ()", [](bool heeds) {
    heed_contention(heeds);
    assume_distant(heeds ? std::nullopt : std::optional(false));
  });
  m.def("assume_distant(bool? distant) -> ()", assume_distant);
  m.def("measured_distant() -> bool?", measured_distant);
}

namespace {

struct CpuBackend {
  static constexpr auto forward = run_forward;
  static constexpr auto backward = run_backward;
};

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { register_kernels<CpuBackend>(m); }

}  // namespace fastrnn
