// The backward pass of a stack on a GPU: for each layer, from the last to the first, the recurrence
// backwards, then the products over all steps that give the gradients of weights and input.
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/record_function.h>

#include <array>

#include "dropout.h"
#include "gpu.h"

namespace fastrnn::gpu {
namespace {

// One layer; the launchers' arguments, and the tensors behind them.
struct Layer {
  cuda::BackwardArgs args;
  std::vector<Weights> weights;  // by direction
  at::Tensor dy;                 // (rows, D * P), or undefined
  at::Tensor dh;                 // (D, N, P) of the compute type, in and out
  at::Tensor dgates;             // (D, rows, G)
  at::Tensor dprojected;         // (D, rows, P), projection only
};

// False where the device refused.
bool run_persistent(const Stack& stack, const Layer& layer, const cuda::Teams& teams,
                    cuda::Stream stream) {
  RECORD_FUNCTION("fastrnn::persistent_backward", c10::ArrayRef<const c10::IValue>());
  const void* w_hh[cuda::kDirections] = {};
  for (int64_t d = 0; d < stack.directions; ++d) w_hh[d] = layer.weights[d].w_hh.const_data_ptr();
  return check_persistent(cuda::launch_persistent_backward(layer.args, teams, w_hh, stream));
}

// The running gradient of h is dh, which a row that has ended, or not begun, keeps.
void run_stepwise(const Stack& stack, Layer& layer, const at::TensorOptions& computed,
                  cuda::Stream stream) {
  RECORD_FUNCTION("fastrnn::stepwise_backward", c10::ArrayRef<const c10::IValue>());
  const Schedule schedule = stack.schedule();
  at::Tensor unprojected_dh;  // gradient of o * tanh(c)
  if (stack.projected) {
    unprojected_dh = at::empty({stack.directions, stack.batch, stack.hidden}, computed);
    layer.args.dh = unprojected_dh.mutable_data_ptr();
  }
  at::Tensor dh[cuda::kDirections], dgates[cuda::kDirections];
  for (int64_t d = 0; d < stack.directions; ++d) {
    dh[d] = layer.dh[d];
    dgates[d] = layer.dgates[d];
  }
  const auto each_direction = [&](int64_t s, auto&& f) {
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t t = schedule.step(s, d == 0);
      f(d, schedule.offset(t), schedule.rows_at(t));
    }
  };
  for (int64_t s = 0; s < stack.steps; ++s) {
    if (stack.projected) {
      each_direction(s, [&](int64_t d, int64_t first, int64_t rows) {
        const at::Tensor dprojected = layer.dprojected[d].narrow(0, first, rows);
        dprojected.copy_(dh[d].narrow(0, 0, rows));
        if (layer.dy.defined()) {
          dprojected.add_(layer.dy.narrow(0, first, rows).narrow(1, d * stack.width, stack.width));
        }
        multiply(unprojected_dh[d].narrow(0, 0, rows), dprojected, layer.weights[d].w_hr);
      });
    }
    check(cuda::launch_pointwise_backward(layer.args, s, stream));
    each_direction(s, [&](int64_t d, int64_t first, int64_t rows) {
      multiply(dh[d].narrow(0, 0, rows), dgates[d].narrow(0, first, rows), layer.weights[d].w_hh);
    });
  }
}

// out = gradient' . rows, over all rows or, where there are several samples, over each sample's.
void multiply_by_sample(const at::Tensor& out, const at::Tensor& gradient, const at::Tensor& rows,
                        int64_t samples) {
  if (samples == 1) {
    multiply(out.view({gradient.size(1), rows.size(1)}), gradient.t(), rows);
    return;
  }
  at::Tensor result = out;
  at::bmm_out(result, by_sample(gradient, samples).transpose(1, 2), by_sample(rows, samples));
}

// Fills the gradients of one direction's weights that are wanted (defined).
void differentiate_weights(const Stack& stack, const Layer& layer, int64_t d, int64_t samples,
                           const at::Tensor& input, const at::Tensor& output, const at::Tensor& h0,
                           const at::Tensor& unprojected, const at::Tensor* dweights,
                           cuda::Stream stream) {
  const at::Tensor dgates = layer.dgates[d];
  if (dweights[0].defined()) multiply_by_sample(dweights[0], dgates, input, samples);
  if (dweights[1].defined()) {
    const at::Tensor previous = at::empty({stack.rows, stack.width}, input.options());
    check(cuda::launch_previous_h(
        {layer.args.element, d, stack.directions, layer.args.schedule, stack.width,
         output.const_data_ptr(), h0.const_data_ptr(), previous.mutable_data_ptr()},
        stream));
    multiply_by_sample(dweights[1], dgates, previous, samples);
  }
  for (int64_t i = 2; stack.has_biases && i < 4; ++i) {
    at::Tensor dbias = dweights[i];
    if (!dbias.defined()) continue;
    if (i == 3 && dweights[2].defined()) {
      dbias.copy_(dweights[2]);  // the same sum
    } else {
      at::Tensor sums = dbias.view({samples, stack.gates()});
      at::sum_out(sums, dgates.view({-1, samples, stack.gates()}), {0});
    }
  }
  const at::Tensor& dw_hr = dweights[stack.weights_per_strand() - 1];
  if (stack.projected && dw_hr.defined()) {
    multiply_by_sample(dw_hr, layer.dprojected[d], unprojected, samples);
  }
}

// The tensors of a layer's gradients, and the launchers' arguments.
Layer set_up(const Stack& stack, cuda::BackwardArgs args, at::TensorList weights,
             int64_t first_strand, const at::Tensor& dy, const at::Tensor& all_dh,
             const at::TensorOptions& given) {
  Layer layer{};
  layer.args = args;
  for (int64_t d = 0; d < stack.directions; ++d) {
    layer.weights.emplace_back(stack, weights, first_strand + d);
  }
  layer.dy = dy;
  layer.dh = all_dh.narrow(0, first_strand, stack.directions);
  layer.dgates = at::empty({stack.directions, stack.rows, stack.gates()}, given);
  if (stack.projected) {
    layer.dprojected = at::empty({stack.directions, stack.rows, stack.width}, given);
  }
  if (dy.defined() && !stack.projected) layer.args.dy = dy.const_data_ptr();
  layer.args.dh = layer.dh.mutable_data_ptr();
  layer.args.dgates = layer.dgates.mutable_data_ptr();
  return layer;
}

// The gradient of a layer's input. Not at::mm, which would round where backward() is called under
// autocast.
at::Tensor differentiate_input(const Stack& stack, const Layer& layer, int64_t input,
                               const at::TensorOptions& given) {
  at::Tensor dx = at::empty({stack.rows, input}, given);
  multiply(dx, layer.dgates[0], layer.weights[0].w_ih);
  if (stack.directions == 2) dx.addmm_(layer.dgates[1], layer.weights[1].w_ih);
  return dx;
}

}  // namespace

