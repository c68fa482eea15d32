// The forward pass of a stack: layers one after the other, each divided among threads; or all at
// the same time, along the diagonal.
#include <ATen/ops/from_blob.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>

#include "diagonal.h"
#include "dropout.h"
#include "forward_memory.h"
#include "reserve.h"
#include "rows_apart.h"

namespace fastrnn {
namespace {

template <typename E>
class ForwardRun {
 public:
  using C = Compute<E>;

  // steps_before: as in ForwardArgs.
  ForwardRun(const Stack& stack, const at::Tensor& h0, const at::Tensor& c0,
             const std::vector<at::Tensor>& weights, const Outputs& outputs, int64_t steps_before)
      : stack_(stack),
        plan_(plan_forward(stack, kernels_, outputs.reserve.defined())),
        memory_(stack, kernels_, plan_, outputs.reserve.defined()),
        initial_h_(h0, memory_.initial_zeros(), stack.batch, stack.width),
        initial_c_(c0, memory_.initial_zeros(), stack.batch, stack.hidden),
        final_h_(mutable_elements<E>(outputs.h_n)),
        final_c_(stack.cell == Cell::lstm ? mutable_elements<E>(outputs.c_n) : nullptr),
        steps_before_(steps_before),
        // On the diagonal layers two apart run at once.
        between_(plan_.diagonal ? stack.layers : 2),
        args_(stack.strands()) {
    if (outputs.reserve.defined()) reserve_.emplace(stack, mutable_elements<E>(outputs.reserve));
    weights_.reserve(stack.strands());
    for (int64_t strand = 0; strand < stack.strands(); ++strand) {
      weights_.emplace_back(stack, weights, strand);
    }
  }

  void run(const at::Tensor& x, const OptionalTensor& masks, const at::Tensor& y) {
    Sequence<const E> input = input_sequence<E>(stack_, x);
    for (int64_t layer = 0; layer < stack_.layers; ++layer) {
      Sequence<E> output = output_of(layer, y);
      for (int64_t d = 0; d < stack_.directions; ++d) set_up(layer, d, input, output);
      if (!plan_.diagonal) run_layer(layer * stack_.directions);
      if (stack_.drops_after(layer)) {
        output.data = drop_output(layer, *masks, output.data, y.options());
      }
      input = read_only(output);
    }
    if (plan_.diagonal) run_diagonally();
    memory_.check();
  }

 private:
  Sequence<E> output_of(int64_t layer, const at::Tensor& y);
  void set_up(int64_t layer, int64_t d, const Sequence<const E>& input, const Sequence<E>& output);
  void pack(int64_t strand, const Member& member) const;
  void pack_gates(int64_t strand, const Member& member) const;
  void run_layer(int64_t first_strand) const;
  void run_share(const ForwardArgs<E>& args, Share<C> share, C* scratch,
                 const Division& division) const;
  void run_diagonally() const;
  E* drop_output(int64_t layer, const at::Tensor& masks, E* output,
                 const at::TensorOptions& options);

