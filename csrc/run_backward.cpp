// The backward pass of a stack: layers from the last to the first, in turn or along the diagonal,
// directions side by side or in turn. A direction's time loop runs in chunks; after each the
// gradients of its pre-activations, still in cache, go into those of the input and of the weights.
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <utility>

#include "backward_memory.h"
#include "diagonal.h"
#include "dropout.h"
#include "reserve.h"
#include "weight_gradients.h"

namespace fastrnn {
namespace {

// Of steps [s_begin, s_end) of the loop.
template <typename E>
int64_t rows_of(const BackwardArgs<E>& args, int64_t s_begin, int64_t s_end) {
  int64_t rows = 0;
  for (int64_t s = s_begin; s < s_end; ++s) rows += args.schedule.rows_at(args.step(s));
  return rows;
}

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
    std::vector<Direction> directions;  // that have memory of their own
    for (int64_t layer = stack_.layers - 1; layer >= 0; --layer) {
      const Sequence<E> input_gradient = input_gradient_of(layer, x.options());
      const bool dropped = layer > 0 && stack_.drops_after(layer - 1);
      if (dropped) drop_output(layer - 1, *masks, x.options());
      for (int64_t d = 0; d < stack_.directions; ++d) {
        directions.push_back(set_up(layer, d, x, y));
        directions.back().args.dy = columns_from(output_gradient, d * stack_.width);
        directions.back().dx = input_gradient;
        if (directions.size() == memory_.directions.size()) run_all(directions);
      }
      if (dropped) {
        at::Tensor gradient = between_[layer % 2].view({stack_.rows, stack_.layer_width()});
        drop(stack_, *masks, layer - 1, gradient, gradient);
      }
      output_gradient = read_only(input_gradient);
    }
  }

 private:
  // One direction of one layer.
  struct Direction {
    BackwardArgs<E> args;
    Sequence<const E> x;  // (T, N, I)
    Sequence<E> dx;       // likewise, or data null
    const E* h0;
    int64_t h0_stride;
    const E* unprojected;
    int64_t input;
    StrandWeights<E> weights;
    DirectionMemory<E>& memory;
    WeightGradients<E> gradients;
  };

