// The op cell: one step of one layer, which is a stack of one step.
#include <ATen/ops/empty.h>
#include <ATen/ops/unsqueeze_native.h>
#include <torch/library.h>

#include "cell.h"
#include "signatures.h"
#include "stack.h"

namespace fastrnn {
namespace {

using at::Tensor;

// Inference: y and h_n are the same numbers, and so the same memory.
std::tuple<Tensor, Tensor> cell_cpu(c10::string_view mode, const Tensor& x,
                                    const OptionalTensor& h0, const OptionalTensor& c0,
                                    at::TensorList weights, bool has_biases) {
  // A call of a small cell takes a few microseconds: views past the dispatcher are worth it.
  const auto stacked = [](const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(at::native::unsqueeze(*t, 0)) : std::nullopt;
  };
  check_cell_input(x);
  const Tensor sequence = at::native::unsqueeze(x, 0);
  const OptionalTensor h_start = stacked(h0), c_start = stacked(c0);
  const OptionalTensor no_sizes;
  const Inputs inputs{sequence, no_sizes, h_start, c_start, weights};
  const Stack stack = check_arguments({mode, /*num_layers=*/1, has_biases, /*bidirectional=*/false,
                                       /*batch_first=*/false},
                                      inputs);
  TORCH_CHECK(!stack.projected, "fastrnn: a cell has no projection");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = stack.hidden;
  const Tensor h = at::empty(sizes, x.options());
  const Tensor c =
      stack.cell == Cell::lstm ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  if (stack.rows > 0) run_forward(stack, inputs, {h, h, c, /*reserve=*/{}});
  return {h, c};
}

std::tuple<Tensor, Tensor> cell_autograd(c10::string_view mode, const Tensor& x,
                                         const OptionalTensor& h0, const OptionalTensor& c0,
                                         at::TensorList weights, bool has_biases) {
  const Inputs inputs{x, {}, h0, c0, weights};
  if (wants_gradient(inputs) || wants_tangent(inputs)) {
    return cell_of_recurrent(mode, x, h0, c0, weights, has_biases);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_cell(mode, inputs, has_biases);
}

}  // namespace

std::tuple<Tensor, Tensor> cell_of_recurrent(c10::string_view mode, const Tensor& x,
                                             const OptionalTensor& h0, const OptionalTensor& c0,
                                             at::TensorList weights, bool has_biases) {
  return run_cell(call_recurrent, mode, x, h0, c0, weights, has_biases);
}

// x: (N, I) or (I); h0 and c0 (N, H), both without N if x is; zeros where none. weights: weight_ih,
// weight_hh and, with biases, bias_ih and bias_hh. Returns h and c; c is empty for Elman.
TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def(
      "cell(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool has_biases) "
      "-> (Tensor h, Tensor c)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) { m.impl("cell", cell_of_recurrent); }
TORCH_LIBRARY_IMPL(fastrnn, AutogradCPU, m) { m.impl("cell", cell_autograd); }
TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("cell", cell_cpu); }

}  // namespace fastrnn
