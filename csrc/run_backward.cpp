// The backward pass of a stack: layers from the last to the first, each direction in turn. A
// direction's time loop runs in chunks; after each the gradients of its pre-activations, still in
// cache, go into those of the input and of the weights.
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "buffers.h"
#include "plan.h"

namespace fastrnn {
namespace {

// Rows of gate gradients in a chunk: the order of summation of a weight's gradient follows it, so
// that nothing but the arguments may decide. Longer chunks are 2% faster for an LSTM; for the
// others torch.nn takes less memory, and it is memory that counts.
template <typename E>
int64_t chunk_rows(const Stack& stack) {
  return stack.cell == Cell::lstm && !stack.projected && kIsComputed<E> ? 768 : 256;
}

// Weights that serve at most so many tiles of rows are not worth a copy.
constexpr int64_t kRowsInPlace = 2;

// Where the gradients of one direction's weights are summed, if in memory; null: not wanted.
template <typename C>
struct WeightGradients {
  C *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

// One direction of one layer.
template <typename E>
struct Direction {
  BackwardArgs<E> args;
  Sequence<const E> x;  // (T, N, I)
  Sequence<E> dx;       // likewise, or data null
  bool accumulate_dx;   // the other direction has been there
  const E* h0;
  int64_t h0_stride;
  const E* unprojected;
  int64_t input;
  CellWeights<E> weights;
  const at::Tensor* dweights;  // of this direction, undefined where not wanted
};

template <typename E>
class BackwardRun {
 public:
  using C = Compute<E>;

  // sums_dw_hh: whether every w_hh wants its gradient.
  BackwardRun(const Stack& stack, bool wants_dh0, bool sums_dw_hh)
      : stack_(stack),
        wants_dh0_(wants_dh0),
        input_(stack.widest_input()),
        chunk_steps_(
            std::min(stack.steps, std::max<int64_t>(1, chunk_rows<E>(stack) / stack.batch))),
        slots_(chunk_steps_ < stack.steps ? chunk_steps_ + 1 : chunk_steps_),
        in_one_block_(chunk_steps_ == stack.steps && stack.rows <= kGradientRows),
        shares_dw_hh_(
            sums_dw_hh && chunk_steps_ == stack.steps && (kIsComputed<E> || !in_one_block_) &&
            packed_size(stack.gates(), stack.width, w_hh_rows()) <= stack.gates() * stack.width),
        threads_(thread_count(stack, stack.gates() * (stack.input + stack.width), 4. * stack.rows)),
        scratch_size_(Arena<C>::padded(measure_scratch())),
        arena_(measure(), false) {
    for (const Part& part : parts()) *part.pointer = arena_.take(part.elements);
    std::fill_n(zeros_, std::max(stack.hidden, stack.width), C(0));
    clear_padding(dgates_, stack.gates());
    if (stack.projected) clear_padding(dprojected_, stack.width);
    const int64_t rows = chunk_steps_ * stack.batch;
    dgate_rows_.resize(rows);
    x_rows_.resize(rows);
    h_rows_.resize(rows);
    dx_rows_.resize(rows);
    if (stack.projected) {
      dprojected_rows_.resize(rows);
      m_rows_.resize(rows);
    }
  }

  const E* zeros() const { return reinterpret_cast<const E*>(zeros_); }
  void run(Direction<E>& direction);

 private:
  struct Part {
    C** pointer;
    int64_t elements;
  };

  // The parts of the arena.
  std::vector<Part> parts() {
    const int64_t gates = stack_.gates(), width = stack_.width, hidden = stack_.hidden;
    const int64_t slot_rows = slots_ * stack_.batch;
    std::vector<Part> parts = {
        {&packed_w_hh_, shares_dw_hh_ ? 0 : packed_size(gates, width, w_hh_rows())},
        {&dgates_, slot_rows * kernels_.operands(gates)},
        {&zeros_, std::max(hidden, width)},
        {&scratch_, threads_ * scratch_size_}};
    if (stack_.projected) {
      parts.push_back({&packed_w_hr_, packed_size(width, hidden, stack_.rows)});
      parts.push_back({&dprojected_, slot_rows * kernels_.operands(width)});
    }
    if (!kIsComputed<E>) {
      const auto sums = [&](int64_t elements) { return in_one_block_ ? 0 : elements; };
      parts.push_back({&sums_.w_ih, sums(gates * input_)});
      parts.push_back({&sums_.w_hh, sums(gates * width)});
      parts.push_back({&sums_.b_ih, gates});
      if (stack_.projected) parts.push_back({&sums_.w_hr, sums(width * hidden)});
    }
    return parts;
  }
  int64_t measure() {
    int64_t total = 0;
    for (const Part& part : parts()) total += Arena<C>::guarded(part.elements);
    return total;
  }