// Whether dh0 is wanted makes no difference: it costs one product more.
void run_backward(const Stack& stack, const Inputs& inputs, const at::Tensor& y,
                  const at::Tensor& reserve, const Gradients& gradients) {
  check_memory(inputs);
  const auto& [x, batch_sizes, h0, c0, weights, masks] = inputs;
  const cuda::Stream stream = current_stream();
  const cuda::Element element = element_of(x.scalar_type());
  const at::TensorOptions given = x.options();
  const at::TensorOptions computed = given.dtype(compute_type(x.scalar_type()));
  const bool lstm = stack.cell == Cell::lstm;
  const std::optional<cuda::Teams> teams = choose_backward_teams(stack, element);
  const DeviceSchedule schedule(stack, given, stream);
  const ReserveParts<at::Tensor> kept = reserve_views(stack, reserve);
  const at::Tensor initial_h = state_or_zeros(stack, h0, stack.width, given).contiguous();
  const at::Tensor initial_c =
      lstm ? state_or_zeros(stack, c0, stack.hidden, given).contiguous() : at::Tensor();
  const auto by_strand = [&](const at::Tensor& gradient, int64_t width) {
    const std::array<int64_t, 3> sizes = {stack.strands(), stack.batch, width};
    return gradient.defined() ? gradient.view(sizes) : at::zeros(sizes, computed);
  };
  const at::Tensor all_dh = by_strand(gradients.dh, stack.width);
  const at::Tensor all_dc = lstm ? by_strand(gradients.dc, stack.hidden) : at::Tensor();

  at::Tensor output_gradient = gradients.dy.defined()
                                   ? as_rows(stack, gradients.dy, stack.layer_width()).contiguous()
                                   : at::Tensor();
  for (int64_t l = stack.layers - 1; l >= 0; --l) {
    const int64_t first_strand = l * stack.directions;
    const auto of_layer = [&](const at::Tensor& all) {
      return all.narrow(0, first_strand, stack.directions);
    };
    Layer layer = set_up(stack, layer_args<cuda::BackwardArgs>(stack, element, schedule.get()),
                         weights, first_strand, output_gradient, all_dh, given);
    cuda::BackwardArgs& args = layer.args;
    const at::Tensor output = l + 1 == stack.layers
                                  ? as_rows(stack, y, stack.layer_width()).contiguous()
                                  : kept.outputs[l];
    args.h = output.const_data_ptr();
    if (lstm) {
      args.c0 = of_layer(initial_c).const_data_ptr();
      args.dc = of_layer(all_dc).mutable_data_ptr();
      for (int64_t d = 0; d < stack.directions; ++d) {
        args.gates[d] = kept.parts[first_strand + d].gates.const_data_ptr();
        args.c_all[d] = kept.parts[first_strand + d].c_all.const_data_ptr();
      }
    }
    if (!teams || !run_persistent(stack, layer, *teams, stream)) {
      run_stepwise(stack, layer, computed, stream);
    }

    const bool drops = l > 0 && stack.drops_after(l - 1);
    at::Tensor input = l == 0 ? as_rows(stack, x, stack.input).contiguous() : kept.outputs[l - 1];
    if (drops) input = dropped(stack, *masks, l - 1, input);
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t strand = first_strand + d;
      differentiate_weights(stack, layer, d, gradients.samples, input, output, initial_h[strand],
                            kept.parts[strand].unprojected,
                            gradients.dweights.data() + strand * stack.weights_per_strand(),
                            stream);
    }
    if (l == 0 && !gradients.dx.defined()) break;
    output_gradient = differentiate_input(stack, layer, stack.layer_input(l), given);
    if (drops) drop(stack, *masks, l - 1, output_gradient, output_gradient);
  }
  if (gradients.dx.defined()) copy_rows(stack, output_gradient, gradients.dx);
}

}  // namespace fastrnn::gpu
