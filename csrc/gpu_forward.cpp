// The forward pass of a stack on a GPU: for each layer the input projection of all steps, then the
// recurrence, persistent or step by step.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/record_function.h>

#include "dropout.h"
#include "gpu.h"

namespace fastrnn::gpu {
namespace {

// One layer; the launchers' arguments, and the tensors behind them.
struct Layer {
  cuda::ForwardArgs args;
  std::vector<Weights> weights;  // by direction
  at::Tensor h0;                 // (D, N, P)
  at::Tensor h_n;                // (D, N, P)
  at::Tensor output;             // (rows, D * P)
  at::Tensor unprojected[cuda::kDirections];
};

// False where the device refused.
bool run_persistent(const Stack& stack, const Layer& layer, const cuda::Teams& teams,
                    cuda::Stream stream) {
  RECORD_FUNCTION("fastrnn::persistent_forward", c10::ArrayRef<const c10::IValue>());
  const void* w_hh[cuda::kDirections] = {};
  for (int64_t d = 0; d < stack.directions; ++d) w_hh[d] = layer.weights[d].w_hh.const_data_ptr();
  const at::Tensor exchange =
      at::empty({2, stack.directions, stack.batch, stack.hidden}, layer.h_n.options());
  return check_persistent(cuda::launch_persistent_forward(
      layer.args, teams, w_hh, layer.h0.const_data_ptr(), exchange.mutable_data_ptr(), stream));
}

// The running h is h_n, which a row that has ended, or not begun, keeps.
void run_stepwise(const Stack& stack, const Layer& layer, const at::TensorOptions& computed,
                  cuda::Stream stream) {
  RECORD_FUNCTION("fastrnn::stepwise_forward", c10::ArrayRef<const c10::IValue>());
  layer.h_n.copy_(layer.h0);
  const at::Tensor recurrent = at::empty({stack.directions, stack.batch, stack.gates()}, computed);
  const Schedule schedule = stack.schedule();
  // Views for the rows of a step, made anew only where their number changes.
  struct Views {
    int64_t rows = -1;
    at::Tensor product, h;
  } views[cuda::kDirections];
  at::Tensor w_hh[cuda::kDirections], w_hr[cuda::kDirections], output[cuda::kDirections];
  for (int64_t d = 0; d < stack.directions; ++d) {
    w_hh[d] = layer.weights[d].w_hh.t();
    if (!stack.projected) continue;
    w_hr[d] = layer.weights[d].w_hr.t();
    output[d] = layer.output.narrow(1, d * stack.width, stack.width);
  }
  for (int64_t s = 0; s < stack.steps; ++s) {
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t rows = schedule.rows_at(schedule.step(s, d == 1));
      if (rows != views[d].rows) {
        views[d] = {rows, recurrent[d].narrow(0, 0, rows), layer.h_n[d].narrow(0, 0, rows)};
      }
      multiply(views[d].product, views[d].h, w_hh[d]);
    }
    check(cuda::launch_pointwise_forward(layer.args, recurrent.const_data_ptr(), s, stream));
    if (!stack.projected) continue;
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t t = schedule.step(s, d == 1);
      const int64_t first = schedule.offset(t), rows = schedule.rows_at(t);
      multiply(views[d].h, layer.unprojected[d].narrow(0, first, rows), w_hr[d]);
      output[d].narrow(0, first, rows).copy_(views[d].h);
    }
  }
}

// c as it runs, of the compute type: c_n itself if that is of it. Undefined for Elman.
at::Tensor initial_c(const Stack& stack, const OptionalTensor& c0, const at::Tensor& c_n,
                     const at::TensorOptions& computed) {
  if (stack.cell != Cell::lstm) return {};
  at::Tensor c = c_n.view({stack.strands(), stack.batch, stack.hidden});
  if (c.scalar_type() != compute_type(c.scalar_type())) c = at::empty(c.sizes(), computed);
  return c0.has_value() ? c.copy_(c0->reshape(c.sizes())) : c.zero_();
}

// w_ih . x of all steps, (D, rows, G).
at::Tensor multiply_input(const Stack& stack, const Layer& layer, const at::Tensor& input,
                          const at::TensorOptions& computed) {
  const at::Tensor products = at::empty({stack.directions, stack.rows, stack.gates()}, computed);
  for (int64_t d = 0; d < stack.directions; ++d) {
    multiply(products[d], input, layer.weights[d].w_ih.t());
  }
  return products;
}

