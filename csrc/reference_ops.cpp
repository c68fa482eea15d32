// The ops reference and check, and the other ops as torch.func's transforms see them.
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "reference.h"
#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;

// Sizes are numbers here: as a tensor, a transform would wrap them and hide their data.
OptionalTensor as_tensor(const at::OptionalIntArrayRef& batch_sizes) {
  if (!batch_sizes.has_value()) return std::nullopt;
  return at::from_blob(const_cast<int64_t*>(batch_sizes->data()),
                       {static_cast<int64_t>(batch_sizes->size())}, at::kLong);
}

// The op reference: without masks.
std::tuple<Tensor, Tensor, Tensor> reference(c10::string_view mode, const Tensor& x,
                                             at::OptionalIntArrayRef batch_sizes,
                                             const OptionalTensor& h0, const OptionalTensor& c0,
                                             at::TensorList weights, int64_t num_layers,
                                             bool has_biases, bool bidirectional,
                                             bool batch_first) {
  const OptionalTensor sizes = as_tensor(batch_sizes);
  const Inputs inputs{x, sizes, h0, c0, weights};
  const Stack stack =
      check_arguments({mode, num_layers, has_biases, bidirectional, batch_first}, inputs);
  const std::vector<Tensor> outputs = run_reference(stack, inputs);
  return {outputs[0], outputs[1], outputs[2]};
}

// The op reference_backward: what recurrent_backward gives, without masks.
std::vector<Tensor> reference_backward(c10::string_view mode, const OptionalTensor& dy,
                                       const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                       const Tensor& x, at::OptionalIntArrayRef batch_sizes,
                                       const OptionalTensor& h0, const OptionalTensor& c0,
                                       at::TensorList weights, int64_t num_layers, bool has_biases,
                                       bool bidirectional, bool batch_first,
                                       const c10::List<bool>& needs,
                                       std::optional<int64_t> samples) {
  const OptionalTensor sizes = as_tensor(batch_sizes);
  const Inputs inputs{x, sizes, h0, c0, weights};
  const Stack stack =
      check_arguments({mode, num_layers, has_biases, bidirectional, batch_first}, inputs);
  return run_reference_backward(stack, inputs, {dy, dh_n, dc_n}, needs.vec(), samples);
}

// The op check: raises what recurrent would, before a transform rearranges the arguments.
void check(c10::string_view mode, const Tensor& x, at::OptionalIntArrayRef batch_sizes,
           const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
           int64_t num_layers, bool has_biases, bool bidirectional, bool batch_first) {
  const OptionalTensor sizes = as_tensor(batch_sizes);
  check_arguments({mode, num_layers, has_biases, bidirectional, batch_first},
                  {x, sizes, h0, c0, weights});
}

// recurrent_backward under autograd's own vmap, and output_again under any.
std::vector<Tensor> recurrent_backward(const Options& options, const Inputs& inputs,
                                       const OutputGradients& gradients, const Tensor& /*y*/,
                                       const Tensor& /*reserve*/, const c10::List<bool>& needs,
                                       std::optional<int64_t> samples) {
  const Stack stack = check_arguments(options, inputs);
  return run_reference_backward(stack, inputs, gradients, needs.vec(), samples);
}

Tensor output_again(const Options& options, const Inputs& inputs, const Tensor& /*reserve*/) {
  return run_reference(check_arguments(options, inputs), inputs)[0].contiguous();
}

}  // namespace

// Made of differentiable ops, so that every transform of torch.func sees through it.
TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def(
      "reference(str mode, Tensor x, int[]? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights,"
      " int num_layers, bool has_biases, bool bidirectional, bool batch_first) "
      "-> (Tensor y, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "reference_backward(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, "
      "int[]? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, int num_layers, "
      "bool has_biases, bool bidirectional, bool batch_first, bool[] needs, int? samples) "
      "-> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "check(str mode, Tensor x, int[]? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first) -> ()");
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("reference", reference);
  m.impl("reference_backward", reference_backward);
  m.impl("check", check);
}

// What the alias above does not reach: under vmap too they are what they are made of.
TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatchedDecomposition, m) {
  m.impl("reference", reference);
  m.impl("reference_backward", reference_backward);
  m.impl("check", check);
  m.impl("output_again", output_again_op<output_again>);
}

// autograd's own vmap: of a compiled function's gradients, where is_grads_batched.
TORCH_LIBRARY_IMPL(fastrnn, Batched, m) {
  m.impl("recurrent_backward", backward_op<recurrent_backward, int64_t>);
  m.impl("output_again", output_again_op<output_again>);
}

}  // namespace fastrnn
