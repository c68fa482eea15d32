// The backward pass of a stack: layers from the last to the first, each direction in turn. A
// direction's time loop runs in chunks; after each the gradients of its pre-activations, still in
// cache, go into those of the input and of the weights.
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "buffers.h"
#include "plan.h"

namespace fastrnn {
namespace {

// Rows of gate gradients in a chunk. Fixed: the order of summation of a weight's gradient follows
// it.
constexpr int64_t kChunkRows = 768;

// Rows of a weight's gradient are divided among threads in multiples of this, so that tiles are
// full.
constexpr int64_t kRowUnit = 48;

// What is wanted of one direction of one layer; null: not wanted.
template <typename T>
struct WeightGradients {
  T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;

  WeightGradients(const Stack& stack, const std::vector<at::Tensor>& gradients, int64_t cell) {
    const int64_t count = stack.weights_per_cell();
    const auto data = [&](int64_t i) {
      const at::Tensor& gradient = gradients[cell * count + i];
      return gradient.defined() ? gradient.mutable_data_ptr<T>() : nullptr;
    };
    w_ih = data(0);
    w_hh = data(1);
    b_ih = stack.has_biases ? data(2) : nullptr;
    b_hh = stack.has_biases ? data(3) : nullptr;
    w_hr = stack.projected ? data(count - 1) : nullptr;
  }
};

// One direction of one layer.
template <typename T>
struct Direction {
  BackwardArgs<T> args;
  Sequence<const T> x;  // (T, N, I)
  Sequence<T> dx;       // likewise, or data null
  bool accumulate_dx;   // the other direction has been there
  const T* h0;
  int64_t h0_stride;
  const T* unprojected;
  int64_t input;
  CellWeights<T> weights;
  WeightGradients<T> gradients;
};

template <typename T>
class BackwardRun {
 public:
  BackwardRun(const Stack& stack, const at::TensorOptions& options)
      : stack_(stack),
        input_(stack.layers > 1 ? std::max(stack.input, stack.layer_width()) : stack.input),
        chunk_steps_(std::min(stack.steps, std::max<int64_t>(1, kChunkRows / stack.batch))),
        slots_(chunk_steps_ < stack.steps ? chunk_steps_ + 1 : chunk_steps_),
        threads_(thread_count(4. * stack.rows * stack.gates() * (stack.input + stack.width))),
        scratch_size_(Arena<T>::padded(
            kernels_.outer_product_scratch(std::max({input_, stack.width, stack.hidden})))),
        arena_(measure(), options) {
    const int64_t slot_rows = slots_ * stack.batch;
    packed_w_hh_ = arena_.take(kernels_.padded(stack.width) * stack.gates());
    packed_w_ih_ = arena_.take(kernels_.padded(input_) * stack.gates());
    dgates_ = arena_.take(slot_rows * stack.gates());
    packed_w_hr_ =
        stack.projected ? arena_.take(kernels_.padded(stack.hidden) * stack.width) : nullptr;
    dprojected_ = stack.projected ? arena_.take(slot_rows * stack.width) : nullptr;
    zeros_ = arena_.take(std::max(stack.hidden, stack.width));
    scratch_ = arena_.take(threads_ * scratch_size_);
    std::fill_n(zeros_, std::max(stack.hidden, stack.width), T(0));
    const int64_t rows = chunk_steps_ * stack.batch;
    for (auto* pointers : {&dgate_rows_, &dprojected_rows_, &x_rows_, &h_rows_, &m_rows_}) {
      pointers->resize(rows);
    }
    dx_rows_.resize(rows);
  }

  const T* zeros() const { return zeros_; }
  void run(Direction<T>& direction);

 private:
  int64_t measure() const {
    const auto padded = Arena<T>::padded;
    const int64_t slot_rows = slots_ * stack_.batch;
    int64_t total = padded(kernels_.padded(stack_.width) * stack_.gates()) +
                    padded(kernels_.padded(input_) * stack_.gates()) +
                    padded(slot_rows * stack_.gates()) +
                    padded(std::max(stack_.hidden, stack_.width)) + threads_ * scratch_size_;
    if (stack_.projected) {
      total +=
          padded(kernels_.padded(stack_.hidden) * stack_.width) + padded(slot_rows * stack_.width);
    }
    return total;
  }

  void pack(const Direction<T>& direction, const Member& member);
  int64_t collect_rows(const Direction<T>& direction, int64_t s_begin, int64_t s_end);
  void finish_chunk(const Direction<T>& direction, int64_t rows, bool first, const Member& member);
  void weight_gradient(const T* const* a, int64_t a_columns, const T* const* b, int64_t b_columns,
                       int64_t rows, T* out, T* sums, bool first, const Member& member);

