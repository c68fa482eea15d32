// The ops: schemas, and their kernels for the CPU key. torch's dispatcher, autograd (autograd.cpp)
// and compiler (fastrnn/_fakes.py holds the fakes) meet here.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "buffers.h"

namespace fastrnn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct Outputs {
  Tensor y, h_n, c_n;
};

Outputs allocate_outputs(const Stack& stack, const Tensor& x) {
  return {at::empty(stack.output_sizes(), x.options()),
          at::empty(stack.state_sizes(stack.width), x.options()),
          stack.cell == Cell::lstm ? at::empty(stack.state_sizes(stack.hidden), x.options())
                                   : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> recurrent_cpu(c10::string_view mode, const Tensor& x,
                                                 const OptionalTensor& batch_sizes,
                                                 const OptionalTensor& h0, const OptionalTensor& c0,
                                                 at::TensorList weights, int64_t num_layers,
                                                 bool has_biases, bool bidirectional,
                                                 bool batch_first, double dropout) {
  const Stack stack = check_arguments(mode, x, batch_sizes, h0, c0, weights, num_layers, has_biases,
                                      bidirectional, batch_first, dropout);
  const Outputs out = allocate_outputs(stack, x);
  if (stack.rows > 0) run_forward(stack, x, h0, c0, weights, out.y, out.h_n, out.c_n, {});
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_forward_cpu(
    c10::string_view mode, const Tensor& x, const OptionalTensor& batch_sizes,
    const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights, int64_t num_layers,
    bool has_biases, bool bidirectional, bool batch_first, double dropout) {
  const Stack stack = check_arguments(mode, x, batch_sizes, h0, c0, weights, num_layers, has_biases,
                                      bidirectional, batch_first, dropout);
  const Outputs out = allocate_outputs(stack, x);
  const Tensor reserve = empty_buffer(stack.reserve_size(), x.options());
  if (stack.rows > 0) run_forward(stack, x, h0, c0, weights, out.y, out.h_n, out.c_n, reserve);
  return {out.y, out.h_n, out.c_n, reserve};
}

void check_gradient(const char* name, const OptionalTensor& gradient, const Tensor& x,
                    at::IntArrayRef sizes) {
  if (!gradient.has_value()) return;
  TORCH_CHECK(gradient->defined() && gradient->device() == x.device() &&
                  gradient->scalar_type() == x.scalar_type() && gradient->layout() == at::kStrided,
              "fastrnn: ", name, " must be a dense tensor like x");
  TORCH_CHECK(gradient->sizes() == sizes, "fastrnn: ", name, " must have size ", sizes, ", got ",
              gradient->sizes());
}

// A state's gradient, to be worked on: a copy of the one given, or zeros.
Tensor working_copy(const OptionalTensor& gradient, at::IntArrayRef sizes, const Tensor& x) {
  const at::TensorOptions options = x.options().dtype(compute_type(x.scalar_type()));
  if (!gradient.has_value()) return at::zeros(sizes, options);
  return at::empty(sizes, options).copy_(*gradient);
}

std::vector<Tensor> recurrent_backward_cpu(c10::string_view mode, const OptionalTensor& dy,
                                           const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                                           const Tensor& x, const OptionalTensor& batch_sizes,
                                           const OptionalTensor& h0, const OptionalTensor& c0,
                                           at::TensorList weights, const Tensor& reserve,
                                           int64_t num_layers, bool has_biases, bool bidirectional,
                                           bool batch_first, double dropout,
                                           const std::vector<bool>& needs) {
  const Stack stack = check_arguments(mode, x, batch_sizes, h0, c0, weights, num_layers, has_biases,
                                      bidirectional, batch_first, dropout);
  check_gradient("dy", dy, x, stack.output_sizes());
  const std::vector<int64_t> h_sizes = stack.state_sizes(stack.width);
  const std::vector<int64_t> c_sizes =
      stack.cell == Cell::lstm ? stack.state_sizes(stack.hidden) : std::vector<int64_t>{0};
  check_gradient("dh_n", dh_n, x, h_sizes);
  check_gradient("dc_n", dc_n, x, c_sizes);
  check_gradient("reserve", reserve, x, {stack.reserve_size()});
  TORCH_CHECK(reserve.is_contiguous(), "fastrnn: reserve must be contiguous");
  TORCH_CHECK(needs.size() == 3 + weights.size(), "fastrnn: needs must have ", 3 + weights.size(),
              " entries, got ", needs.size());

  const Tensor dh = working_copy(dh_n, h_sizes, x);
  const Tensor dc = working_copy(dc_n, c_sizes, x);
  const Tensor dx = needs[0] ? at::empty(x.sizes(), x.options()) : Tensor();
  std::vector<Tensor> dweights(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    // Without rows there is no run to fill them.
    if (needs[3 + i]) {
      dweights[i] = stack.rows > 0 ? at::empty(weights[i].sizes(), x.options())
                                   : at::zeros(weights[i].sizes(), x.options());
    }
  }
  if (stack.rows > 0) {
    run_backward(stack, dy.value_or(Tensor()), dh, dc, needs[1], x, h0, c0, weights, reserve, dx,
                 dweights);
  }
  std::vector<Tensor> wanted;
  if (needs[0]) wanted.push_back(dx);
  if (needs[1]) wanted.push_back(dh.to(x.scalar_type()));
  if (needs[2]) wanted.push_back(dc.to(x.scalar_type()));
  for (size_t i = 0; i < weights.size(); ++i) {
    if (needs[3 + i]) wanted.push_back(dweights[i]);
  }
  return wanted;
}

}  // namespace

// Dimensions are torch.nn's. x: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or, with
// batch_sizes, the data of a PackedSequence (rows, I). h0 (L * D, N, P) and c0 (L * D, N, H), both
// without N for unbatched x; zeros where none. weights: torch.nn's _flat_weights. dropout: 0 unless
// training. Returns y, h_n, c_n; c_n is empty for Elman.
TORCH_LIBRARY(fastrnn, m) {
  const std::vector<at::Tag> random = {at::Tag::nondeterministic_seeded,
                                       at::Tag::pt2_compliant_tag};
  m.def(
      "recurrent(str mode, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] "
      "weights, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first, float dropout) "
      "-> (Tensor y, Tensor h_n, Tensor c_n)",
      random);
  // As recurrent; the reserve holds what recurrent_backward needs, Stack::reserve_size() elements.
  m.def(
      "recurrent_forward(str mode, Tensor x, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor[] weights, int num_layers, bool has_biases, bool bidirectional, bool batch_first, "
      "float dropout) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor reserve)",
      random);
  // Gradients of x, h0, c0 and each weight; only those that needs asks for are returned, in this
  // order.
  m.def(
      "recurrent_backward(str mode, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, "
      "Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor reserve, "
      "int num_layers, bool has_biases, bool bidirectional, bool batch_first, float dropout, "
      "bool[] needs) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def("cpu_capability() -> str", cpu_capability);
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent", recurrent_cpu);
  m.impl("recurrent_forward", recurrent_forward_cpu);
  m.impl("recurrent_backward",
         [](c10::string_view mode, const OptionalTensor& dy, const OptionalTensor& dh_n,
            const OptionalTensor& dc_n, const Tensor& x, const OptionalTensor& batch_sizes,
            const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
            const Tensor& reserve, int64_t num_layers, bool has_biases, bool bidirectional,
            bool batch_first, double dropout, const c10::List<bool>& needs) {
           return recurrent_backward_cpu(mode, dy, dh_n, dc_n, x, batch_sizes, h0, c0, weights,
                                         reserve, num_layers, has_biases, bidirectional,
                                         batch_first, dropout, needs.vec());
         });
}

}  // namespace fastrnn