  // What follows a row's last element in its operands is read, and never written.
  void clear_padding(C* rows, int64_t width) const {
    if (!kernels_.pads(width)) return;
    std::fill_n(rows, slots_ * stack_.batch * kernels_.operands(width), C(0));
  }
  // Of the products over a chunk's rows, one after the other.
  int64_t measure_scratch() const {
    const int64_t gates = stack_.gates(), width = stack_.width, hidden = stack_.hidden;
    const int64_t rows = std::min(stack_.rows, chunk_steps_ * stack_.batch);
    int64_t most = 0;
    for (const int64_t input : stack_.layer_inputs()) {
      most = std::max(
          {most, kernels_.outer_product_scratch(gates, input, width, rows),
           kernels_.row_product_scratch(gates, input, reads_w_ih_in_place() ? stack_.rows : 0)});
    }
    if (!stack_.projected) return most;
    return std::max(most, kernels_.outer_product_scratch(width, hidden, 0, rows));
  }
  // Whether weights that serve so many rows are better read where they lie.
  bool reads_in_place(int64_t rows) const {
    return kernels_.reads_in_place && rows <= kRowsInPlace * kernels_.tile_rows;
  }
  // For dx all rows are multiplied at once. That is faster where the weights lie if they stay in
  // L2, and also if the sums, which are then all in use at the same time, are no more than a packed
  // panel.
  bool reads_w_ih_in_place() const {
    if (!kernels_.reads_in_place) return false;
    const int64_t gates = stack_.gates();
    return reads_in_place(stack_.rows) || gates * input_ * int64_t{sizeof(E)} <= kSmallWeights ||
           stack_.rows * input_ <= gates * kPanelVectors * kernels_.lanes;
  }
  // Rows that w_hh serves.
  int64_t w_hh_rows() const { return stack_.rows - (wants_dh0_ ? 0 : stack_.batch); }
  // What pack_columns needs for w (k, columns).
  int64_t packed_size(int64_t k, int64_t columns, int64_t rows) const {
    if (rows == 0) return 0;
    return reads_in_place(rows) ? kernels_.operands(k) * kPanelVectors * kernels_.lanes
                                : kernels_.packed_columns(k, columns);
  }
  ColumnWeights<C> pack_columns(const E* w, int64_t k, int64_t columns, C* packed, bool in_place,
                                const Member& member);
  void pack(Direction<E>& direction, const Member& member);
  int64_t collect_rows(const Direction<E>& direction, int64_t s_begin, int64_t s_end,
                       const Member& member);
  WeightGradients<C> gradients_of(const Direction<E>& direction);
  void finish_chunk(const Direction<E>& direction, const WeightGradients<C>& gradients,
                    int64_t rows, bool first, bool last, const Member& member);
  void finish_gradients(const Direction<E>& direction, const WeightGradients<C>& gradients);