  const Stack& stack_;
  const Kernels<T>& kernels_ = kernels<T>();
  const int64_t input_;        // the widest layer's
  const int64_t chunk_steps_;  // of the time loop
  const int64_t slots_;        // steps whose gate gradients are kept: a chunk's and the one before
  const int threads_;
  const int64_t scratch_size_;
  Arena<T> arena_;
  T *packed_w_hh_, *packed_w_ih_, *packed_w_hr_, *dgates_, *dprojected_, *zeros_, *scratch_;
  // The rows of a chunk, in the order of the loop:
  std::vector<const T*> dgate_rows_, dprojected_rows_, x_rows_, h_rows_, m_rows_;
  std::vector<T*> dx_rows_;
};

template <typename T>
void BackwardRun<T>::pack(const Direction<T>& direction, const Member& member) {
  const int64_t gates = stack_.gates();
  auto part = member.part(kernels_.panels(stack_.width));
  kernels_.pack_columns(direction.weights.w_hh, gates, stack_.width, packed_w_hh_, part.first,
                        part.second);
  if (direction.dx.data) {
    part = member.part(kernels_.panels(direction.input));
    kernels_.pack_columns(direction.weights.w_ih, gates, direction.input, packed_w_ih_, part.first,
                          part.second);
  }
  if (stack_.projected) {
    part = member.part(kernels_.panels(stack_.hidden));
    kernels_.pack_columns(direction.weights.w_hr, stack_.width, stack_.hidden, packed_w_hr_,
                          part.first, part.second);
  }
}

// Gathers pointers to the rows of steps [s_begin, s_end) of the loop; returns their number.
template <typename T>
int64_t BackwardRun<T>::collect_rows(const Direction<T>& direction, int64_t s_begin,
                                     int64_t s_end) {
  const BackwardArgs<T>& args = direction.args;
  const Schedule& schedule = args.schedule;
  int64_t i = 0;
  for (int64_t s = s_begin; s < s_end; ++s) {
    const int64_t t = args.step(s), slot_row = s % slots_ * stack_.batch;
    const int64_t previous = args.reverse ? t + 1 : t - 1;
    const bool exists = previous >= 0 && previous < schedule.steps;
    const int64_t previous_rows = exists ? schedule.rows_at(previous) : 0;
    for (int64_t n = 0; n < schedule.rows_at(t); ++n, ++i) {
      dgate_rows_[i] = dgates_ + (slot_row + n) * stack_.gates();
      x_rows_[i] = direction.x.row(schedule, t, n);
      h_rows_[i] = n < previous_rows ? args.h.row(schedule, previous, n)
                                     : direction.h0 + n * direction.h0_stride;
      if (direction.dx.data) dx_rows_[i] = direction.dx.row(schedule, t, n);
      if (stack_.projected) {
        dprojected_rows_[i] = dprojected_ + (slot_row + n) * stack_.width;
        m_rows_[i] = direction.unprojected + (schedule.offset(t) + n) * stack_.hidden;
      }
    }
  }
  return i;
}

template <typename T>
void BackwardRun<T>::weight_gradient(const T* const* a, int64_t a_columns, const T* const* b,
                                     int64_t b_columns, int64_t rows, T* out, T* sums, bool first,
                                     const Member& member) {
  if (!out && !sums) return;
  const auto [begin, end] = member.part(a_columns, kRowUnit);
  T* const scratch = scratch_ + member.index * scratch_size_;
  kernels_.outer_product({a, b, rows, b_columns, out, sums, !first, scratch}, begin, end);
}

template <typename T>
void BackwardRun<T>::finish_chunk(const Direction<T>& direction, int64_t rows, bool first,
                                  const Member& member) {
  const WeightGradients<T>& gradients = direction.gradients;
  const int64_t gates = stack_.gates();
  if (direction.dx.data) {
    const auto [begin, end] = member.part(rows);
    kernels_.row_product({dgate_rows_.data(), dx_rows_.data(), gates, direction.input, packed_w_ih_,
                          direction.accumulate_dx},
                         begin, end);
  }
  T* const sums = gradients.b_ih ? gradients.b_ih : gradients.b_hh;
  weight_gradient(dgate_rows_.data(), gates, x_rows_.data(), direction.input, rows, gradients.w_ih,
                  sums, first, member);
  weight_gradient(dgate_rows_.data(), gates, h_rows_.data(), stack_.width, rows, gradients.w_hh,
                  nullptr, first, member);
  if (stack_.projected) {
    weight_gradient(dprojected_rows_.data(), stack_.width, m_rows_.data(), stack_.hidden, rows,
                    gradients.w_hr, nullptr, first, member);
  }
}

template <typename T>
void BackwardRun<T>::run(Direction<T>& direction) {
  BackwardArgs<T>& args = direction.args;
  args.packed_w_hh = packed_w_hh_;
  args.packed_w_hr = packed_w_hr_;
  args.dgates = dgates_;
  args.dprojected = dprojected_;
  args.slots = slots_;
  const int64_t panels = kernels_.panels(std::max(stack_.hidden, stack_.width));
  GroupBarrier barrier;
  int64_t rows = 0;
  run_team(threads_, [&](const Member& member) {
    const Plan plan = make_plan(member.size, stack_, 1, panels);
    if (member.index == 0) barrier.size = plan.unit_parts;
    pack(direction, member);
    member.wait();
    const Assignment<T> mine = assign<T>(plan, stack_, member.index, panels, &barrier);
    for (int64_t s = 0; s < stack_.steps; s += chunk_steps_) {
      const int64_t s_end = std::min(s + chunk_steps_, stack_.steps);
      if (mine.works) kernels_.backward(args, mine.share, s, s_end);
      if (member.index == 0) rows = collect_rows(direction, s, s_end);
      member.wait();
      finish_chunk(direction, rows, s == 0, member);
      member.wait();
    }
  });
  const WeightGradients<T>& gradients = direction.gradients;
  if (gradients.b_ih && gradients.b_hh) {
    std::copy_n(gradients.b_ih, stack_.gates(), gradients.b_hh);
  }
}

template <typename T>
void backward(const Stack& stack, const at::Tensor& dy_given, const at::Tensor& dh,
              const at::Tensor& dc, const at::Tensor& x_given, const at::Tensor& h0,
              const at::Tensor& c0, const std::vector<at::Tensor>& weights,
              const at::Tensor& reserve_tensor, const at::Tensor& dx,
              const std::vector<at::Tensor>& dweights) {
  const at::Tensor x = rows_contiguous(x_given);
  const at::Tensor dy = dy_given.defined() ? rows_contiguous(dy_given) : dy_given;
  // The reserve is only read; Reserve serves the forward pass too.
  const Reserve<T> reserve(stack, const_cast<T*>(reserve_tensor.const_data_ptr<T>()));
  BackwardRun<T> run(stack, x.options());
  const State<T> initial_h(h0, run.zeros(), stack.batch, stack.width);
  const State<T> initial_c(c0, run.zeros(), stack.batch, stack.hidden);
  T* const state_dh = dh.mutable_data_ptr<T>();
  T* const state_dc = stack.cell == Cell::lstm ? dc.mutable_data_ptr<T>() : nullptr;

  at::Tensor between[2];  // gradients of the outputs of layers
  Sequence<const T> output_gradient =
      dy.defined() ? input_sequence<T>(stack, dy) : Sequence<const T>{};
  for (int64_t layer = stack.layers - 1; layer >= 0; --layer) {
    Sequence<T> input_gradient{};
    if (layer > 0) {
      at::Tensor& buffer = between[layer % 2];
      if (!buffer.defined()) buffer = empty_buffer(stack.rows * stack.layer_width(), x.options());
      input_gradient =
          row_sequence<T>(stack, buffer.template mutable_data_ptr<T>(), stack.layer_width());
    } else if (dx.defined()) {
      input_gradient = output_sequence<T>(stack, dx);
    }
    Sequence<const T> input = input_sequence<T>(stack, x);
    if (layer > 0) {
      T* const below =
          stack.drops_after(layer - 1) ? reserve.dropped[layer - 1] : reserve.outputs[layer - 1];
      input = read_only(row_sequence<T>(stack, below, stack.layer_width()));
    }
    const Sequence<const T> output =
        read_only(row_sequence<T>(stack, reserve.outputs[layer], stack.layer_width()));

    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t cell = layer * stack.directions + d;
      Direction<T> direction{{},
                             input,
                             input_gradient,
                             d > 0,
                             initial_h.of_cell(cell),
                             initial_h.row_stride,
                             reserve.parts[cell].unprojected,
                             stack.layer_input(layer),
                             CellWeights<T>(stack, weights, cell),
                             WeightGradients<T>(stack, dweights, cell)};
      BackwardArgs<T>& args = direction.args;
      args.cell = stack.cell;
      args.reverse = d == 1;
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
                  const at::Tensor& dc, const at::Tensor& x, const std::optional<at::Tensor>& h0,
                  const std::optional<at::Tensor>& c0, at::TensorList weights,
                  const at::Tensor& reserve, const at::Tensor& dx,
                  const std::vector<at::Tensor>& dweights) {
  const auto run = x.scalar_type() == at::kFloat ? backward<float> : backward<double>;
  run(stack, dy, dh, dc, x, contiguous_state(h0), contiguous_state(c0), contiguous_all(weights),
      reserve, dx, dweights);
}

}  // namespace fastrnn
