// The ops recurrent and cell under torch.func's vmap, where that comes to the ops themselves: in
// plain calls of a module, and in programs that were exported or compiled. The rest is in
// fastrnn/_transform_rules.py.
#include "vmap.h"

#include <ATen/ops/movedim.h>
#include <torch/library.h>

#include "cell.h"
#include "reference.h"
#include "signatures.h"

namespace fastrnn {
namespace {

using at::Tensor;
using at::functorch::makeBatched;
using at::functorch::maybeGetBatchedImpl;

// Samples folded into the batch, so that one fused run serves them all. Row n of sample v becomes
// row n * V + v: the rows of a step of a packed sequence stay its first. Its twin in
// fastrnn/_transform_arguments.py folds where the rules in Python run.
class Fold {
 public:
  Fold(Samples samples, bool has_rows) : samples_(std::move(samples)), has_rows_(has_rows) {}

  // A tensor whose rows are along `axis`, with those of all samples.
  Tensor join(const Tensor& tensor, int64_t axis) const {
    const int64_t place = axis + has_rows_;
    if (level_of(tensor) == samples_.level) {
      const auto* const batched = maybeGetBatchedImpl(tensor);
      return batched->value().movedim(batched->bdim(), place).flatten(axis, place);
    }
    const Tensor one = tensor.unsqueeze(place);
    c10::SymDimVector sizes(one.sym_sizes());
    sizes[place] = samples_.count;
    return one.expand_symint(sizes).flatten(axis, place);
  }
  OptionalTensor join(const OptionalTensor& state, int64_t axis) const {
    return state.has_value() ? OptionalTensor(join(*state, axis)) : std::nullopt;
  }

  // A result whose rows are along `axis`, as each sample has it.
  Tensor split(const Tensor& rows, int64_t axis) const {
    if (!has_rows_) return makeBatched(rows, axis, samples_.level);
    c10::SymDimVector sizes(rows.sym_sizes());
    sizes[axis] /= samples_.count;
    sizes.insert(sizes.begin() + axis + 1, samples_.count);
    return makeBatched(rows.view_symint(sizes), axis + 1, samples_.level);
  }

 private:
  Samples samples_;
  bool has_rows_;  // whether the tensors of one sample have rows, N
};

std::tuple<Tensor, Tensor, Tensor> recurrent(c10::string_view mode, const Tensor& x,
                                             const OptionalTensor& batch_sizes,
                                             const OptionalTensor& h0, const OptionalTensor& c0,
                                             at::TensorList weights, int64_t num_layers,
                                             bool has_biases, bool bidirectional, bool batch_first,
                                             double dropout) {
  static const auto op = find_op<RecurrentSignature>("fastrnn::recurrent");
  const Inputs inputs{x, batch_sizes, h0, c0, weights};
  const std::optional<Samples> samples = find_folded(inputs, dropout);
  if (!samples.has_value()) {
    return recurrent_reference({mode, num_layers, has_biases, bidirectional, batch_first, dropout},
                               inputs);
  }
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "fastrnn: x must have 2 or 3 dimensions, got ",
              x.dim());
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  const bool packed = batch_sizes.has_value(), has_rows = packed || x.dim() == 3;
  const bool rows_first = has_rows && batch_first;
  const int64_t axis = packed || rows_first ? 0 : 1;
  const Fold fold(*samples, has_rows);
  const auto [y, h_n, c_n] = op.call(
      mode, fold.join(x, axis),
      packed ? OptionalTensor(batch_sizes->mul(samples->count)) : std::nullopt, fold.join(h0, 1),
      fold.join(c0, 1), weights, num_layers, has_biases, bidirectional, rows_first, dropout);
  return {fold.split(y, axis), fold.split(h_n, 1), mode == "LSTM" ? fold.split(c_n, 1) : c_n};
}

std::tuple<Tensor, Tensor> cell(c10::string_view mode, const Tensor& x, const OptionalTensor& h0,
                                const OptionalTensor& c0, at::TensorList weights, bool has_biases) {
  static const auto op = find_op<CellSignature>("fastrnn::cell");
  const std::optional<Samples> samples = find_folded({x, {}, h0, c0, weights}, /*dropout=*/0);
  if (!samples.has_value()) return cell_of_recurrent(mode, x, h0, c0, weights, has_biases);
  check_cell_input(x);
  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  const Fold fold(*samples, /*has_rows=*/x.dim() == 2);
  const auto [h, c] =
      op.call(mode, fold.join(x, 0), fold.join(h0, 0), fold.join(c0, 0), weights, has_biases);
  return {fold.split(h, 0), mode == "LSTM" ? fold.split(c, 0) : c};
}

}  // namespace

// What the alias of composite ops does not reach.
TORCH_LIBRARY_IMPL(fastrnn, FuncTorchBatchedDecomposition, m) {
  m.impl("recurrent", recurrent);
  m.impl("cell", cell);
}

}  // namespace fastrnn
