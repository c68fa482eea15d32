// The working memory of a forward pass.
#pragma once

#include <algorithm>

#include "arena.h"
#include "buffers.h"
#include "forward_plan.h"
#include "rows_apart.h"

namespace fastrnn {

// Memory that the layers use in turn or, if they run at the same time, each.
template <typename E>
class ForwardMemory {
 public:
  using C = Compute<E>;

  // What a direction of a layer needs: see ForwardArgs.
  struct StrandMemory {
    C *packed_ih, *packed_hh, *bias, *packed_w_hr, *unprojected, *c;
  };
  c10::SmallVector<StrandMemory, 2> strands;  // of one layer or, if diagonal, of all
  C* zeros = nullptr;                         // room for the initial state where none is given

  ForwardMemory(const Stack& stack, const Kernels<E>& kernels, const ForwardPlan& plan,
                bool training)
      : strands(plan.diagonal ? stack.strands() : stack.directions),
        stack_(stack),
        kernels_(kernels),
        plan_(plan),
        training_(training),
        input_(stack.widest_input()),
        scratch_size_(measure_scratch()),
        arena_(parts(), /*keeps=*/!training) {
    std::fill_n(initial_zeros(), std::max(stack.hidden, stack.width), E{});
  }

  void check() const { arena_.check(); }
  E* initial_zeros() const { return reinterpret_cast<E*>(zeros); }
  C* scratch_of(const Member& member) const {
    return Arena<C>::share_of(member, scratch_, scratch_size_);
  }
  // Of that, what comes first: elements for the rows that a share keeps apart.
  int64_t size_apart(const Division& division, int64_t rows) const {
    if (division.row_parts == 1) return 0;
    const int64_t bytes = apart_size<E>(stack_, rows) * int64_t{sizeof(E)};
    return Arena<C>::padded(divide_up(bytes, int64_t{sizeof(C)}));
  }

 private:
  typename Arena<C>::Parts parts() {
    typename Arena<C>::Parts parts;
    for (size_t i = 0; i < strands.size(); ++i) {
      StrandMemory& strand = strands[i];
      const int64_t input = plan_.diagonal ? stack_.layer_input(i) : input_;
      if (plan_.packs_ih) {
        parts.push_back(
            {&strand.packed_ih, kernels_.packed_gates(stack_.cell, input, stack_.hidden)});
      }
      if (plan_.packs_hh) {
        parts.push_back(
            {&strand.packed_hh, kernels_.packed_gates(stack_.cell, stack_.width, stack_.hidden)});
      }
      parts.push_back({&strand.bias, plan_.panels * kPanelVectors * kernels_.lanes});
      if (stack_.projected) {
        if (plan_.packs_hr) {
          parts.push_back(
              {&strand.packed_w_hr, kernels_.packed_columns(stack_.hidden, stack_.width)});
        }
        parts.push_back({&strand.unprojected, training_ ? 0 : stack_.batch * stack_.hidden});
      }
      if (stack_.cell == Cell::lstm && !kIsComputed<E>) {
        parts.push_back({&strand.c, stack_.batch * stack_.hidden});
      }
    }
    parts.push_back({&zeros, std::max(stack_.hidden, stack_.width)});
    parts.push_back({&scratch_, scratch_size_});
    return parts;
  }

  // Of all members of a team, of which torch may make a smaller one.
  int64_t measure_scratch() const {
    if (plan_.diagonal) return plan_.threads * scratch_for(stack_.batch, plan_.panels);
    const StepWork work = forward_work(stack_);
    int64_t most = 0;
    for (int size = 1; size <= plan_.threads; ++size) {
      const Division division = divide_layer(size, stack_, stack_.directions, plan_.panels, work);
      const int64_t share_panels = divide_up(plan_.panels, division.unit_parts);
      for_range_sizes(stack_, division.row_parts, [&](int64_t rows) {
        most =
            std::max(most, size * (size_apart(division, rows) + scratch_for(rows, share_panels)));
      });
    }
    return most;
  }
  int64_t scratch_for(int64_t share_rows, int64_t share_panels) const {
    int64_t most = 0;
    for (const int64_t input : stack_.layer_inputs()) {
      most = std::max(most, kernels_.forward_scratch({.steps = stack_.steps,
                                                      .input = input,
                                                      .hidden = stack_.hidden,
                                                      .width = stack_.width,
                                                      .packed_ih = plan_.packs_ih,
                                                      .packed_hh = plan_.packs_hh,
                                                      .projected = stack_.projected,
                                                      .share_rows = share_rows,
                                                      .share_panels = share_panels}));
    }
    return Arena<C>::padded(most);
  }

  const Stack& stack_;
  const Kernels<E>& kernels_;
  const ForwardPlan& plan_;
  const bool training_;
  const int64_t input_;  // the widest layer's
  const int64_t scratch_size_;
  C* scratch_ = nullptr;
  Arena<C> arena_;  // the last member: it fills pointers among the others
};

}  // namespace fastrnn
