// The ops under torch.func's vmap. Samples of inputs and states are folded into the batch, and one
// fused run serves them all; where the weights are each sample's own, each has a run.
#include "vmap.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/TensorWrapper.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include "buffers.h"
#include "cell.h"
#include "reference.h"
#include "reserve.h"
#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;
using at::functorch::makeBatched;
using at::functorch::maybeGetBatchedImpl;
using Tensors = std::vector<Tensor>;

// One result of every sample. Plain ones are copied to their place at once, while they are in the
// cache, and leave their memory to the next sample's.
class Column {
 public:
  explicit Column(int64_t samples) : samples_(samples) {}

  void add(const Tensor& result) {
    if (count_ == 0 && is_plain(result)) {
      std::vector<int64_t> sizes = result.sizes().vec();
      sizes.insert(sizes.begin(), samples_);
      all_ = at::empty(sizes, result.options());
    }
    if (all_.defined()) {
      all_.select(0, count_).copy_(result);
    } else {
      results_.push_back(result);
    }
    ++count_;
  }
  Tensor stacked() const { return all_.defined() ? all_ : at::stack(results_); }

 private:
  // Neither differentiated nor seen by another transform, mode or tracer.
  static bool is_plain(const Tensor& result) {
    return !result.requires_grad() && !in_forward_ad() && !at::isTensorSubclassLike(result);
  }

  int64_t samples_, count_ = 0;
  Tensor all_;
  Tensors results_;
};

// The samples of the level of vmap whose turn it is.
class Samples {
 public:
  Samples() {
    const auto layer = at::functorch::maybeCurrentDynamicLayer();
    TORCH_CHECK(layer.has_value() && layer->key() == at::functorch::TransformType::Vmap,
                "a tensor has left the function under torch.func.vmap that it belongs to");
    level_ = layer->layerId();
    count_ = layer->batchSize();
  }

  const c10::SymInt& count() const { return count_; }
  bool has(const Tensor& tensor) const { return tensor.defined() && level_of(tensor) == level_; }
  bool has_any(at::TensorList tensors) const {
    return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& t) { return has(t); });
  }

  // A result whose samples are along `dim`.
  Tensor batch(const Tensor& result, int64_t dim) const { return makeBatched(result, dim, level_); }

  // Calls run(arguments) for each sample's and stacks the results. Of no samples, they are none of
  // what one sample of zeros gives.
  template <typename Run>
  Tensors run_each(const Tensors& arguments, const Run& run) const {
    const int64_t count = count_.guard_int(__FILE__, __LINE__);
    const int64_t runs = std::max<int64_t>(count, 1);
    std::vector<Column> columns;
    for (int64_t v = 0; v < runs; ++v) {
      Tensors sample;
      for (const Tensor& tensor : arguments) {
        sample.push_back(!has(tensor) ? tensor : count > 0 ? select(tensor, v) : sum(tensor));
      }
      const Tensors results = run(sample);
      columns.resize(results.size(), Column(runs));
      for (size_t i = 0; i < results.size(); ++i) columns[i].add(results[i]);
    }
    Tensors results;
    for (const Column& column : columns) {
      results.push_back(batch(column.stacked().narrow(0, 0, count), 0));
    }
    return results;
  }

 private:
  static Tensor select(const Tensor& tensor, int64_t v) {
    const auto* const batched = maybeGetBatchedImpl(tensor);
    return batched->value().select(batched->bdim(), v);
  }
  static Tensor sum(const Tensor& tensor) {
    const auto* const batched = maybeGetBatchedImpl(tensor);
    return batched->value().sum(batched->bdim());
  }

  int64_t level_;
  c10::SymInt count_;
};

// Samples folded into the batch. Row n of sample v becomes row n * V + v: the rows of a step of a
// packed sequence stay its first.
class Fold {
 public:
  Fold(const Samples& samples, bool has_rows) : samples_(samples), has_rows_(has_rows) {}

  // A tensor whose rows are along `axis`, with those of all samples.
  Tensor join(const Tensor& tensor, int64_t axis) const {
    const int64_t place = axis + has_rows_;
    if (samples_.has(tensor)) {
      const auto* const batched = maybeGetBatchedImpl(tensor);
      return batched->value().movedim(batched->bdim(), place).flatten(axis, place);
    }
    const Tensor one = tensor.unsqueeze(place);
    c10::SymDimVector sizes(one.sym_sizes());
    sizes[place] = samples_.count();
    return one.expand_symint(sizes).flatten(axis, place);
  }
  OptionalTensor join(const OptionalTensor& tensor, int64_t axis) const {
    return tensor.has_value() ? OptionalTensor(join(*tensor, axis)) : std::nullopt;
  }

