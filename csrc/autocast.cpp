// The ops recurrent and cell under autocast: computed in the lower precision, with outputs of the
// dtypes that torch.nn's modules have there. Transforms, which come before autocast, cast their
// tensors themselves (fastrnn/_transforms.py), and by the op below their outputs.
#include <ATen/Context.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "buffers.h"
#include "cell.h"
#include "signatures.h"
#include "stack.h"

namespace fastrnn {
namespace {

using at::ScalarType;
using at::Tensor;

struct Dtypes {
  ScalarType y, c_n;  // h_n is like y
};

// Whether torch.nn.LSTM leaves an input of that dtype to oneDNN, whose outputs are all of the lower
// precision.
bool is_onednn(ScalarType x) {
  if (!at::hasMKLDNN()) return false;  // nor is there the op below
  // At the CPU's key: a tracer, which comes before it, refuses an op that returns a bool.
  static const bool has_bf16 = find_op<bool()>("mkldnn::_is_mkldnn_bf16_supported")
                                   .redispatch(c10::DispatchKeySet(c10::DispatchKey::CPU));
  // For float32 input it raises where the processor lacks what it needs; the dtype is the same.
  return at::globalContext().userEnabledMkldnn() &&
         (x == at::kFloat || (x == at::kBFloat16 && has_bf16));
}

// Whether torch.nn.LSTM takes input for a padded batch: also packed sequences of one length. Of
// sizes that are no numbers yet, as while a compiler traces, it is not known.
bool is_padded(const OptionalTensor& batch_sizes) {
  if (!batch_sizes.has_value()) return true;
  const Tensor& sizes = *batch_sizes;
  if (!sizes.is_cpu() || sizes.scalar_type() != at::kLong || sizes.dim() != 1 ||
      at::isTensorSubclassLike(sizes) || sizes.numel() == 0) {
    return false;
  }
  check_memory(sizes);
  const auto rows = sizes.accessor<int64_t, 1>();
  return rows[0] == rows[rows.size(0) - 1];  // they do not increase
}

// What is cast is read before the op below checks it. A tracer's tensors have no memory, or not as
// many numbers as they say.
void check_plain_memory(const Tensor& tensor) {
  if (tensor.has_storage() && !at::isTensorSubclassLike(tensor)) check_memory(tensor);
}

// On a CPU torch.nn's products are of the lower precision, and the cell state stays as it was
// given. plain: padded, not empty, and not a cell's.
Dtypes cpu_dtypes(bool lstm, bool plain, bool projected, ScalarType x, ScalarType c0,
                  ScalarType lower) {
  if (!lstm || (plain && !projected && is_onednn(x))) return {lower, lower};
  const ScalarType state = c10::promoteTypes(lower, c0);
  return {projected ? lower : state, state};
}

// Outputs as torch.nn's modules give them. plain: padded, and not a cell's. x and c0: the dtypes of
// the arguments; where there was no c0, that of x.
std::tuple<Tensor, Tensor, Tensor> cast_outputs(bool lstm, bool plain, bool projected, ScalarType x,
                                                ScalarType c0, const Tensor& y, const Tensor& h_n,
                                                const Tensor& c_n) {
  // Autocast leaves float64 alone.
  const ScalarType lower =
      x == at::kDouble ? x : at::autocast::get_autocast_dtype(y.device().type());
  const bool is_empty = TORCH_GUARD_OR_FALSE(y.sym_numel().sym_eq(0));
  const Dtypes dtypes = y.is_cpu() ? cpu_dtypes(lstm, plain && !is_empty, projected, x, c0, lower)
                                   : Dtypes{lower, lower};
  return {y.to(dtypes.y), h_n.to(dtypes.y), c_n.to(dtypes.c_n)};
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> run(bool plain, const Options& options, const Inputs& inputs) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const c10::impl::ExcludeDispatchKeyGuard below(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const ScalarType lower = at::autocast::get_autocast_dtype(device);
  const ScalarType computed = is_fused(lower) ? lower : at::kFloat;
  const auto cast = [&](const Tensor& t) {
    check_plain_memory(t);
    return at::autocast::cached_cast(computed, t, device);
  };
  const auto cast_state = [&](const OptionalTensor& t) {
    return t.has_value() ? OptionalTensor(cast(*t)) : std::nullopt;
  };
  std::vector<Tensor> cast_weights;
  cast_weights.reserve(weights.size());
  for (const Tensor& weight : weights) cast_weights.push_back(cast(weight));
  const auto [y, h_n, c_n] = call_recurrent(
      options, {cast(x), batch_sizes, cast_state(h0), cast_state(c0), cast_weights, masks});

  const bool lstm = options.mode == "LSTM";
  const int64_t strands = options.num_layers * (options.bidirectional ? 2 : 1);
  const bool projected = lstm && static_cast<int64_t>(weights.size()) ==
                                     strands * weights_per_strand(options.has_biases, true);
  const ScalarType given = x.scalar_type();
  return cast_outputs(lstm, plain, projected, given, c0.has_value() ? c0->scalar_type() : given, y,
                      h_n, c_n);
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor> recurrent(const Options& options, const Inputs& inputs) {
  return run<device>(/*plain=*/is_padded(inputs.batch_sizes), options, inputs);
}

template <c10::DeviceType device>
std::tuple<Tensor, Tensor> cell(c10::string_view mode, const Tensor& x, const OptionalTensor& h0,
                                const OptionalTensor& c0, at::TensorList weights, bool has_biases) {
  const auto as_stack = [](const Options& options, const Inputs& inputs) {
    return run<device>(/*plain=*/false, options, inputs);
  };
  return run_cell(as_stack, mode, x, h0, c0, weights, has_biases);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastrnn, m) {
  m.def(
      "autocast_outputs(bool lstm, bool plain, bool projected, ScalarType x, ScalarType c0, "
      "Tensor y, Tensor h_n, Tensor c_n) -> (Tensor y, Tensor h_n, Tensor c_n)");
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeImplicitAutograd, m) {
  m.impl("autocast_outputs", cast_outputs);
}
// Under vmap, which the alias above does not reach.
TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatchedDecomposition, m) {
  m.impl("autocast_outputs", cast_outputs);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCPU, m) {
  m.impl("recurrent", run_op<recurrent<c10::DeviceType::CPU>>);
  m.impl("cell", cell<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(fastrnn, AutocastCUDA, m) {
  m.impl("recurrent", run_op<recurrent<c10::DeviceType::CUDA>>);
  m.impl("cell", cell<c10::DeviceType::CUDA>);
}

}  // namespace fastrnn
