// The forward pass of a stack: layers one after the other, each divided among threads.
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>

#include <algorithm>
#include <array>

#include "buffers.h"
#include "plan.h"

namespace fastrnn {
namespace {

// Memory that the layers use in turn.
template <typename E>
struct Workspace {
  using C = Compute<E>;

  C* packed[2];  // of each direction: see ForwardArgs
  C* bias[2];
  C* packed_w_hr[2];
  C* c[2];
  E* zeros;    // initial state where none is given
  C* scratch;  // scratch_size elements for each thread
  int64_t scratch_size;
  Arena<C> arena;

  Workspace(const Stack& stack, const Kernels<E>& kernels, bool in_place, int threads,
            const at::TensorOptions& options)
      : scratch_size(Arena<C>::padded(measure_scratch(stack, kernels, in_place))),
        arena(measure(stack, kernels, in_place) + threads * scratch_size, options) {
    for (int64_t d = 0; d < stack.directions; ++d) {
      packed[d] = in_place ? nullptr : arena.take(packed_size(stack, kernels));
      bias[d] = arena.take(bias_size(stack, kernels));
      packed_w_hr[d] = stack.projected ? arena.take(w_hr_size(stack, kernels)) : nullptr;
      c[d] = arena.take(c_size(stack));
    }
    zeros = reinterpret_cast<E*>(arena.take(zeros_size(stack)));
    scratch = arena.take(threads * scratch_size);
    std::fill_n(zeros, zeros_size(stack), E{});
  }

 private:
  static int64_t widest_input(const Stack& stack) {
    return stack.layers > 1 ? std::max(stack.input, stack.layer_width()) : stack.input;
  }
  static int64_t measure_scratch(const Stack& stack, const Kernels<E>& kernels, bool in_place) {
    if (in_place && !stack.projected) return 0;
    return kernels.forward_scratch(stack.cell, widest_input(stack), stack.hidden, stack.width,
                                   stack.projected, stack.batch);
  }
  static int64_t packed_size(const Stack& stack, const Kernels<E>& kernels) {
    return kernels.packed_gates(stack.cell, widest_input(stack), stack.width, stack.hidden);
  }
  static int64_t bias_size(const Stack& stack, const Kernels<E>& kernels) {
    return kernels.cell_panels(stack.cell, stack.hidden) * kPanelVectors * kernels.lanes;
  }
  static int64_t w_hr_size(const Stack& stack, const Kernels<E>& kernels) {
    return kernels.packed_columns(stack.hidden, stack.width);
  }
  static int64_t c_size(const Stack& stack) {
    return stack.cell == Cell::lstm && !kIsComputed<E> ? stack.batch * stack.hidden : 0;
  }
  static int64_t zeros_size(const Stack& stack) { return std::max(stack.hidden, stack.width); }