  const Stack& stack_;
  const Kernels<E>& kernels_ = kernels<E>();
  const bool wants_dh0_;
  const int64_t input_;        // the widest layer's
  const int64_t chunk_steps_;  // of the time loop
  const int64_t slots_;        // steps whose gate gradients are kept: a chunk's and the one before
  // Sums of another type than the weights' are then stored as gradients, and not in memory of their
  // own.
  const bool in_one_block_;
  // A single chunk is done with the packed w_hh before the gradient of w_hh is written: they share
  // memory if the one fits in the other.
  const bool shares_dw_hh_;
  const int threads_;
  const int64_t scratch_size_;
  C *packed_w_hh_ = nullptr, *packed_w_hr_ = nullptr, *dgates_ = nullptr, *dprojected_ = nullptr,
    *zeros_ = nullptr, *scratch_ = nullptr;
  WeightGradients<C> sums_{};  // where gradients of the weights are summed, if they are not C
  Arena<C> arena_;
  // The rows of a chunk, in the order of the loop:
  std::vector<const C*> dgate_rows_, dprojected_rows_;
  std::vector<const E*> x_rows_, h_rows_, m_rows_;
  std::vector<E*> dx_rows_;
};

// Packs this member's part of w (k, columns), or of the panel of it that cannot be read in place.
template <typename E>
ColumnWeights<Compute<E>> BackwardRun<E>::pack_columns(const E* w, int64_t k, int64_t columns,
                                                       C* packed, bool in_place,
                                                       const Member& member) {
  const int64_t panel_columns = kPanelVectors * kernels_.lanes;
  const int64_t full = columns / panel_columns, panels = kernels_.panels(columns);
  const int64_t panel_stride = kernels_.operands(k) * panel_columns;
  if (in_place) {
    // pack_columns writes panel p at p * panel_stride of its output.
    C* const partial = packed - full * panel_stride;
    if (member.index == 0) kernels_.pack_columns(w, k, columns, partial, full, panels);
    return {columns, reinterpret_cast<const C*>(w), columns, panel_columns, packed};
  }
  const auto [begin, end] = member.part(panels);
  kernels_.pack_columns(w, k, columns, packed, begin, end);
  return {columns, packed, panel_columns, panel_stride, packed + full * panel_stride};
}

template <typename E>
void BackwardRun<E>::pack(Direction<E>& direction, const Member& member) {
  const CellWeights<E>& weights = direction.weights;
  const int64_t gates = stack_.gates();
  BackwardArgs<E>& args = direction.args;
  // Every member packs; all find the same.
  if (stack_.steps > 1 || wants_dh0_) {
    const auto w_hh = pack_columns(weights.w_hh, gates, stack_.width, packed_w_hh_,
                                   reads_in_place(w_hh_rows()), member);
    if (member.index == 0) args.w_hh = w_hh;
  }
  if (stack_.projected) {
    const auto w_hr = pack_columns(weights.w_hr, stack_.width, stack_.hidden, packed_w_hr_,
                                   reads_in_place(stack_.rows), member);
    if (member.index == 0) args.w_hr = w_hr;
  }
}

// Gathers pointers to this member's part of the rows of steps [s_begin, s_end) of the loop; returns
// the number of all.
template <typename E>
int64_t BackwardRun<E>::collect_rows(const Direction<E>& direction, int64_t s_begin, int64_t s_end,
                                     const Member& member) {
  const BackwardArgs<E>& args = direction.args;
  const Schedule& schedule = args.schedule;
  const int64_t gates = kernels_.operands(stack_.gates());
  const int64_t width = kernels_.operands(stack_.width);
  int64_t rows_before = 0;
  for (int64_t s = s_begin; s < s_end; ++s) {
    const int64_t t = args.step(s), slot_row = s % slots_ * stack_.batch;
    const int64_t previous = args.reverse ? t + 1 : t - 1;
    const bool exists = previous >= 0 && previous < schedule.steps;
    const int64_t previous_rows = exists ? schedule.rows_at(previous) : 0;
    const auto [n_begin, n_end] = member.part(schedule.rows_at(t));
    for (int64_t n = n_begin; n < n_end; ++n) {
      const int64_t i = rows_before + n;
      dgate_rows_[i] = dgates_ + (slot_row + n) * gates;
      x_rows_[i] = direction.x.row(schedule, t, n);
      h_rows_[i] = n < previous_rows ? args.h.row(schedule, previous, n)
                                     : direction.h0 + n * direction.h0_stride;
      if (direction.dx.data) dx_rows_[i] = direction.dx.row(schedule, t, n);
      if (stack_.projected) {
        dprojected_rows_[i] = dprojected_ + (slot_row + n) * width;
        m_rows_[i] = direction.unprojected + (schedule.offset(t) + n) * stack_.hidden;
      }
    }
    rows_before += schedule.rows_at(t);
  }
  return rows_before;
}

// Where the gradients of a direction's weights are summed.
template <typename E>
WeightGradients<Compute<E>> BackwardRun<E>::gradients_of(const Direction<E>& direction) {
  const auto sums = [&](int64_t i, C* own) -> C* {
    const at::Tensor& gradient = direction.dweights[i];
    if (!gradient.defined()) return nullptr;
    if constexpr (kIsComputed<E>) return mutable_elements<C>(gradient);
    return own;
  };
  WeightGradients<C> gradients{};
  gradients.w_ih = sums(0, sums_.w_ih);
  gradients.w_hh = sums(1, sums_.w_hh);
  if (stack_.has_biases) {
    gradients.b_ih = sums(2, sums_.b_ih);
    gradients.b_hh = sums(3, sums_.b_ih);
  }
  if (stack_.projected) gradients.w_hr = sums(stack_.weights_per_cell() - 1, sums_.w_hr);
  return gradients;
}

// Both biases have the same gradient, and sums of another type than theirs are converted.
template <typename E>
void BackwardRun<E>::finish_gradients(const Direction<E>& direction,
                                      const WeightGradients<C>& gradients) {
  if constexpr (kIsComputed<E>) {
    if (gradients.b_ih && gradients.b_hh) {
      std::copy_n(gradients.b_ih, stack_.gates(), gradients.b_hh);
    }
  } else {
    const auto convert = [&](int64_t i, C* sums) {
      const at::Tensor& gradient = direction.dweights[i];
      if (!sums) return;
      gradient.copy_(at::from_blob(sums, gradient.sizes(), gradient.options().dtype(at::kFloat)));
    };
    if (stack_.has_biases) {
      convert(2, gradients.b_ih);
      convert(3, gradients.b_hh);
    }
  }
}

template <typename E>
void BackwardRun<E>::finish_chunk(const Direction<E>& direction,
                                  const WeightGradients<C>& gradients, int64_t rows, bool first,
                                  bool last, const Member& member) {
  C* const scratch = scratch_ + member.index * scratch_size_;
  // The last chunk leaves sums of another type than the weights' in their gradients.
  const auto result = [&](const C* sums, int64_t i) {
    return last && sums && !kIsComputed<E> ? mutable_elements<E>(direction.dweights[i]) : nullptr;
  };
  if (direction.dx.data) {
    const auto [begin, end] = member.part(rows);
    kernels_.row_product(
        {dgate_rows_.data(), dx_rows_.data(), stack_.gates(), direction.input,
         direction.weights.w_ih, reads_w_ih_in_place(), direction.accumulate_dx, scratch},
        begin, end);
  }
  C* const bias_sums = gradients.b_ih ? gradients.b_ih : gradients.b_hh;
  if (gradients.w_ih || gradients.w_hh || bias_sums) {
    const auto [begin, end] = member.part(stack_.gates(), kernels_.tile_rows);
    kernels_.outer_product(
        {dgate_rows_.data(),
         rows,
         stack_.gates(),
         {{x_rows_.data(), direction.input, gradients.w_ih, result(gradients.w_ih, 0)},
          {h_rows_.data(), stack_.width, gradients.w_hh, result(gradients.w_hh, 1)}},
         bias_sums,
         !first,
         scratch},
        begin, end);
  }
  if (gradients.w_hr) {
    const auto [begin, end] = member.part(stack_.width, kernels_.tile_rows);
    kernels_.outer_product({dprojected_rows_.data(),
                            rows,
                            stack_.width,
                            {{m_rows_.data(), stack_.hidden, gradients.w_hr,
                              result(gradients.w_hr, stack_.weights_per_cell() - 1)},
                             {}},
                            nullptr,
                            !first,
                            scratch},
                           begin, end);
  }
}

template <typename E>
void BackwardRun<E>::run(Direction<E>& direction) {
  BackwardArgs<E>& args = direction.args;
  args.wants_dh0 = wants_dh0_;
  args.dgates = dgates_;
  args.dprojected = dprojected_;
  args.slots = slots_;
  const WeightGradients<C> gradients = gradients_of(direction);
  if (shares_dw_hh_) packed_w_hh_ = gradients.w_hh;
  const int64_t panels = kernels_.panels(std::max(stack_.hidden, stack_.width));
  const StepWork work = backward_work(stack_);
  GroupBarrier barrier;
  run_team(threads_, [&](const Member& member) {
    const Plan plan = make_plan(member.size, stack_, 1, panels, work);
    if (member.index == 0) barrier.size = plan.unit_parts;
    pack(direction, member);
    member.wait();
    const Assignment<C> mine = assign<C>(plan, stack_, member.index, panels, &barrier);
    for (int64_t s = 0; s < stack_.steps; s += chunk_steps_) {
      const int64_t s_end = std::min(s + chunk_steps_, stack_.steps);
      if (mine.works) kernels_.backward(args, mine.share, s, s_end);
      const int64_t rows = collect_rows(direction, s, s_end, member);
      member.wait();
      finish_chunk(direction, gradients, rows, s == 0, s_end == stack_.steps, member);
      member.wait();
    }
  });
  finish_gradients(direction, gradients);
  arena_.check();
}

template <typename E>
void backward(const Stack& stack, const at::Tensor& dy_given, const at::Tensor& dh,
              const at::Tensor& dc, bool wants_dh0, const at::Tensor& x_given, const at::Tensor& h0,
              const at::Tensor& c0, const std::vector<at::Tensor>& weights,
              const at::Tensor& y_given, const at::Tensor& reserve_tensor, const at::Tensor& dx,
              const std::vector<at::Tensor>& dweights) {
  using C = Compute<E>;
  const at::Tensor x = rows_contiguous(x_given), y = rows_contiguous(y_given);
  const at::Tensor dy = dy_given.defined() ? rows_contiguous(dy_given) : dy_given;
  // The reserve is only read; Reserve serves the forward pass too.
  const Reserve<E> reserve(stack, const_cast<E*>(elements<E>(reserve_tensor)));
  bool sums_dw_hh = true;
  for (int64_t cell = 0; cell < stack.cells(); ++cell) {
    sums_dw_hh &= dweights[cell * stack.weights_per_cell() + 1].defined();
  }
  BackwardRun<E> run(stack, wants_dh0, sums_dw_hh);
  const State<E> initial_h(h0, run.zeros(), stack.batch, stack.width);
  const State<E> initial_c(c0, run.zeros(), stack.batch, stack.hidden);
  C* const state_dh = dh.mutable_data_ptr<C>();
  C* const state_dc = stack.cell == Cell::lstm ? dc.mutable_data_ptr<C>() : nullptr;

  at::Tensor between[2];  // gradients of the outputs of layers
  Sequence<const E> output_gradient =
      dy.defined() ? input_sequence<E>(stack, dy) : Sequence<const E>{};
  for (int64_t layer = stack.layers - 1; layer >= 0; --layer) {
    Sequence<E> input_gradient{};
    if (layer > 0) {
      at::Tensor& buffer = between[layer % 2];
      if (!buffer.defined()) buffer = empty_buffer(stack.rows * stack.layer_width(), x.options());
      input_gradient = row_sequence<E>(stack, mutable_elements<E>(buffer), stack.layer_width());
    } else if (dx.defined()) {
      input_gradient = output_sequence<E>(stack, dx);
    }
    Sequence<const E> input = input_sequence<E>(stack, x);
    if (layer > 0) {
      E* const below =
          stack.drops_after(layer - 1) ? reserve.dropped[layer - 1] : reserve.outputs[layer - 1];
      input = read_only(row_sequence<E>(stack, below, stack.layer_width()));
    }
    const Sequence<const E> output =
        layer + 1 == stack.layers
            ? input_sequence<E>(stack, y)
            : read_only(row_sequence<E>(stack, reserve.outputs[layer], stack.layer_width()));

    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t cell = layer * stack.directions + d;
      Direction<E> direction{{},
                             input,
                             input_gradient,
                             d > 0,
                             initial_h.of_cell(cell),
                             initial_h.row_stride,
                             reserve.parts[cell].unprojected,
                             stack.layer_input(layer),
                             CellWeights<E>(stack, weights, cell),
                             dweights.data() + cell * stack.weights_per_cell()};
      BackwardArgs<E>& args = direction.args;
      args.cell = stack.cell;
      args.reverse = d == 1;
      args.projected = stack.projected;
      args.schedule = stack.schedule();
      args.hidden = stack.hidden;
      args.width = stack.width;
      args.dy = columns_from(output_gradient, d * stack.width);
      args.h = columns_from(output, d * stack.width);
      args.gates = reserve.parts[cell].gates;
      args.cells = reserve.parts[cell].cells;
      args.c0 = initial_c.of_cell(cell);
      args.c0_stride = initial_c.row_stride;
      args.dh = state_dh + cell * stack.batch * stack.width;
      if (state_dc) args.dc = state_dc + cell * stack.batch * stack.hidden;
      run.run(direction);
    }
    if (layer > 0 && stack.drops_after(layer - 1)) {
      between[layer % 2].mul_(
          at::from_blob(reserve.noise[layer - 1], {stack.rows * stack.layer_width()}, x.options()));
    }
    output_gradient = read_only(input_gradient);
  }
}

}  // namespace

void run_backward(const Stack& stack, const at::Tensor& dy, const at::Tensor& dh,
                  const at::Tensor& dc, bool wants_dh0, const at::Tensor& x,
                  const std::optional<at::Tensor>& h0, const std::optional<at::Tensor>& c0,
                  at::TensorList weights, const at::Tensor& y, const at::Tensor& reserve,
                  const at::Tensor& dx, const std::vector<at::Tensor>& dweights) {
  with_element(x.scalar_type(), [&](auto element) {
    backward<decltype(element)>(stack, dy, dh, dc, wants_dh0, x, contiguous_state(h0),
                                contiguous_state(c0), contiguous_all(weights), y, reserve, dx,
                                dweights);
  });
}

}  // namespace fastrnn
