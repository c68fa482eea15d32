// The forward pass of a stack: layers one after the other, each divided among threads; or all at
// the same time, along the diagonal.
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mul.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <array>

#include "buffers.h"
#include "diagonal.h"
#include "plan.h"

namespace fastrnn {
namespace {

// Which weights are packed as a whole before the first step.
struct Packs {
  bool ih, hh, hr;
};

// Memory that the layers use in turn or, if they run at the same time, each.
template <typename E>
class Workspace {
 public:
  using C = Compute<E>;

  // What a direction of a layer needs: see ForwardArgs.
  struct CellMemory {
    C *packed_ih, *packed_hh, *bias, *packed_w_hr, *unprojected, *c;
  };
  c10::SmallVector<CellMemory, 2> cells;  // of one layer or, if diagonal, of all
  C* zeros = nullptr;                     // room for the initial state where none is given

  Workspace(const Stack& stack, const Kernels<E>& kernels, bool training, Packs packs,
            bool diagonal, int threads)
      : cells(diagonal ? stack.cells() : stack.directions),
        stack_(stack),
        kernels_(kernels),
        packs_(packs),
        training_(training),
        diagonal_(diagonal),
        input_(stack.widest_input()),
        scratch_size_(measure_scratch(threads)),
        arena_(measure(), !training) {
    for_parts([&](C*& part, int64_t elements) { part = arena_.take(elements); });
    std::fill_n(initial_zeros(), std::max(stack.hidden, stack.width), E{});
  }

  void check() const { arena_.check(); }
  E* initial_zeros() const { return reinterpret_cast<E*>(zeros); }
  // A member's own scratch: what a team of fewer members gets is shared out among them.
  C* scratch_of(const Member& member) const {
    return scratch_ + member.index * (scratch_size_ / member.size / kPartUnit * kPartUnit);
  }

 private:
  static constexpr int64_t kPartUnit = Arena<C>::padded(1);

  // Calls f(pointer, elements) for each part.
  template <typename F>
  void for_parts(F&& f) {
    for (size_t i = 0; i < cells.size(); ++i) {
      CellMemory& cell = cells[i];
      const int64_t input = diagonal_ ? stack_.layer_input(i) : input_;
      if (packs_.ih) {
        f(cell.packed_ih, kernels_.packed_gates(stack_.cell, input, stack_.hidden));
      }
      if (packs_.hh) {
        f(cell.packed_hh, kernels_.packed_gates(stack_.cell, stack_.width, stack_.hidden));
      }
      f(cell.bias, panels() * kPanelVectors * kernels_.lanes);
      if (stack_.projected) {
        if (packs_.hr) f(cell.packed_w_hr, kernels_.packed_columns(stack_.hidden, stack_.width));
        f(cell.unprojected, training_ ? 0 : stack_.batch * stack_.hidden);
      }
      if (stack_.cell == Cell::lstm && !kIsComputed<E>) {
        f(cell.c, stack_.batch * stack_.hidden);
      }
    }
    f(zeros, std::max(stack_.hidden, stack_.width));
    f(scratch_, scratch_size_);
  }
  int64_t measure() {
    int64_t total = 0;
    for_parts([&](C*&, int64_t elements) { total += Arena<C>::guarded(elements); });
    return total;
  }
  int64_t panels() const { return kernels_.cell_panels(stack_.cell, stack_.hidden); }

  // Of all members of a team, of which torch may make a smaller one.
  int64_t measure_scratch(int threads) const {
    if (diagonal_) return threads * scratch_for(stack_.batch, panels());
    int64_t most = 0;
    for (int size = 1; size <= threads; ++size) {
      const Plan plan = make_plan(size, stack_, stack_.directions, panels(), forward_work(stack_));
      for (int part = 0; part < plan.row_parts; ++part) {
        const auto [begin, end] = split_rows(stack_, plan.row_parts, part);
        most = std::max(most, size * scratch_for(end - begin, panels_of(plan)));
      }
    }
    return most;
  }
  int64_t scratch_for(int64_t share_rows, int64_t share_panels) const {
    int64_t most = 0;
    for (const int64_t input : stack_.layer_inputs()) {
      most = std::max(most, kernels_.forward_scratch({stack_.steps, input, stack_.hidden,
                                                      stack_.width, packs_.ih, packs_.hh,
                                                      stack_.projected, share_rows, share_panels}));
    }
    return Arena<C>::padded(most);
  }
  int64_t panels_of(const Plan& plan) const {
    return Kernels<E>::divide_up(panels(), plan.unit_parts);
  }