  // A result whose rows are along `axis`, as each sample has it.
  Tensor split(const Tensor& rows, int64_t axis) const {
    if (!has_rows_) return samples_.batch(rows, axis);
    c10::SymDimVector sizes(rows.sym_sizes());
    sizes[axis] /= samples_.count();
    sizes.insert(sizes.begin() + axis + 1, samples_.count());
    return samples_.batch(rows.view_symint(sizes), axis + 1);
  }

 private:
  const Samples& samples_;
  bool has_rows_;  // whether the tensors of one sample have rows, N
};

// How a stack's call is folded.
struct FoldedCall {
  bool packed, has_rows;
  int64_t axis;       // of rows in x and y; without rows, of samples
  int64_t mask_axis;  // likewise, in the masks

  FoldedCall(const Inputs& inputs, bool batch_first) : packed(inputs.batch_sizes.has_value()) {
    const int64_t dims = inputs.x.dim();
    TORCH_CHECK(dims == 2 || dims == 3, "fastrnn: x must have 2 or 3 dimensions, got ", dims);
    has_rows = packed || dims == 3;
    axis = packed || batch_first ? 0 : 1;
    mask_axis = packed ? 1 : 2;
  }
  OptionalTensor sizes(const Inputs& inputs, const Samples& samples) const {
    return packed ? OptionalTensor(inputs.batch_sizes->mul(samples.count())) : std::nullopt;
  }
};

// To call an op below this level of vmap.
struct Below {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKey::FuncTorchBatched};
};

// One sample's call, of which `all` begins as list_all.
struct SampleCall {
  OptionalTensor h0, c0, masks;
  Inputs inputs;

  SampleCall(const Inputs& of_all, at::TensorList all)
      : h0(optional(all[kH0])),
        c0(optional(all[kC0])),
        masks(optional(all[kFirstWeight + of_all.weights.size()])),
        inputs{all[kX], of_all.batch_sizes, h0, c0, all.slice(kFirstWeight, of_all.weights.size()),
               masks} {}
  SampleCall(const SampleCall&) = delete;
};

// recurrent or recurrent_forward, as `run` calls it. Results beyond y, h_n and c_n are all samples'
// together: a reserve.
template <typename Run>
Tensors run_samples(const Options& options, const Inputs& inputs, const Run& run) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const Samples samples;
  TORCH_CHECK(!samples.has(tensor_of(batch_sizes)),
              "fastrnn: batch_sizes must be the same for all samples of vmap");
  const Tensors all = list_all(inputs);
  const Below below;
  if (!samples.has_any(all)) return run(inputs);
  if (samples.count() == 0 || samples.has_any(weights)) {
    return samples.run_each(
        all, [&](const Tensors& one) { return run(SampleCall(inputs, one).inputs); });
  }
  const FoldedCall call(inputs, options.batch_first);
  const Fold fold(samples, call.has_rows);
  Tensors results = run({fold.join(x, call.axis), call.sizes(inputs, samples), fold.join(h0, 1),
                         fold.join(c0, 1), weights, fold.join(masks, call.mask_axis)});
  results[0] = fold.split(results[0], call.axis);
  results[1] = fold.split(results[1], 1);
  if (options.mode == "LSTM") results[2] = fold.split(results[2], 1);
  return results;
}