  static int64_t measure(const Stack& stack, const Kernels<E>& kernels, bool in_place) {
    const auto padded = Arena<C>::padded;
    const int64_t direction = (in_place ? 0 : padded(packed_size(stack, kernels))) +
                              padded(bias_size(stack, kernels)) + padded(c_size(stack)) +
                              (stack.projected ? padded(w_hr_size(stack, kernels)) : 0);
    return stack.directions * direction + padded(zeros_size(stack));
  }
};

// Packs this member's part of one direction's weights.
template <typename E>
void pack(const Stack& stack, const Kernels<E>& kernels, const ForwardArgs<E>& args,
          const CellWeights<E>& weights, const Workspace<E>& workspace, int64_t direction,
          const Member& member) {
  const auto [begin, end] = member.part(kernels.cell_panels(args.cell, args.hidden));
  kernels.pack_bias(args.cell, weights.b_ih, weights.b_hh, args.hidden, workspace.bias[direction],
                    begin, end);
  if (args.packed) {
    kernels.pack_weights(args.cell, args.w_ih, args.w_hh, args.input, args.width, args.hidden,
                         workspace.packed[direction], begin, end);
  }
  if (stack.projected) {
    const auto [first, last] = member.part(kernels.panels(args.width));
    kernels.pack_rows(weights.w_hr, args.width, args.hidden, workspace.packed_w_hr[direction],
                      first, last);
  }
}

// Fills noise with 0 (probability p) and 1 / (1 - p).
void draw_dropout(at::Tensor& noise, double p) {
  if (p == 1) {
    noise.zero_();
  } else {
    noise.bernoulli_(1 - p).div_(1 - p);
  }
}

template <typename E>
void run_layer(const Stack& stack, const ForwardArgs<E>* args, const CellWeights<E>* weights,
               const Workspace<E>& workspace, int threads) {
  const Kernels<E>& kernels = fastrnn::kernels<E>();
  const int64_t panels = kernels.cell_panels(stack.cell, stack.hidden);
  GroupBarrier barriers[2];
  run_team(threads, [&](const Member& member) {
    const Plan plan = make_plan(member.size, stack, stack.directions, panels);
    if (member.index == 0) barriers[0].size = barriers[1].size = plan.unit_parts;
    for (int64_t d = 0; d < stack.directions; ++d) {
      pack(stack, kernels, args[d], weights[d], workspace, d, member);
    }
    member.wait();
    auto mine = assign<Compute<E>>(plan, stack, member.index, panels, barriers);
    if (!mine.works) return;
    mine.share.scratch = workspace.scratch + member.index * workspace.scratch_size;
    for (int64_t d = 0; d < stack.directions; ++d) {
      if (d % plan.direction_groups == mine.direction_group) kernels.forward(args[d], mine.share);
    }
  });
}

template <typename E>
void forward(const Stack& stack, const at::Tensor& x_given, const at::Tensor& h0,
             const at::Tensor& c0, const std::vector<at::Tensor>& weights, const at::Tensor& y,
             const at::Tensor& h_n, const at::Tensor& c_n, const at::Tensor& reserve_tensor) {
  const Kernels<E>& kernels = fastrnn::kernels<E>();
  const at::Tensor x = rows_contiguous(x_given);
  const bool training = reserve_tensor.defined();
  std::optional<Reserve<E>> reserve;
  if (training) reserve.emplace(stack, mutable_elements<E>(reserve_tensor));

  // Weights that are read once are not worth a copy.
  const bool in_place =
      kernels.reads_in_place && stack.steps == 1 && stack.batch <= kernels.tile_rows;
  const double cell_flops = 2. * stack.rows * stack.gates() * (stack.layer_input(0) + stack.width);
  const int threads = thread_count(cell_flops * stack.directions);
  Workspace<E> workspace(stack, kernels, in_place, threads, x.options());
  const State<E> initial_h(h0, workspace.zeros, stack.batch, stack.width);
  const State<E> initial_c(c0, workspace.zeros, stack.batch, stack.hidden);
  E* const final_h = mutable_elements<E>(h_n);
  E* const final_c = stack.cell == Cell::lstm ? mutable_elements<E>(c_n) : nullptr;

  at::Tensor between[2];  // outputs of layers, where no reserve keeps them
  Sequence<const E> input = input_sequence<E>(stack, x);
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    const bool last = layer + 1 == stack.layers;
    const Sequence<E> result = last ? output_sequence<E>(stack, y) : Sequence<E>{};
    Sequence<E> output = result;
    if (training) {
      output = row_sequence<E>(stack, reserve->outputs[layer], stack.layer_width());
    } else if (!last) {
      at::Tensor& buffer = between[layer % 2];
      if (!buffer.defined()) buffer = empty_buffer(stack.rows * stack.layer_width(), x.options());
      output = row_sequence<E>(stack, mutable_elements<E>(buffer), stack.layer_width());
    }

    ForwardArgs<E> args[2];
    std::vector<CellWeights<E>> cell_weights;
    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t cell = layer * stack.directions + d;
      cell_weights.emplace_back(stack, weights, cell);
      ForwardArgs<E>& a = args[d];
      a = {};
      a.cell = stack.cell;
      a.reverse = d == 1;
      a.schedule = stack.schedule();
      a.input = stack.layer_input(layer);
      a.hidden = stack.hidden;
      a.width = stack.width;
      a.x = input;
      a.h0 = initial_h.of_cell(cell);
      a.h0_stride = initial_h.row_stride;
      a.c0 = initial_c.of_cell(cell);
      a.c0_stride = initial_c.row_stride;
      a.w_ih = cell_weights[d].w_ih;
      a.w_hh = cell_weights[d].w_hh;
      a.packed = workspace.packed[d];
      a.bias = workspace.bias[d];
      a.packed_w_hr = workspace.packed_w_hr[d];
      a.h = columns_from(output, d * stack.width);
      if (training && last) a.y = columns_from(result, d * stack.width);
      a.h_n = final_h + cell * stack.batch * stack.width;
      if (final_c) a.c_n = final_c + cell * stack.batch * stack.hidden;
      if constexpr (kIsComputed<E>) {
        a.c = a.c_n;
      } else {
        a.c = workspace.c[d];
      }
      if (training) {
        a.gates = reserve->parts[cell].gates;
        a.cells = reserve->parts[cell].cells;
        a.unprojected = reserve->parts[cell].unprojected;
      }
    }
    run_layer(stack, args, cell_weights.data(), workspace, threads);

    if (stack.drops_after(layer)) {
      // Drawn as torch.nn does, over (rows, D * P) in order, so that a seed gives the same masks.
      const std::array<int64_t, 2> sizes = {stack.rows, stack.layer_width()};
      const auto view = [&](E* data) { return at::from_blob(data, sizes, x.options()); };
      at::Tensor noise = training ? view(reserve->noise[layer]) : at::empty(sizes, x.options());
      draw_dropout(noise, stack.dropout);
      if (training) {
        at::Tensor dropped = view(reserve->dropped[layer]);
        at::mul_out(dropped, view(output.data), noise);
        output.data = reserve->dropped[layer];
      } else {
        view(output.data).mul_(noise);
      }
    }
    input = read_only(output);
  }
}

}  // namespace

void run_forward(const Stack& stack, const at::Tensor& x, const std::optional<at::Tensor>& h0,
                 const std::optional<at::Tensor>& c0, at::TensorList weights, const at::Tensor& y,
                 const at::Tensor& h_n, const at::Tensor& c_n, const at::Tensor& reserve) {
  with_element(x.scalar_type(), [&](auto element) {
    forward<decltype(element)>(stack, x, contiguous_state(h0), contiguous_state(c0),
                               contiguous_all(weights), y, h_n, c_n, reserve);
  });
}

}  // namespace fastrnn
