// What the ops accept. Every refusal begins with "fastrnn:", by which fastrnn/_fused.py tells it
// from a failure; one of a weight matrix with "fastrnn: weight", which fastrnn/modules.py looks
// for.
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "buffers.h"
#include "contention.h"
#include "distance.h"

namespace fastrnn {
namespace {

Cell parse_mode(c10::string_view mode) {
  if (mode == "LSTM") return Cell::lstm;
  if (mode == "RNN_TANH") return Cell::rnn_tanh;
  if (mode == "RNN_RELU") return Cell::rnn_relu;
  TORCH_CHECK(false, "fastrnn: mode must be LSTM, RNN_TANH or RNN_RELU, got ", mode);
}

void check_kind(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK(tensor.defined(), "fastrnn: ", name, " is undefined");
  TORCH_CHECK(tensor.device() == x.device(), "fastrnn: ", name, " is on ", tensor.device(),
              ", x on ", x.device());
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "fastrnn: ", name, " is ",
              tensor.scalar_type(), ", x is ", x.scalar_type());
  TORCH_CHECK(tensor.layout() == at::kStrided, "fastrnn: ", name, " must be a dense tensor");
}

// A size as a number; one that a compiler leaves open, and that numbers alone are computed with
// here, becomes the one that it has seen.
int64_t size_of(const at::Tensor& tensor, int64_t dimension) {
  const c10::SymIntArrayRef sizes = tensor.sym_sizes();
  const c10::SymInt& size = sizes[dimension < 0 ? dimension + tensor.dim() : dimension];
  return size.is_heap_allocated() ? size.guard_int(__FILE__, __LINE__) : size.as_int_unchecked();
}

void check_sizes(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes,
                 const char* reason = "") {
  const c10::SymIntArrayRef found = tensor.sym_sizes();
  const std::optional<at::IntArrayRef> numbers = c10::asIntArrayRefSlowOpt(found);
  TORCH_CHECK(numbers ? *numbers == sizes
                      : std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()),
              "fastrnn: ", name, " must have size ", sizes, reason, ", got ", found);
}

void parse_batch_sizes(const at::Tensor& batch_sizes, Stack& stack) {
  TORCH_CHECK(batch_sizes.defined() && batch_sizes.device().is_cpu() &&
                  batch_sizes.scalar_type() == at::kLong && batch_sizes.dim() == 1 &&
                  batch_sizes.layout() == at::kStrided,
              "fastrnn: batch_sizes must be a one-dimensional int64 tensor on the CPU");
  stack.steps = size_of(batch_sizes, 0);
  TORCH_CHECK(stack.steps > 0, "fastrnn: batch_sizes is empty");
  // Before they are copied: an expanded tensor has any number of elements.
  TORCH_CHECK(stack.steps <= stack.rows, "fastrnn: batch_sizes has ", stack.steps,
              " elements, and x ", stack.rows, " rows");
  check_memory(batch_sizes);
  const at::Tensor contiguous = batch_sizes.contiguous();
  const int64_t* sizes = contiguous.const_data_ptr<int64_t>();
  stack.batch_sizes.assign(sizes, sizes + stack.steps);
  stack.offsets.resize(stack.steps);
  // The copy is checked: another thread may write to the tensor.
  stack.batch = stack.batch_sizes[0];
  int64_t total = 0, before = stack.batch;
  for (int64_t t = 0; t < stack.steps; ++t) {
    const int64_t rows = stack.batch_sizes[t];
    TORCH_CHECK(rows > 0 && rows <= before,
                "fastrnn: batch_sizes must be positive and must not increase");
    stack.offsets[t] = total;
    total += rows;
    before = rows;
    TORCH_CHECK(total <= stack.rows, "fastrnn: batch_sizes add up to more than the ", stack.rows,
                " rows of x");
  }
  TORCH_CHECK(total == stack.rows, "fastrnn: batch_sizes add up to ", total, ", x has ", stack.rows,
              " rows");
}

// Steps, rows and I.
void parse_input(const Inputs& inputs, bool batch_first, Stack& stack) {
  const at::Tensor& x = inputs.x;
  TORCH_CHECK(x.defined(), "fastrnn: x is undefined");
  TORCH_CHECK(is_fused(x.scalar_type()),
              "fastrnn: x must be float32, float64, float16 or bfloat16, got ", x.scalar_type());
  check_kind("x", x, x);
  stack.packed = inputs.batch_sizes.has_value();
  TORCH_CHECK(x.dim() == 2 || (x.dim() == 3 && !stack.packed), "fastrnn: x must have ",
              stack.packed ? "2 dimensions, as it is packed" : "2 or 3 dimensions", ", got ",
              x.dim());
  stack.input = size_of(x, -1);
  stack.batched = stack.packed || x.dim() == 3;
  stack.batch_first = batch_first && x.dim() == 3;
  if (stack.packed) {
    stack.rows = size_of(x, 0);
    parse_batch_sizes(*inputs.batch_sizes, stack);
  } else {
    stack.steps = size_of(x, stack.batch_first ? 1 : 0);
    stack.batch = stack.batched ? size_of(x, stack.batch_first ? 0 : 1) : 1;
    stack.rows = stack.steps * stack.batch;
    TORCH_CHECK(stack.steps > 0, "fastrnn: x has no steps");
  }
}

