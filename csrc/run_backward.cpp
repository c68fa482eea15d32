// The backward pass of a stack: layers from the last to the first, in turn or along the diagonal,
// directions side by side or in turn. A direction's time loop runs in chunks; after each the
// gradients of its pre-activations, still in cache, go into those of the input and of the weights.
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <utility>

#include "backward_strand.h"
#include "diagonal.h"
#include "dropout.h"
#include "reserve.h"

namespace fastrnn {
namespace {

template <typename E>
class BackwardRun {
 public:
  using C = Compute<E>;

  BackwardRun(const Stack& stack, const at::Tensor& h0, const at::Tensor& c0,
              const std::vector<at::Tensor>& weights, const at::Tensor& reserve,
              const Gradients& gradients)
      : stack_(stack),
        gradients_(gradients),
        weights_(weights),
        plan_(plan_backward(stack, kernels_, gradients.wants_dh0, sums_every_dw_hh(),
                            gradients.samples)),
        memory_(stack, kernels_, plan_, /*needs_dc=*/!gradients.dc.defined()),
        initial_h_(h0, reinterpret_cast<const E*>(memory_.zeros), stack.batch, stack.width),
        initial_c_(c0, reinterpret_cast<const E*>(memory_.zeros), stack.batch, stack.hidden),
        dh_(gradients.dh.defined() ? gradients.dh.mutable_data_ptr<C>() : nullptr),
        dc_(gradients.dc.defined() ? gradients.dc.mutable_data_ptr<C>() : nullptr),
        // It is only read; Reserve serves the forward pass too.
        reserve_(stack, const_cast<E*>(elements<E>(reserve))) {}

  // Rows of dy, x and y are contiguous.
  void run(const at::Tensor& dy, const at::Tensor& x, const OptionalTensor& masks,
           const at::Tensor& y) {
    Sequence<const E> output_gradient =
        dy.defined() ? input_sequence<E>(stack_, dy) : Sequence<const E>{};
    std::vector<BackwardStrand<E>> strands;  // that have memory of their own
    strands.reserve(memory_.strands.size());
    for (int64_t layer = stack_.layers - 1; layer >= 0; --layer) {
      const Sequence<E> input_gradient = input_gradient_of(layer, x.options());
      const bool dropped = layer > 0 && stack_.drops_after(layer - 1);
      if (dropped) drop_output(layer - 1, *masks, x.options());
      for (int64_t d = 0; d < stack_.directions; ++d) {
        strands.push_back(set_up(layer, d, x, y));
        strands.back().args.dy = columns_from(output_gradient, d * stack_.width);
        strands.back().dx = input_gradient;
        if (strands.size() == memory_.strands.size()) run_all(strands);
      }
      if (dropped) {
        at::Tensor gradient = between_[layer % 2].view({stack_.rows, stack_.layer_width()});
        drop(stack_, *masks, layer - 1, gradient, gradient);
      }
      output_gradient = read_only(input_gradient);
    }
  }

 private:
  // A thread that runs a strand.
  struct Runner {
    Member member;         // of those who run it
    const Member* of_all;  // who run both directions at the same time; null: they do not
    Division division;     // of the strand
    GroupBarrier& barrier;
    C* scratch;
  };

  bool sums_every_dw_hh() const {
    bool every = true;
    for (int64_t strand = 0; strand < stack_.strands(); ++strand) {
      every &= gradients_.dweights[strand * stack_.weights_per_strand() + 1].defined();
    }
    return every;
  }
  Sequence<E> input_gradient_of(int64_t layer, const at::TensorOptions& options);
  void drop_output(int64_t layer, const at::Tensor& masks, const at::TensorOptions& options);
  BackwardStrand<E> set_up(int64_t layer, int64_t d, const at::Tensor& x, const at::Tensor& y);
  void run_strand(BackwardStrand<E>& strand, const Runner& runner) const;
  void run_directions(std::vector<BackwardStrand<E>>& directions) const;
  void run_diagonally(std::vector<BackwardStrand<E>>& layers) const;
  void run_all(std::vector<BackwardStrand<E>>& strands) const;

