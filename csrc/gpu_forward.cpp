// The forward pass of a stack on a GPU: for each layer the input projection of all steps, then the
// recurrence, persistent or step by step.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/record_function.h>

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

}  // namespace

void run_forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs) {
  const auto& [x, batch_sizes, h0, c0, weights] = inputs;
  const auto& [y, h_n, c_n, reserve] = outputs;
  const cuda::Stream stream = current_stream();
  const cuda::Element element = element_of(x.scalar_type());
  const at::TensorOptions given = x.options();
  const at::TensorOptions computed = given.dtype(compute_type(x.scalar_type()));
  const bool lstm = stack.cell == Cell::lstm, training = reserve.defined();
  const std::optional<cuda::Teams> teams = choose_forward_teams(stack, element);
  const DeviceSchedule schedule(stack, given, stream);

  const at::Tensor initial_h = initial_state(stack, h0, stack.width, given);
  const at::Tensor final_h = h_n.view({stack.cells(), stack.batch, stack.width});
  at::Tensor c;  // runs in the compute type
  if (lstm) {
    c = c_n.view({stack.cells(), stack.batch, stack.hidden});
    if (x.scalar_type() != compute_type(x.scalar_type())) c = at::empty(c.sizes(), computed);
    if (c0.has_value()) {
      c.copy_(c0->reshape(c.sizes()));
    } else {
      c.zero_();
    }
  }
  std::optional<ReserveParts<at::Tensor>> kept;
  if (training) kept.emplace(reserve_views(stack, reserve));

  at::Tensor input = as_rows(stack, x);
  for (int64_t l = 0; l < stack.layers; ++l) {
    const bool last = l + 1 == stack.layers;
    const int64_t first_cell = l * stack.directions;
    Layer layer{};
    for (int64_t d = 0; d < stack.directions; ++d) {
      layer.weights.emplace_back(stack, weights, first_cell + d);
    }
    layer.h0 = initial_h.narrow(0, first_cell, stack.directions);
    layer.h_n = final_h.narrow(0, first_cell, stack.directions);
    if (last && !stack.batch_first) {
      layer.output = y.view({stack.rows, stack.layer_width()});
    } else if (training && !last) {
      layer.output = kept->outputs[l];
    } else {
      layer.output = at::empty({stack.rows, stack.layer_width()}, given);
    }
    const at::Tensor input_products =
        at::empty({stack.directions, stack.rows, stack.gates()}, computed);
    for (int64_t d = 0; d < stack.directions; ++d) {
      multiply(input_products[d], input, layer.weights[d].w_ih.t());
    }

    cuda::ForwardArgs& args = layer.args;
    args.element = element;
    args.cell = stack.cell;
    args.directions = stack.directions;
    args.schedule = schedule.get();
    args.rows = stack.rows;
    args.hidden = stack.hidden;
    args.input_products = input_products.const_data_ptr();
    if (lstm) args.c = c.narrow(0, first_cell, stack.directions).mutable_data_ptr();
    args.h_n = layer.h_n.mutable_data_ptr();
    args.h = layer.output.mutable_data_ptr();
    for (int64_t d = 0; d < stack.directions; ++d) {
      if (stack.has_biases) {
        args.b_ih[d] = layer.weights[d].b_ih.const_data_ptr();
        args.b_hh[d] = layer.weights[d].b_hh.const_data_ptr();
      }
      if (training && lstm) {
        args.gates[d] = kept->parts[first_cell + d].gates.mutable_data_ptr();
        args.cells[d] = kept->parts[first_cell + d].cells.mutable_data_ptr();
      }
      if (stack.projected) {
        layer.unprojected[d] = training ? kept->parts[first_cell + d].unprojected
                                        : at::empty({stack.rows, stack.hidden}, given);
        args.unprojected[d] = layer.unprojected[d].mutable_data_ptr();
      }
    }
    if (!teams || !run_persistent(stack, layer, *teams, stream)) {
      run_stepwise(stack, layer, computed, stream);
    }

    input = layer.output;
    if (stack.drops_after(l)) {
      at::Tensor noise = training ? kept->noise[l] : at::empty_like(input);
      at::Tensor dropped = training ? kept->dropped[l] : input;
      draw_dropout(noise, stack.dropout);
      at::mul_out(dropped, input, noise);
      input = dropped;
    }
    if (last && stack.batch_first) copy_rows(stack, layer.output, y);
  }
  if (lstm && !c.is_alias_of(c_n)) c_n.view(c.sizes()).copy_(c);
}

}  // namespace fastrnn::gpu