  // A thread that runs a direction.
  struct Runner {
    Member member;         // of those who run it
    const Member* of_all;  // who run both directions at the same time; null: they do not
    Division division;     // of the direction
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
  Direction set_up(int64_t layer, int64_t d, const at::Tensor& x, const at::Tensor& y);
  void set_weights(Direction& direction) const;
  ColumnWeights<C> column_weights(const E* w, int64_t k, int64_t columns, const C* packed,
                                  bool in_place) const;
  void pack_columns(const E* w, int64_t k, int64_t columns, C* packed, bool in_place,
                    const Member& member) const;
  void pack(const Direction& direction, const Member& member) const;
  int64_t collect_rows(Direction& direction, int64_t s_begin, int64_t s_end, int64_t first,
                       const Member& member) const;
  void multiply_dx(const Direction& direction, int64_t begin, int64_t end, bool accumulate,
                   const Runner& runner) const;
  void begin(const Direction& direction, const Member& member) const;
  void run_direction(Direction& direction, const Runner& runner) const;
  void run_directions(std::vector<Direction>& directions) const;
  void run_diagonally(std::vector<Direction>& layers) const;
  void run_all(std::vector<Direction>& directions) const;

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

// A direction of a layer, but for gradients of its input and output.
template <typename E>
typename BackwardRun<E>::Direction BackwardRun<E>::set_up(int64_t layer, int64_t d,
                                                          const at::Tensor& x,
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
  DirectionMemory<E>& memory = memory_.directions[strand % memory_.directions.size()];
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
  Direction direction{
      .args = args,
      .x = input,
      .dx = {},
      .h0 = initial_h_.of_strand(strand),
      .h0_stride = initial_h_.row_stride,
      .unprojected = reserve_.parts[strand].unprojected,
      .input = stack_.layer_input(layer),
      .weights = StrandWeights<E>(stack_, weights_, strand),
      .memory = memory,
      .gradients = {stack_, kernels_, plan_, memory, stack_.layer_input(layer), dweights}};
  set_weights(direction);
  return direction;
}

// Where the time loop reads the weights.
template <typename E>
void BackwardRun<E>::set_weights(Direction& direction) const {
  DirectionMemory<E>& memory = direction.memory;
  if (plan_.shares_dw_hh) memory.packed_w_hh = direction.gradients.w_hh_sums();
  direction.args.w_hh = column_weights(direction.weights.w_hh, stack_.gates(), stack_.width,
                                       memory.packed_w_hh, plan_.reads_w_hh_in_place);
  if (!stack_.projected) return;
  direction.args.w_hr = column_weights(direction.weights.w_hr, stack_.width, stack_.hidden,
                                       memory.packed_w_hr, plan_.reads_w_hr_in_place);
}

// w (k, columns) as pack_columns leaves it.
template <typename E>
ColumnWeights<Compute<E>> BackwardRun<E>::column_weights(const E* w, int64_t k, int64_t columns,
                                                         const C* packed, bool in_place) const {
  const int64_t panel_columns = kPanelVectors * kernels_.lanes;
  if (in_place) return {columns, reinterpret_cast<const C*>(w), columns, panel_columns, packed};
  const int64_t panel_stride = kernels_.operands(k) * panel_columns;
  return {columns, packed, panel_columns, panel_stride,
          packed + columns / panel_columns * panel_stride};
}

// Packs this member's part of w or, in place, the panel of it that is not full.
template <typename E>
void BackwardRun<E>::pack_columns(const E* w, int64_t k, int64_t columns, C* packed, bool in_place,
                                  const Member& member) const {
  const int64_t panels = kernels_.panels(columns);
  if (!in_place) {
    const auto [begin, end] = member.part(panels);
    kernels_.pack_columns(w, k, columns, packed, begin, end);
  } else if (member.index == 0) {
    const int64_t panel_columns = kPanelVectors * kernels_.lanes, full = columns / panel_columns;
    // pack_columns writes panel p at p * operands(k) * panel_columns of its output.
    C* const partial = packed - full * kernels_.operands(k) * panel_columns;
    kernels_.pack_columns(w, k, columns, partial, full, panels);
  }
}

template <typename E>
void BackwardRun<E>::pack(const Direction& direction, const Member& member) const {
  const StrandWeights<E>& weights = direction.weights;
  if (plan_.packed_w_hh > 0) {
    pack_columns(weights.w_hh, stack_.gates(), stack_.width, direction.memory.packed_w_hh,
                 plan_.reads_w_hh_in_place, member);
  }
  if (stack_.projected) {
    pack_columns(weights.w_hr, stack_.width, stack_.hidden, direction.memory.packed_w_hr,
                 plan_.reads_w_hr_in_place, member);
  }
}

// Gathers pointers to this member's part of the rows of steps [s_begin, s_end) of the loop, behind
// the `first` of the chunk; returns the number of all. Row n of a step is one of sample n %
// samples. A part is rows that follow each other, not some of each step: of few rows a step, all
// members would write to every line of the pointers.
template <typename E>
int64_t BackwardRun<E>::collect_rows(Direction& direction, int64_t s_begin, int64_t s_end,
                                     int64_t first, const Member& member) const {
  const BackwardArgs<E>& args = direction.args;
  DirectionMemory<E>& memory = direction.memory;
  const Schedule& schedule = args.schedule;
  const int64_t gates = kernels_.operands(stack_.gates());
  const int64_t width = kernels_.operands(stack_.width);
  const int64_t samples = plan_.samples;
  const int64_t all_rows = rows_of(args, s_begin, s_end);
  const int64_t sample_rows = all_rows / samples;
  const auto [begin, end] = member.part(all_rows);
  int64_t rows_before = 0;
  for (int64_t s = s_begin; s < s_end && rows_before < end; ++s) {
    const int64_t t = args.step(s), slot_row = s % plan_.slots * stack_.batch;
    const bool exists = s + 1 < schedule.steps;
    const int64_t previous = exists ? args.step(s + 1) : 0;
    const int64_t previous_rows = exists ? schedule.rows_at(previous) : 0;
    const int64_t n_begin = std::max(begin - rows_before, int64_t{0});
    const int64_t n_end = std::min(end - rows_before, schedule.rows_at(t));
    int64_t sample = n_begin % samples, row = (rows_before + n_begin) / samples;
    for (int64_t n = n_begin; n < n_end; ++n) {
      const int64_t i = first + sample * sample_rows + row;
      if (++sample == samples) sample = 0, ++row;
      memory.dgate_rows[i] = memory.dgates + (slot_row + n) * gates;
      memory.x_rows[i] = direction.x.row(schedule, t, n);
      memory.h_rows[i] = n < previous_rows ? args.h.row(schedule, previous, n)
                                           : direction.h0 + n * direction.h0_stride;
      if (direction.dx.data) memory.dx_rows[i] = direction.dx.row(schedule, t, n);
      if (stack_.projected) {
        memory.dprojected_rows[i] = memory.dprojected + (slot_row + n) * width;
        memory.m_rows[i] = direction.unprojected + (schedule.offset(t) + n) * stack_.hidden;
      }
    }
    rows_before += schedule.rows_at(t);
  }
  return all_rows;
}

// A member's part of the gradient of x, if that is wanted, of rows [begin, end) of a chunk.
template <typename E>
void BackwardRun<E>::multiply_dx(const Direction& direction, int64_t begin, int64_t end,
                                 bool accumulate, const Runner& runner) const {
  if (!direction.dx.data) return;
  const auto [first, last] = runner.member.part(end - begin);
  kernels_.row_product({.a = direction.memory.dgate_rows.data(),
                        .out = direction.memory.dx_rows.data(),
                        .k = stack_.gates(),
                        .columns = direction.input,
                        .w = direction.weights.w_ih,
                        .in_place = plan_.reads_w_ih_in_place,
                        .accumulate = accumulate,
                        .scratch = runner.scratch},
                       begin + first, begin + last);
}

// A member's part of what the time loop finds.
template <typename E>
void BackwardRun<E>::begin(const Direction& direction, const Member& member) const {
  pack(direction, member);
  if (dc_ || stack_.cell != Cell::lstm) return;
  const auto [begin, end] = member.part(stack_.batch * stack_.hidden);
  std::fill(direction.args.dc + begin, direction.args.dc + end, C(0));
}

// A thread's part of a direction.
template <typename E>
void BackwardRun<E>::run_direction(Direction& direction, const Runner& runner) const {
  const BackwardArgs<E>& args = direction.args;
  const Member& member = runner.member;
  if (member.index == 0) runner.barrier.size = runner.division.unit_parts;
  begin(direction, member);
  member.wait();
  const Assignment<C> mine =
      assign<C>(runner.division, stack_, member.index, plan_.panels, &runner.barrier);
  // From which step of the loop on dx is what the other direction left there, and this one's. Side
  // by side each is the first in half of the steps, and then waits for the other.
  const int64_t steps = stack_.steps;
  const bool meets = runner.of_all && direction.dx.data;
  const int64_t adds_from = meets ? (steps + !args.reverse) / 2 : args.reverse ? 0 : steps;
  bool has_met = !meets;
  typename WeightGradients<E>::Progress progress{};
  for (int64_t s = 0; s < steps; s += plan_.chunk_steps) {
    const int64_t s_end = std::min(s + plan_.chunk_steps, steps);
    if (mine.works) kernels_.backward(args, mine.share, s, s_end);
    const int64_t rows = collect_rows(direction, s, s_end, 0, member);
    member.wait();
    const int64_t first_rows = rows_of(args, s, std::min(s_end, adds_from));
    multiply_dx(direction, 0, first_rows, /*accumulate=*/false, runner);
    if (!has_met && s_end >= adds_from) {
      runner.of_all->wait();
      has_met = true;
    }
    multiply_dx(direction, first_rows, rows, /*accumulate=*/true, runner);
    direction.gradients.add_chunk(rows, s_end == steps, progress, member, runner.scratch);
    member.wait();
  }
}

// The directions of a layer, or one of them.
template <typename E>
void BackwardRun<E>::run_directions(std::vector<Direction>& directions) const {
  const int64_t count = static_cast<int64_t>(directions.size());
  const StepWork work = backward_work(stack_);
  Barrier everyone[2];
  GroupBarrier barriers[2];
  run_team(plan_.threads, [&](const Member& member) {
    Division division = divide_layer(member.size, stack_, count, plan_.panels, work);
    const int groups = std::exchange(division.direction_groups, 1);
    C* const scratch = memory_.scratch_of(member);
    if (groups == 1) {
      for (Direction& direction : directions) {
        run_direction(direction, {member, nullptr, division, barriers[0], scratch});
      }
      return;
    }
    const int size = member.size / groups, group = member.index / size;
    const Member of_group{member.index % size, size, &everyone[group]};
    run_direction(directions[group], {of_group, &member, division, barriers[group], scratch});
  });
}

// All layers, of one direction and one chunk, at the same time. The gradients of their weights are
// everyone's, when no block is left.
template <typename E>
void BackwardRun<E>::run_diagonally(std::vector<Direction>& layers) const {
  Diagonal diagonal(stack_.layers, divide_up(stack_.steps, kDiagonalSteps));
  run_team(plan_.threads, [&](const Member& member) {
    for (const Direction& layer : layers) begin(layer, member);
    member.wait();
    GroupBarrier none;
    const Runner alone{{0, 1, nullptr}, nullptr, {1, 1, 1}, none, memory_.scratch_of(member)};
    const Share<C> share{0, stack_.batch, 0, plan_.panels, alone.scratch, nullptr, nullptr};
    diagonal.work([&](int64_t i, int64_t block) {
      Direction& layer = layers[i];
      const int64_t s = block * kDiagonalSteps, s_end = std::min(s + kDiagonalSteps, stack_.steps);
      kernels_.backward(layer.args, share, s, s_end);
      const int64_t first = rows_of(layer.args, 0, s);
      const int64_t rows = collect_rows(layer, s, s_end, first, alone.member);
      multiply_dx(layer, first, first + rows, /*accumulate=*/false, alone);
    });
    member.wait();
    for (Direction& layer : layers) {
      typename WeightGradients<E>::Progress progress{};
      layer.gradients.add_chunk(stack_.rows, /*last=*/true, progress, member, alone.scratch);
    }
  });
}

// Directions, of one layer or of all, that have memory of their own; and forgets them.
template <typename E>
void BackwardRun<E>::run_all(std::vector<Direction>& directions) const {
  if (plan_.diagonal) {
    run_diagonally(directions);
  } else {
    run_directions(directions);
  }
  for (Direction& direction : directions) direction.gradients.finish();
  memory_.check();
  directions.clear();
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