// Layers, H and P.
void parse_weights(const Inputs& inputs, int64_t num_layers, Stack& stack) {
  const at::TensorList weights = inputs.weights;
  const int64_t count = static_cast<int64_t>(weights.size());
  TORCH_CHECK(num_layers > 0 && num_layers <= count, "fastrnn: ", num_layers, " layers, but ",
              count, " weights");
  stack.layers = num_layers;
  const int64_t unprojected_count = stack.strands() * stack.weights_per_strand();
  stack.projected = stack.cell == Cell::lstm && count == unprojected_count + stack.strands();
  TORCH_CHECK(stack.projected || count == unprojected_count, "fastrnn: expected ",
              unprojected_count, " weights, got ", count);

  for (const at::Tensor& weight : weights) check_kind("a weight", weight, inputs.x);
  TORCH_CHECK(weights[1].dim() == 2, "fastrnn: weight_hh must have 2 dimensions");
  const int64_t gate_rows = size_of(weights[1], 0), gates = gate_count(stack.cell);
  stack.hidden = gate_rows / gates;
  stack.width = stack.projected ? size_of(weights[1], 1) : stack.hidden;
  TORCH_CHECK(stack.hidden > 0 && gate_rows % gates == 0 && stack.width > 0,
              "fastrnn: weight_hh must have ", gates, " rows for each unit, and columns, got size ",
              weights[1].sizes());
  TORCH_CHECK(stack.input > 0, "fastrnn: x must have features");
  const int64_t per_strand = stack.weights_per_strand();
  for (int64_t i = 0; i < stack.strands(); ++i) {
    const at::TensorList strand = weights.slice(i * per_strand, per_strand);
    check_sizes("weight_ih", strand[0], {stack.gates(), stack.layer_input(i / stack.directions)},
                i < stack.directions ? " for the features of x" : "");
    check_sizes("weight_hh", strand[1], {stack.gates(), stack.width});
    if (stack.has_biases) {
      check_sizes("bias_ih", strand[2], {stack.gates()});
      check_sizes("bias_hh", strand[3], {stack.gates()});
    }
    if (stack.projected) {
      check_sizes("weight_hr", strand[per_strand - 1], {stack.width, stack.hidden});
    }
  }
}

void check_states(const Inputs& inputs, const Stack& stack) {
  if (inputs.h0.has_value()) {
    check_kind("h0", *inputs.h0, inputs.x);
    check_sizes("h0", *inputs.h0, stack.state_sizes(stack.width));
  }
  if (inputs.c0.has_value()) {
    TORCH_CHECK(stack.cell == Cell::lstm, "fastrnn: only an LSTM has c0");
    check_kind("c0", *inputs.c0, inputs.x);
    check_sizes("c0", *inputs.c0, stack.state_sizes(stack.hidden));
  }
}

void check_masks(const Inputs& inputs, double dropout, Stack& stack) {
  TORCH_CHECK(dropout >= 0 && dropout <= 1, "fastrnn: dropout must be in [0, 1], got ", dropout);
  stack.dropout = dropout;
  stack.drops = inputs.masks.has_value();
  if (!stack.drops) return;
  const at::Tensor& masks = *inputs.masks;
  TORCH_CHECK(masks.defined() && masks.device() == inputs.x.device() &&
                  masks.scalar_type() == at::kBool && masks.layout() == at::kStrided,
              "fastrnn: masks must be a dense tensor of bool on ", inputs.x.device());
  std::vector<int64_t> sizes = stack.output_sizes();
  if (stack.batch_first) std::swap(sizes[0], sizes[1]);
  sizes.insert(sizes.begin(), stack.layers - 1);
  check_sizes("masks", masks, sizes);
}

}  // namespace

Stack check_arguments(const Options& options, const Inputs& inputs) {
  Stack stack{};
  stack.cell = parse_mode(options.mode);
  stack.directions = options.bidirectional ? 2 : 1;
  stack.has_biases = options.has_biases;
  stack.contended = cores_contended();
  stack.distant = cores_distant();
  parse_input(inputs, options.batch_first, stack);
  parse_weights(inputs, options.num_layers, stack);
  check_states(inputs, stack);
  check_masks(inputs, options.dropout, stack);
  // Nothing that is computed below may overflow: the largest buffer is the reserve. In double, in
  // which the product itself cannot.
  const double elements = static_cast<double>(stack.rows) * static_cast<double>(stack.strands()) *
                          static_cast<double>(stack.layer_width() + 6 * stack.hidden);
  TORCH_CHECK(elements < 0x1p59, "fastrnn: x is too large");
  return stack;
}

std::vector<int64_t> Stack::output_sizes() const {
  if (packed) return {rows, layer_width()};
  if (!batched) return {steps, layer_width()};
  if (batch_first) return {batch, steps, layer_width()};
  return {steps, batch, layer_width()};
}

std::vector<int64_t> Stack::state_sizes(int64_t state_width) const {
  if (!batched) return {strands(), state_width};
  return {strands(), batch, state_width};
}

// The layout is that of ReserveParts, in reserve.h.
int64_t Stack::reserve_size() const {
  const int64_t per_strand = (cell == Cell::lstm ? 5 * hidden : 0) + (projected ? hidden : 0);
  return rows * (strands() * per_strand + (layers - 1) * layer_width());
}

}  // namespace fastrnn