  const Stack& stack_;
  const Kernels<E>& kernels_ = kernels<E>();
  const ForwardPlan plan_;
  const StepWork work_ = forward_work(stack_);
  ForwardMemory<E> memory_;
  const State<E> initial_h_, initial_c_;
  E* const final_h_;
  E* const final_c_;
  const int64_t steps_before_;
  std::optional<Reserve<E>> reserve_;        // in training
  c10::SmallVector<at::Tensor, 2> between_;  // outputs of layers, where no reserve keeps them
  at::Tensor dropped_;                       // what dropout leaves of one that the reserve keeps
  // By layer, then direction:
  c10::SmallVector<ForwardArgs<E>, 2> args_;
  std::vector<StrandWeights<E>> weights_;
};

template <typename E>
Sequence<E> ForwardRun<E>::output_of(int64_t layer, const at::Tensor& y) {
  if (layer + 1 == stack_.layers) return output_sequence<E>(stack_, y);
  if (reserve_) return row_sequence<E>(stack_, reserve_->outputs[layer], stack_.layer_width());
  at::Tensor& buffer = between_[layer % between_.size()];
  if (!buffer.defined()) buffer = empty_buffer(stack_.rows * stack_.layer_width(), y.options());
  return row_sequence<E>(stack_, mutable_elements<E>(buffer), stack_.layer_width());
}

// The arguments of one direction of a layer.
template <typename E>
void ForwardRun<E>::set_up(int64_t layer, int64_t d, const Sequence<const E>& input,
                           const Sequence<E>& output) {
  const int64_t strand = layer * stack_.directions + d;
  const auto& memory = memory_.strands[strand % memory_.strands.size()];
  ForwardArgs<E>& args = args_[strand];
  args.cell = stack_.cell;
  args.reverse = d == 1;
  args.steps_before = steps_before_;
  args.schedule = stack_.schedule();
  args.input = stack_.layer_input(layer);
  args.hidden = stack_.hidden;
  args.width = stack_.width;
  args.x = input;
  args.h0 = initial_h_.of_strand(strand);
  args.h0_stride = initial_h_.row_stride;
  args.c0 = initial_c_.of_strand(strand);
  args.c0_stride = initial_c_.row_stride;
  args.w_ih = weights_[strand].w_ih;
  args.w_hh = weights_[strand].w_hh;
  args.w_hr = weights_[strand].w_hr;
  args.packed_ih = memory.packed_ih;
  args.packed_hh = memory.packed_hh;
  args.bias = memory.bias;
  args.packed_w_hr = memory.packed_w_hr;
  args.unprojected = reinterpret_cast<E*>(memory.unprojected);
  args.h = columns_from(output, d * stack_.width);
  args.h_n = final_h_ + strand * stack_.batch * stack_.width;
  if (final_c_) args.c_n = final_c_ + strand * stack_.batch * stack_.hidden;
  if constexpr (kIsComputed<E>) {
    args.c = reinterpret_cast<C*>(args.c_n);
  } else {
    args.c = memory.c;
  }
  if (reserve_) {
    args.gates = reserve_->parts[strand].gates;
    args.c_all = reserve_->parts[strand].c_all;
    args.unprojected = reserve_->parts[strand].unprojected;
  }
}

// Packs this member's part of one direction's biases and projection.
template <typename E>
void ForwardRun<E>::pack(int64_t strand, const Member& member) const {
  const ForwardArgs<E>& args = args_[strand];
  const StrandWeights<E>& weights = weights_[strand];
  const auto& memory = memory_.strands[strand % memory_.strands.size()];
  const auto [begin, end] = member.part(plan_.panels);
  kernels_.pack_bias(args.cell, weights.b_ih, weights.b_hh, args.hidden, memory.bias, begin, end);
  if (memory.packed_w_hr) {
    const auto [first, last] = member.part(kernels_.panels(args.width));
    kernels_.pack_gates(Cell::rnn_tanh, args.w_hr, args.hidden, args.width, memory.packed_w_hr,
                        first, last);
  }
}

// Likewise of w_ih and w_hh.
template <typename E>
void ForwardRun<E>::pack_gates(int64_t strand, const Member& member) const {
  const ForwardArgs<E>& args = args_[strand];
  const auto [begin, end] = member.part(plan_.panels);
  const auto pack = [&, begin = begin, end = end](const E* w, int64_t k, C* packed) {
    if (packed) kernels_.pack_gates(args.cell, w, k, args.hidden, packed, begin, end);
  };
  pack(args.w_ih, args.input, args.packed_ih);
  pack(args.w_hh, args.width, args.packed_hh);
}

// The directions of a layer, of which first_strand is the first, divided among threads.
template <typename E>
void ForwardRun<E>::run_layer(int64_t first_strand) const {
  GroupBarrier barriers[2];
  run_team(plan_.threads, [&](const Member& member) {
    const Division division =
        divide_layer(member.size, stack_, stack_.directions, plan_.panels, work_);
    if (member.index == 0) barriers[0].size = barriers[1].size = division.unit_parts;
    // Each direction by those who read it.
    const int group_size = member.size / division.direction_groups;
    const Member packer{member.index % group_size, group_size, nullptr};
    // Who has all rows packs a panel when it is first used, while it and its weights are in cache.
    const bool as_used = division.row_parts == 1;
    for (int64_t d = 0; d < stack_.directions; ++d) {
      if (d % division.direction_groups != member.index / group_size) continue;
      pack(first_strand + d, packer);
      if (!as_used) pack_gates(first_strand + d, packer);
    }
    member.wait();
    auto mine = assign<C>(division, stack_, member.index, plan_.panels, barriers);
    if (!mine.works) return;
    mine.share.packs = as_used;
    for (int64_t d = 0; d < stack_.directions; ++d) {
      if (d % division.direction_groups != mine.direction_group) continue;
      run_share(args_[first_strand + d], mine.share, memory_.scratch_of(member), division);
    }
  });
}

// A member's share of one direction.
template <typename E>
void ForwardRun<E>::run_share(const ForwardArgs<E>& args, Share<C> share, C* scratch,
                              const Division& division) const {
  const int64_t apart = memory_.size_apart(division, share.row_end - share.row_begin);
  share.scratch = scratch + apart;
  const auto run = [&](const ForwardArgs<E>& part, int64_t s_begin, int64_t s_end) {
    kernels_.forward(part, share, s_begin, s_end);
  };
  const bool step_after_step = args.h.step_stride > args.h.row_stride;
  if (apart > 0 && step_after_step) {
    run_apart(args, share.row_begin, share.row_end, reinterpret_cast<E*>(scratch), run);
  } else {
    run(args, 0, stack_.steps);
  }
}

// All layers of one direction at the same time.
template <typename E>
void ForwardRun<E>::run_diagonally() const {
  Diagonal diagonal(stack_.layers, divide_up(stack_.steps, kDiagonalSteps));
  run_team(plan_.threads, [&](const Member& member) {
    for (int64_t layer = 0; layer < stack_.layers; ++layer) {
      pack(layer, member);
      pack_gates(layer, member);
    }
    member.wait();
    C* const scratch = memory_.scratch_of(member);
    const Share<C> share{0, stack_.batch, 0, plan_.panels, scratch, nullptr, nullptr};
    diagonal.work([&](int64_t layer, int64_t block) {
      const int64_t begin = block * kDiagonalSteps;
      kernels_.forward(args_[layer], share, begin, std::min(begin + kDiagonalSteps, stack_.steps));
    });
  });
}

// Dropout of a layer's output; in place, unless the reserve keeps that. Returns where the result
// is.
template <typename E>
E* ForwardRun<E>::drop_output(int64_t layer, const at::Tensor& masks, E* output,
                              const at::TensorOptions& options) {
  const std::array<int64_t, 2> sizes = {stack_.rows, stack_.layer_width()};
  const at::Tensor rows = at::from_blob(output, sizes, options);
  at::Tensor result = rows;
  if (reserve_) {
    if (!dropped_.defined()) dropped_ = empty_buffer(rows.numel(), options).view(sizes);
    result = dropped_;
  }
  drop(stack_, masks, layer, rows, result);
  return mutable_elements<E>(result);
}

}  // namespace

void run_forward(const Stack& stack, const Inputs& inputs, const Outputs& outputs) {
  // Of this thread, whose last call may well have read the same weights.
  static thread_local int64_t steps_before = 0;
  check_memory(inputs);
  const std::vector<at::Tensor> weights = contiguous_all(inputs.weights);
  const at::Tensor h0 = contiguous_state(inputs.h0), c0 = contiguous_state(inputs.c0);
  with_element(inputs.x.scalar_type(), [&](auto element) {
    ForwardRun<decltype(element)> run(stack, h0, c0, weights, outputs, steps_before);
    run.run(rows_contiguous(inputs.x), inputs.masks, outputs.y);
  });
  steps_before += stack.steps;
}

}  // namespace fastrnn