// The biases, and what is kept for the backward pass (in training), by direction.
void set_directions(const Stack& stack, const ReserveParts<at::Tensor>* kept, int64_t first_strand,
                    Layer& layer) {
  cuda::ForwardArgs& args = layer.args;
  for (int64_t d = 0; d < stack.directions; ++d) {
    if (stack.has_biases) {
      args.b_ih[d] = layer.weights[d].b_ih.const_data_ptr();
      args.b_hh[d] = layer.weights[d].b_hh.const_data_ptr();
    }
    if (kept && stack.cell == Cell::lstm) {
      args.gates[d] = kept->parts[first_strand + d].gates.mutable_data_ptr();
      args.c_all[d] = kept->parts[first_strand + d].c_all.mutable_data_ptr();
    }
    if (stack.projected) {
      layer.unprojected[d] = kept ? kept->parts[first_strand + d].unprojected
                                  : at::empty({stack.rows, stack.hidden}, layer.output.options());
      args.unprojected[d] = layer.unprojected[d].mutable_data_ptr();
    }
  }
}

}  // namespace

void run_forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs) {
  check_memory(inputs);
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const auto& [y, h_n, c_n, reserve] = outputs;
  const cuda::Stream stream = current_stream();
  const cuda::Element element = element_of(x.scalar_type());
  const at::TensorOptions given = x.options();
  const at::TensorOptions computed = given.dtype(compute_type(x.scalar_type()));
  const std::optional<cuda::Teams> teams = choose_forward_teams(stack, element);
  const DeviceSchedule schedule(stack, given, stream);

  const at::Tensor initial_h = state_or_zeros(stack, h0, stack.width, given).contiguous();
  const at::Tensor final_h = h_n.view({stack.strands(), stack.batch, stack.width});
  const at::Tensor c = initial_c(stack, c0, c_n, computed);
  std::optional<ReserveParts<at::Tensor>> reserved;
  if (reserve.defined()) reserved.emplace(reserve_views(stack, reserve));
  const ReserveParts<at::Tensor>* const kept = reserved ? &*reserved : nullptr;

  at::Tensor input = as_rows(stack, x, stack.input).contiguous();
  for (int64_t l = 0; l < stack.layers; ++l) {
    const bool last = l + 1 == stack.layers;
    const int64_t first_strand = l * stack.directions;
    Layer layer{};
    layer.args = layer_args<cuda::ForwardArgs>(stack, element, schedule.get());
    for (int64_t d = 0; d < stack.directions; ++d) {
      layer.weights.emplace_back(stack, weights, first_strand + d);
    }
    layer.h0 = initial_h.narrow(0, first_strand, stack.directions);
    layer.h_n = final_h.narrow(0, first_strand, stack.directions);
    if (last && !stack.batch_first) {
      layer.output = y.view({stack.rows, stack.layer_width()});
    } else if (kept && !last) {
      layer.output = kept->outputs[l];
    } else {
      layer.output = at::empty({stack.rows, stack.layer_width()}, given);
    }
    const at::Tensor input_products = multiply_input(stack, layer, input, computed);

    cuda::ForwardArgs& args = layer.args;
    args.input_products = input_products.const_data_ptr();
    if (c.defined()) args.c = c.narrow(0, first_strand, stack.directions).mutable_data_ptr();
    args.h_n = layer.h_n.mutable_data_ptr();
    args.h = layer.output.mutable_data_ptr();
    set_directions(stack, kept, first_strand, layer);
    if (!teams || !run_persistent(stack, layer, *teams, stream)) {
      run_stepwise(stack, layer, computed, stream);
    }

    input = layer.output;
    if (stack.drops_after(l)) {
      if (kept) input = at::empty_like(layer.output);
      drop(stack, *masks, l, layer.output, input);
    }
    if (last && stack.batch_first) copy_rows(stack, layer.output, y);
  }
  if (c.defined() && !c.is_alias_of(c_n)) c_n.view(c.sizes()).copy_(c);
}

}  // namespace fastrnn::gpu