  const Stack& stack_;
  const Kernels<E>& kernels_ = kernels<E>();
  const Gradients& gradients_;
  const std::vector<at::Tensor>& weights_;
  const BackwardPlan plan_;
  BackwardMemory<E> memory_;
  const State<E> initial_h_, initial_c_;
  C* const dh_;
  C* const dc_;
  const Reserve<E> reserve_;
  // Gradients of the outputs of layers. Two are enough on the diagonal too: a block of one is
  // written anew when the layer between has read it.
  at::Tensor between_[2];
  at::Tensor dropped_;  // what dropout left of the output of the layer below
};

// Where the gradient of a layer's input goes.
template <typename E>
Sequence<E> BackwardRun<E>::input_gradient_of(int64_t layer, const at::TensorOptions& options) {
  const at::Tensor& dx = gradients_.dx;
  if (layer == 0) return dx.defined() ? output_sequence<E>(stack_, dx) : Sequence<E>{};
  at::Tensor& buffer = between_[layer % 2];
  if (!buffer.defined()) buffer = empty_buffer(stack_.rows * stack_.layer_width(), options);
  return row_sequence<E>(stack_, mutable_elements<E>(buffer), stack_.layer_width());
}

// Makes anew what dropout left of a layer's output.
template <typename E>
void BackwardRun<E>::drop_output(int64_t layer, const at::Tensor& masks,
                                 const at::TensorOptions& options) {
  const std::array<int64_t, 2> sizes = {stack_.rows, stack_.layer_width()};
  if (!dropped_.defined()) dropped_ = at::empty(sizes, options);
  drop(stack_, masks, layer, at::from_blob(reserve_.outputs[layer], sizes, options), dropped_);
}

// A strand, but for where the gradients of its input and output are.
template <typename E>
BackwardStrand<E> BackwardRun<E>::set_up(int64_t layer, int64_t d, const at::Tensor& x,
                                         const at::Tensor& y) {
  const int64_t strand = layer * stack_.directions + d, width = stack_.layer_width();
  Sequence<const E> input = input_sequence<E>(stack_, x), output = input_sequence<E>(stack_, y);
  if (layer > 0) {
    const E* const below =
        stack_.drops_after(layer - 1) ? elements<E>(dropped_) : reserve_.outputs[layer - 1];
    input = row_sequence<const E>(stack_, below, width);
  }
  if (layer + 1 < stack_.layers) {
    output = read_only(row_sequence<E>(stack_, reserve_.outputs[layer], width));
  }
  StrandMemory<E>& memory = memory_.strands[strand % memory_.strands.size()];
  BackwardArgs<E> args{};
  args.cell = stack_.cell;
  args.reverse = d == 1;
  args.projected = stack_.projected;
  args.schedule = stack_.schedule();
  args.hidden = stack_.hidden;
  args.width = stack_.width;
  args.h = columns_from(output, d * stack_.width);
  args.gates = reserve_.parts[strand].gates;
  args.c_all = reserve_.parts[strand].c_all;
  args.c0 = initial_c_.of_strand(strand);
  args.c0_stride = initial_c_.row_stride;
  args.wants_dh0 = gradients_.wants_dh0;
  if (dh_) args.dh = dh_ + strand * stack_.batch * stack_.width;
  args.dc = dc_ ? dc_ + strand * stack_.batch * stack_.hidden : memory.dc;
  args.dgates = memory.dgates;
  args.dprojected = memory.dprojected;
  args.slots = plan_.slots;
  const at::Tensor* const dweights =
      gradients_.dweights.data() + strand * stack_.weights_per_strand();
  BackwardStrand<E> result{
      .stack = stack_,
      .kernels = kernels_,
      .plan = plan_,
      .memory = memory,
      .weights = StrandWeights<E>(stack_, weights_, strand),
      .gradients = {stack_, kernels_, plan_, memory, stack_.layer_input(layer), dweights},
      .input = stack_.layer_input(layer),
      .x = input,
      .dx = {},
      .h0 = initial_h_.of_strand(strand),
      .h0_stride = initial_h_.row_stride,
      .unprojected = reserve_.parts[strand].unprojected,
      .args = args};
  result.set_weights();
  return result;
}

// A thread's part of a strand.
template <typename E>
void BackwardRun<E>::run_strand(BackwardStrand<E>& strand, const Runner& runner) const {
  const BackwardArgs<E>& args = strand.args;
  const Member& member = runner.member;
  if (member.index == 0) runner.barrier.size = runner.division.unit_parts;
  strand.begin(member);
  member.wait();
  const Assignment<C> mine =
      assign<C>(runner.division, stack_, member.index, plan_.panels, &runner.barrier);
  // From which step of the loop on dx is what the other direction left there, and this one's. Side
  // by side each is the first in half of the steps, and then waits for the other.
  const int64_t steps = stack_.steps;
  const bool meets = runner.of_all && strand.dx.data;
  const int64_t adds_from = meets ? (steps + !args.reverse) / 2 : args.reverse ? 0 : steps;
  bool has_met = !meets;
  typename WeightGradients<E>::Progress progress{};
  for (int64_t s = 0; s < steps; s += plan_.chunk_steps) {
    const int64_t s_end = std::min(s + plan_.chunk_steps, steps);
    if (s > 0 && plan_.packs_each_chunk) {
      strand.pack_w_hh(member);
      member.wait();
    }
    if (mine.works) kernels_.backward(args, mine.share, s, s_end);
    const int64_t rows = strand.collect_rows(s, s_end, 0, member);
    member.wait();
    const int64_t first_rows = strand.rows_of(s, std::min(s_end, adds_from));
    strand.multiply_dx(0, first_rows, /*accumulate=*/false, member, runner.scratch);
    if (!has_met && s_end >= adds_from) {
      runner.of_all->wait();
      has_met = true;
    }
    strand.multiply_dx(first_rows, rows, /*accumulate=*/true, member, runner.scratch);
    strand.gradients.add_chunk(rows, s_end == steps, progress, member, runner.scratch);
    member.wait();
  }
}

// The directions of a layer, or one of them.
template <typename E>
void BackwardRun<E>::run_directions(std::vector<BackwardStrand<E>>& directions) const {
  const int64_t count = static_cast<int64_t>(directions.size());
  const StepWork work = backward_work(stack_);
  Barrier everyone[2];
  GroupBarrier barriers[2];
  run_team(plan_.threads, [&](const Member& member) {
    Division division = divide_layer(member.size, stack_, count, plan_.panels, work);
    const int groups = std::exchange(division.direction_groups, 1);
    C* const scratch = memory_.scratch_of(member);
    if (groups == 1) {
      for (BackwardStrand<E>& direction : directions) {
        run_strand(direction, {member, nullptr, division, barriers[0], scratch});
      }
      return;
    }
    const int size = member.size / groups, group = member.index / size;
    const Member of_group{member.index % size, size, &everyone[group]};
    run_strand(directions[group], {of_group, &member, division, barriers[group], scratch});
  });
}

// All layers, of one direction and one chunk, at the same time. The gradients of their weights are
// everyone's, when no block is left.
template <typename E>
void BackwardRun<E>::run_diagonally(std::vector<BackwardStrand<E>>& layers) const {
  Diagonal diagonal(stack_.layers, divide_up(stack_.steps, kDiagonalSteps));
  run_team(plan_.threads, [&](const Member& member) {
    for (const BackwardStrand<E>& layer : layers) layer.begin(member);
    member.wait();
    C* const scratch = memory_.scratch_of(member);
    const Member alone{0, 1, nullptr};
    const Share<C> share{0, stack_.batch, 0, plan_.panels, nullptr, nullptr, nullptr};
    diagonal.work([&](int64_t i, int64_t block) {
      const BackwardStrand<E>& layer = layers[i];
      const int64_t s = block * kDiagonalSteps, s_end = std::min(s + kDiagonalSteps, stack_.steps);
      kernels_.backward(layer.args, share, s, s_end);
      const int64_t first = layer.rows_of(0, s);
      const int64_t rows = layer.collect_rows(s, s_end, first, alone);
      layer.multiply_dx(first, first + rows, /*accumulate=*/false, alone, scratch);
    });
    member.wait();
    for (BackwardStrand<E>& layer : layers) {
      typename WeightGradients<E>::Progress progress{};
      layer.gradients.add_chunk(stack_.rows, /*last=*/true, progress, member, scratch);
    }
  });
}

// Strands, of one layer or of all, that have memory of their own; and forgets them.
template <typename E>
void BackwardRun<E>::run_all(std::vector<BackwardStrand<E>>& strands) const {
  if (plan_.diagonal) {
    run_diagonally(strands);
  } else {
    run_directions(strands);
  }
  for (BackwardStrand<E>& strand : strands) strand.gradients.finish();
  memory_.check();
  strands.clear();
}

}  // namespace

void run_backward(const Stack& stack, const Inputs& inputs, const at::Tensor& y,
                  const at::Tensor& reserve, const Gradients& gradients) {
  check_memory(inputs);
  const std::vector<at::Tensor> weights = contiguous_all(inputs.weights);
  const at::Tensor h0 = contiguous_state(inputs.h0), c0 = contiguous_state(inputs.c0);
  const at::Tensor dy = gradients.dy.defined() ? rows_contiguous(gradients.dy) : gradients.dy;
  with_element(inputs.x.scalar_type(), [&](auto element) {
    BackwardRun<decltype(element)> run(stack, h0, c0, weights, reserve, gradients);
    run.run(dy, rows_contiguous(inputs.x), inputs.masks, rows_contiguous(y));
  });
}

}  // namespace fastrnn
