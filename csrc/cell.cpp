// The op cell: one step of one layer, which is a stack of one step.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "signatures.h"
#include "stack.h"

namespace fastrnn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using CellSignature = std::tuple<Tensor, Tensor>(c10::string_view, const Tensor&,
                                                 const OptionalTensor&, const OptionalTensor&,
                                                 at::TensorList, bool);

OptionalTensor as_sequence(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->unsqueeze(0)) : std::nullopt;
}

Tensor as_sequence(const Tensor& x) {
  TORCH_CHECK(x.dim() == 1 || x.dim() == 2, "fastrnn: x has ", x.dim(), " dimensions");
  return x.unsqueeze(0);
}

// Made of recurrent and views: for all dispatch keys but those below.
std::tuple<Tensor, Tensor> cell(c10::string_view mode, const Tensor& x, const OptionalTensor& h0,
                                const OptionalTensor& c0, at::TensorList weights, bool has_biases) {
  static const auto op = find_op<RecurrentSignature>("fastrnn::recurrent");
  const auto [y, h_n, c_n] =
      op.call(mode, as_sequence(x), std::nullopt, as_sequence(h0), as_sequence(c0), weights,
              /*num_layers=*/1, has_biases, /*bidirectional=*/false, /*batch_first=*/false,
              /*dropout=*/0);
  return {h_n.squeeze(0), mode == "LSTM" ? c_n.squeeze(0) : c_n};
}

// Inference: y and h_n are the same numbers, and so the same memory.
std::tuple<Tensor, Tensor> cell_cpu(c10::string_view mode, const Tensor& x,
                                    const OptionalTensor& h0, const OptionalTensor& c0,
                                    at::TensorList weights, bool has_biases) {
  const Tensor sequence = as_sequence(x);
  const OptionalTensor h_start = as_sequence(h0), c_start = as_sequence(c0);
  const Stack stack = check_arguments(mode, sequence, std::nullopt, h_start, c_start, weights,
                                      /*num_layers=*/1, has_biases, /*bidirectional=*/false,
                                      /*batch_first=*/false, /*dropout=*/0);
  TORCH_CHECK(!stack.projected, "fastrnn: a cell has no projection");
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = stack.hidden;
  const Tensor h = at::empty(sizes, x.options());
  const Tensor c =
      stack.cell == Cell::lstm ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  if (stack.rows > 0) run_forward(stack, sequence, h_start, c_start, weights, h, h, c, {});
  return {h, c};
}

std::tuple<Tensor, Tensor> cell_autograd(c10::string_view mode, const Tensor& x,
                                         const OptionalTensor& h0, const OptionalTensor& c0,
                                         at::TensorList weights, bool has_biases) {
  static const auto op = find_op<CellSignature>("fastrnn::cell");
  if (wants_gradient(x, h0, c0, weights)) return cell(mode, x, h0, c0, weights, has_biases);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(mode, x, h0, c0, weights, has_biases);
}

}  // namespace

// x: (N, I) or (I); h0 and c0 (N, H), both without N if x is; zeros where none. weights: weight_ih,
// weight_hh and, with biases, bias_ih and bias_hh. Returns h and c; c is empty for Elman.
TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def(
      "cell(str mode, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool has_biases) "
      "-> (Tensor h, Tensor c)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) { m.impl("cell", cell); }
TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) { m.impl("cell", cell); }
TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) { m.impl("cell", cell); }
TORCH_LIBRARY_IMPL(fastrnn, AutogradCPU, m) { m.impl("cell", cell_autograd); }
TORCH_LIBRARY_IMPL(fastrnn, CPU, m) { m.impl("cell", cell_cpu); }

}  // namespace fastrnn