std::tuple<Tensor, Tensor, Tensor> recurrent(const Options& options, const Inputs& inputs) {
  const Tensors results = run_samples(options, inputs, [&](const Inputs& given) {
    const auto [y, h_n, c_n] = call_recurrent(options, given);
    return Tensors{y, h_n, c_n};
  });
  return {results[0], results[1], results[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_forward(const Options& options,
                                                             const Inputs& inputs) {
  const Tensors results = run_samples(options, inputs, [&](const Inputs& given) {
    const auto [y, h_n, c_n, reserve] = call_forward(options, given);
    return Tensors{y, h_n, c_n, reserve};
  });
  return {results[0], results[1], results[2], results[3]};
}

// The reserve for a batch with so many copies of each row. Levels of vmap whose turn is yet to come
// have folded samples of their own into the rows of the one given.
Tensor repeat_folded_rows(const Options& options, const Inputs& inputs, const Tensor& reserve,
                          const c10::SymInt& count) {
  const OptionalTensor sizes = unwrapped(inputs.batch_sizes);
  const Stack stack = check_arguments(
      options, {inputs.x, sizes, inputs.h0, inputs.c0, inputs.weights, inputs.masks});
  if (stack.reserve_size() == 0) return reserve;
  const c10::SymInt folded = reserve.sym_numel() / stack.reserve_size();
  Tensors parts;
  const ReserveParts<Tensor> repeated(stack, [&](int64_t offset, int64_t width) {
    parts.push_back(reserve.narrow_symint(0, folded * offset, folded * stack.rows * width)
                        .view_symint({stack.rows, 1, folded * width})
                        .expand_symint({stack.rows, count, folded * width})
                        .flatten());
    return parts.back();
  });
  return at::cat(parts);
}

Tensors recurrent_backward(const Options& options, const Inputs& inputs,
                           const OutputGradients& of_outputs, const Tensor& y,
                           const Tensor& reserve, const c10::List<bool>& needs,
                           const std::optional<c10::SymInt>& given_samples) {
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const auto& [dy, dh_n, dc_n] = of_outputs;
  Tensors all = list_all(inputs);
  const size_t of_call = all.size();
  const Tensors rest = {tensor_of(dy), tensor_of(dh_n), tensor_of(dc_n), y, reserve};
  all.insert(all.end(), rest.begin(), rest.end());
  const Samples samples;
  const Below below;
  if (!samples.has_any(all)) {
    return call_backward(options, inputs, of_outputs, y, reserve, needs, given_samples);
  }
  // A reserve of each sample's own is what forward leaves where the weights are.
  if (samples.count() == 0 || samples.has_any(weights) || samples.has(reserve)) {
    return samples.run_each(all, [&](const Tensors& one) {
      const at::TensorList gradients = at::TensorList(one).slice(of_call);
      return call_backward(options, SampleCall(inputs, one).inputs, as_gradients(gradients),
                           gradients[3], gradients[4], needs, given_samples);
    });
  }
  const FoldedCall call(inputs, options.batch_first);
  const Fold fold(samples, call.has_rows);
  const c10::SymInt& count = samples.count();
  const Tensors of_forward = list_all(inputs);
  // Where other levels' samples are folded into the shared reserve, the op cannot tell them apart.
  const bool is_folded = !samples.has_any(of_forward) &&
                         std::any_of(of_forward.begin(), of_forward.end(), [](const Tensor& t) {
                           return t.defined() && level_of(unwrapped(t)) > 0;
                         });
  const Tensor kept = is_folded ? repeat_folded_rows(options, inputs, reserve, count) : reserve;
  const OptionalTensor dc = options.mode == "LSTM" ? fold.join(dc_n, 1) : std::nullopt;
  Tensors results =
      call_backward(options,
                    {fold.join(x, call.axis), call.sizes(inputs, samples), fold.join(h0, 1),
                     fold.join(c0, 1), weights, fold.join(masks, call.mask_axis)},
                    {fold.join(dy, call.axis), fold.join(dh_n, 1), dc}, fold.join(y, call.axis),
                    kept, needs, given_samples.has_value() ? *given_samples * count : count);
  size_t i = 0;
  if (needs[kX]) results[i] = fold.split(results[i], call.axis), ++i;
  if (needs[kH0] && h0.has_value()) results[i] = fold.split(results[i], 1), ++i;
  if (needs[kC0] && c0.has_value()) results[i] = fold.split(results[i], 1), ++i;
  for (; i < results.size(); ++i) {
    results[i] = given_samples.has_value()
                     ? samples.batch(results[i].unflatten_symint(0, {*given_samples, count}), 1)
                     : samples.batch(results[i], 0);
  }
  return results;
}

std::tuple<Tensor, Tensor> cell(c10::string_view mode, const Tensor& x, const OptionalTensor& h0,
                                const OptionalTensor& c0, at::TensorList weights, bool has_biases) {
  const Inputs inputs{x, {}, h0, c0, weights};
  check_cell_input(x);
  const Samples samples;
  const Tensors all = list(inputs);
  const Below below;
  if (!samples.has_any(all)) return call_cell(mode, inputs, has_biases);
  if (samples.count() == 0 || samples.has_any(weights)) {
    const Tensors results = samples.run_each(all, [&](const Tensors& one) {
      const auto [h, c] = call_cell(mode,
                                    {one[kX],
                                     {},
                                     optional(one[kH0]),
                                     optional(one[kC0]),
                                     at::TensorList(one).slice(kFirstWeight)},
                                    has_biases);
      return Tensors{h, c};
    });
    return {results[0], results[1]};
  }
  const Fold fold(samples, /*has_rows=*/x.dim() == 2);
  const auto [h, c] = call_cell(
      mode, {fold.join(x, 0), {}, fold.join(h0, 0), fold.join(c0, 0), weights}, has_biases);
  return {fold.split(h, 0), mode == "LSTM" ? fold.split(c, 0) : c};
}

}  // namespace

Tensor unwrapped(Tensor tensor) {
  while (const auto* const wrapper = at::functorch::maybeGetTensorWrapper(tensor)) {
    tensor = wrapper->value();
  }
  return tensor;
}

// What the alias of composite ops does not reach.
TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatchedDecomposition, m) {
  m.impl("recurrent", run_op<recurrent>);
  m.impl("recurrent_forward", run_op<recurrent_forward>);
  m.impl("recurrent_backward", backward_op<recurrent_backward>);
  m.impl("cell", cell);
}

}  // namespace fastrnn