  const Stack& stack_;
  const Kernels<E>& kernels_;
  const Packs packs_;
  const bool training_, diagonal_;
  const int64_t input_;  // the widest layer's
  const int64_t scratch_size_;
  C* scratch_ = nullptr;
  Arena<C> arena_;
};

// Most steps at which weights are read in place: by whether vectors have 512 bits, whether elements
// are what is computed with, what is in spans (all columns, half of them and more, fewer), and the
// batch: 1, 2 to 3, 4 to 5; or 1, 2, 3 where a tile has no more rows.
constexpr int64_t kMostStepsInPlace[2][2][3][3] = {
    {{{14, 10, 6}, {4, 3, 2}, {1, 1, 1}}, {{8, 6, 3}, {4, 3, 2}, {1, 1, 1}}},
    {{{16, 7, 7}, {10, 6, 4}, {2, 2, 1}}, {{16, 7, 7}, {10, 6, 4}, {3, 2, 1}}}};

// Whether weights are packed as a whole before the first step. Reading them where they lie at each
// step costs less for few steps of one block of rows, the more so if they are in spans; so does
// packing a panel before it is used, for one step.
template <typename E>
bool packs_weights(const Stack& stack, const Kernels<E>& kernels) {
  if (stack.steps == 1) return false;
  for (const int64_t input : stack.layer_inputs()) {
    if (!kernels.reads_rows_in_place(input)) return true;
  }
  if (!kernels.reads_rows_in_place(stack.width)) return true;
  if (stack.batch >= kHoistBelow || stack.batch > kernels.tile_rows) return true;
  const int64_t x = kernels.operands(stack.layer_input(0)), h = kernels.operands(stack.width);
  const int64_t in_spans = whole_spans(x) + whole_spans(h);
  const int columns = in_spans == x + h ? 0 : 2 * in_spans >= x + h ? 1 : 2;
  const bool wide = kernels.lanes * sizeof(Compute<E>) == 64;
  const int64_t batch = kernels.tile_rows > 3 ? stack.batch / 2 : stack.batch - 1;
  return stack.steps > kMostStepsInPlace[wide][kIsComputed<E>][columns][batch];
}

// Whether w_ih too is packed as a whole where w_hh is. It is not if x of all steps is few enough
// rows to be multiplied ahead at once: its panels, each wanted once, are then packed when they are,
// into memory that is in cache. But where rows are divided among threads, each would pack all.
template <typename E>
bool packs_input(const Stack& stack, int threads, int64_t panels) {
  constexpr int64_t kSmallBytes = 128 << 10;
  const int64_t input = stack.widest_input();
  if (stack.gates() * input * int64_t{sizeof(E)} <= kSmallBytes) return true;
  // The products then take up to twice the memory of the packed weights.
  if (stack.rows > std::min(2 * input, kMostHoisted)) return true;
  return make_plan(threads, stack, stack.directions, panels, forward_work(stack)).row_parts > 1;
}

// Packs this member's part of one direction's weights.
template <typename E>
void pack(const Kernels<E>& kernels, const ForwardArgs<E>& args, const CellWeights<E>& weights,
          const typename Workspace<E>::CellMemory& memory, const Member& member) {
  const auto [begin, end] = member.part(kernels.cell_panels(args.cell, args.hidden));
  kernels.pack_bias(args.cell, weights.b_ih, weights.b_hh, args.hidden, memory.bias, begin, end);
  if (args.packed_ih) {
    kernels.pack_gates(args.cell, args.w_ih, args.input, args.hidden, memory.packed_ih, begin, end);
  }
  if (args.packed_hh) {
    kernels.pack_gates(args.cell, args.w_hh, args.width, args.hidden, memory.packed_hh, begin, end);
  }
  if (args.packed_w_hr) {
    const auto [first, last] = member.part(kernels.panels(args.width));
    kernels.pack_gates(Cell::rnn_tanh, args.w_hr, args.hidden, args.width, memory.packed_w_hr,
                       first, last);
  }
}

template <typename E>
void run_layer(const Stack& stack, const ForwardArgs<E>* args, const CellWeights<E>* weights,
               const Workspace<E>& workspace, int threads) {
  const Kernels<E>& kernels = fastrnn::kernels<E>();
  const int64_t panels = kernels.cell_panels(stack.cell, stack.hidden);
  GroupBarrier barriers[2];
  run_team(threads, [&](const Member& member) {
    const Plan plan = make_plan(member.size, stack, stack.directions, panels, forward_work(stack));
    if (member.index == 0) barriers[0].size = barriers[1].size = plan.unit_parts;
    // Each direction by those who read it.
    const int group_size = member.size / plan.direction_groups;
    const Member packer{member.index % group_size, group_size, nullptr};
    for (int64_t d = 0; d < stack.directions; ++d) {
      if (d % plan.direction_groups != member.index / group_size) continue;
      pack(kernels, args[d], weights[d], workspace.cells[d], packer);
    }
    member.wait();
    auto mine = assign<Compute<E>>(plan, stack, member.index, panels, barriers);
    if (!mine.works) return;
    mine.share.scratch = workspace.scratch_of(member);
    for (int64_t d = 0; d < stack.directions; ++d) {
      if (d % plan.direction_groups != mine.direction_group) continue;
      kernels.forward(args[d], mine.share, 0, stack.steps);
    }
  });
}

// All layers of one direction at the same time.
template <typename E>
void run_diagonally(const Stack& stack, const ForwardArgs<E>* args, const CellWeights<E>* weights,
                    const Workspace<E>& workspace, int threads) {
  const Kernels<E>& kernels = fastrnn::kernels<E>();
  const int64_t panels = kernels.cell_panels(stack.cell, stack.hidden);
  Diagonal diagonal(stack.layers, Kernels<E>::divide_up(stack.steps, kDiagonalSteps));
  run_team(threads, [&](const Member& member) {
    for (int64_t layer = 0; layer < stack.layers; ++layer) {
      pack(kernels, args[layer], weights[layer], workspace.cells[layer], member);
    }
    member.wait();
    const Share<Compute<E>> share{0,       stack.batch, 0, panels, workspace.scratch_of(member),
                                  nullptr, nullptr};
    diagonal.work([&](int64_t layer, int64_t block) {
      const int64_t begin = block * kDiagonalSteps;
      kernels.forward(args[layer], share, begin, std::min(begin + kDiagonalSteps, stack.steps));
    });
  });
}

// As diagonal_threads.
template <typename E>
int find_diagonal(const Stack& stack, const Kernels<E>& kernels, int threads) {
  int64_t packed = 0;
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    for (const int64_t k : {stack.layer_input(layer), stack.width}) {
      packed += kernels.packed_gates(stack.cell, k, stack.hidden);
    }
  }
  return diagonal_threads(stack, threads, kernels.cell_panels(stack.cell, stack.hidden),
                          packed * sizeof(Compute<E>));
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

  Packs packs;
  packs.hh = packs_weights(stack, kernels);
  const int64_t weights_of_layer = stack.directions * stack.gates() * (stack.input + stack.width);
  int threads = thread_count(stack, weights_of_layer, 2. * stack.rows);
  const int at_once = find_diagonal(stack, kernels, threads);
  const bool diagonal = at_once > 0;
  if (diagonal) threads = at_once;
  const int64_t panels = kernels.cell_panels(stack.cell, stack.hidden);
  packs.ih = packs.hh && (diagonal || packs_input<E>(stack, threads, panels));
  // A panel of w_hr is not packed before it is used, as those of w_hh are for more rows.
  packs.hr = packs.hh || !kernels.reads_in_place || stack.batch > kernels.tile_rows;
  Workspace<E> workspace(stack, kernels, training, packs, diagonal, threads);
  const State<E> initial_h(h0, workspace.initial_zeros(), stack.batch, stack.width);
  const State<E> initial_c(c0, workspace.initial_zeros(), stack.batch, stack.hidden);
  E* const final_h = mutable_elements<E>(h_n);
  E* const final_c = stack.cell == Cell::lstm ? mutable_elements<E>(c_n) : nullptr;

  // Of this thread, whose last call may well have read the same weights.
  static thread_local int64_t steps_before = 0;

  // Outputs of layers, where no reserve keeps them. On the diagonal layers two apart run at once.
  c10::SmallVector<at::Tensor, 2> between(diagonal ? stack.layers : 2);
  c10::SmallVector<ForwardArgs<E>, 2> args(stack.cells());
  std::vector<CellWeights<E>> cell_weights;
  Sequence<const E> input = input_sequence<E>(stack, x);
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    const bool last = layer + 1 == stack.layers;
    Sequence<E> output;
    if (last) {
      output = output_sequence<E>(stack, y);
    } else if (training) {
      output = row_sequence<E>(stack, reserve->outputs[layer], stack.layer_width());
    } else {
      at::Tensor& buffer = between[layer % between.size()];
      if (!buffer.defined()) buffer = empty_buffer(stack.rows * stack.layer_width(), x.options());
      output = row_sequence<E>(stack, mutable_elements<E>(buffer), stack.layer_width());
    }

    for (int64_t d = 0; d < stack.directions; ++d) {
      const int64_t cell = layer * stack.directions + d;
      cell_weights.emplace_back(stack, weights, cell);
      const auto& memory = workspace.cells[cell % workspace.cells.size()];
      ForwardArgs<E>& a = args[cell];
      a.cell = stack.cell;
      a.reverse = d == 1;
      a.steps_before = steps_before;
      a.schedule = stack.schedule();
      a.input = stack.layer_input(layer);
      a.hidden = stack.hidden;
      a.width = stack.width;
      a.x = input;
      a.h0 = initial_h.of_cell(cell);
      a.h0_stride = initial_h.row_stride;
      a.c0 = initial_c.of_cell(cell);
      a.c0_stride = initial_c.row_stride;
      a.w_ih = cell_weights[cell].w_ih;
      a.w_hh = cell_weights[cell].w_hh;
      a.w_hr = cell_weights[cell].w_hr;
      a.packed_ih = memory.packed_ih;
      a.packed_hh = memory.packed_hh;
      a.bias = memory.bias;
      a.packed_w_hr = memory.packed_w_hr;
      a.unprojected = reinterpret_cast<E*>(memory.unprojected);
      a.h = columns_from(output, d * stack.width);
      a.h_n = final_h + cell * stack.batch * stack.width;
      if (final_c) a.c_n = final_c + cell * stack.batch * stack.hidden;
      if constexpr (kIsComputed<E>) {
        a.c = reinterpret_cast<Compute<E>*>(a.c_n);
      } else {
        a.c = memory.c;
      }
      if (training) {
        a.gates = reserve->parts[cell].gates;
        a.cells = reserve->parts[cell].cells;
        a.unprojected = reserve->parts[cell].unprojected;
      }
    }
    if (!diagonal) {
      const int64_t first = layer * stack.directions;
      run_layer(stack, &args[first], &cell_weights[first], workspace, threads);
    }

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
  if (diagonal) {
    run_diagonally(stack, args.data(), cell_weights.data(), workspace, threads);
  }
  workspace.check();
  steps_before += stack.steps;
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
