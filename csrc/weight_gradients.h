// The gradients of one direction's weights, summed chunk after chunk.
#pragma once

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>

#include "backward_memory.h"

namespace fastrnn {

template <typename E>
class WeightGradients {
 public:
  using C = Compute<E>;

  // How far a member is: blocks in the sums, and whether any are in the totals.
  struct Progress {
    int64_t blocks;
    bool has_totals;
  };

  // dweights: of the direction, undefined where not wanted. Refers to all but the numbers.
  WeightGradients(const Stack& stack, const Kernels<E>& kernels, const BackwardPlan& plan,
                  BackwardMemory<E>& memory, int64_t input, const at::Tensor* dweights)
      : stack_(stack),
        kernels_(kernels),
        plan_(plan),
        memory_(memory),
        input_(input),
        dweights_(dweights) {
    sums_.w_ih = choose_sums(0, memory.sums.w_ih);
    sums_.w_hh = choose_sums(1, memory.sums.w_hh);
    if (stack.has_biases) sums_.bias = choose_sums(dweights[2].defined() ? 2 : 3, memory.sums.bias);
    if (stack.projected) sums_.w_hr = choose_sums(w_hr_index(), memory.sums.w_hr);
  }

  // Memory of w_hh's size, or null, that is first written when a chunk is added.
  C* w_hh_sums() const { return sums_.w_hh; }

  // Adds this member's part of what a chunk's rows, which the memory points to, give.
  void add_chunk(int64_t rows, bool last, Progress& progress, const Member& member) {
    for (int64_t row = 0; row < rows;) {
      const int64_t room = (plan_.blocks_together - progress.blocks) * kGradientRows;
      const int64_t count = std::min(rows - row, room);
      const bool is_last = last && row + count == rows;
      add_products(row, count, /*accumulate=*/progress.blocks > 0, is_last, member);
      row += count;
      progress.blocks += divide_up(count, kGradientRows);
      if (plan_.sums_apart && (is_last || progress.blocks == plan_.blocks_together)) {
        add_to_totals(/*accumulate=*/progress.has_totals, member);
        progress = {0, true};
      }
    }
  }

  // Leaves the gradient that both biases have in each that is wanted; when all chunks are added.
  void finish() {
    if (!sums_.bias) return;
    for (const int64_t i : {2, 3}) {
      const at::Tensor& gradient = dweights_[i];
      if (!gradient.defined()) continue;
      if constexpr (!kIsComputed<E>) {
        gradient.copy_(
            at::from_blob(sums_.bias, gradient.sizes(),
                          gradient.options().dtype(compute_type(gradient.scalar_type()))));
      } else if (plan_.sums_apart) {
        std::copy(memory_.bias_totals.begin(), memory_.bias_totals.end(),
                  mutable_elements<C>(gradient));
      } else if (C* const out = mutable_elements<C>(gradient); out != sums_.bias) {
        std::copy_n(sums_.bias, stack_.gates(), out);
      }
    }
  }

 private:
  // Where a gradient is summed: in place, if it is all one run of blocks and of their type.
  C* choose_sums(int64_t i, C* own) const {
    const at::Tensor& gradient = dweights_[i];
    if (!gradient.defined()) return nullptr;
    if constexpr (kIsComputed<E>) {
      if (!plan_.sums_apart) return mutable_elements<C>(gradient);
    }
    return own;
  }
  int64_t w_hr_index() const { return stack_.weights_per_strand() - 1; }
  // The rows of w_ih and w_hh, and those of w_hr, that a member sums.
  std::pair<int64_t, int64_t> gate_part(const Member& member) const {
    return member.part(stack_.gates(), kernels_.tile_rows);
  }
  std::pair<int64_t, int64_t> width_part(const Member& member) const {
    return member.part(stack_.width, kernels_.tile_rows);
  }

  // Adds products of rows [begin, begin + count) of a chunk to the sums, or begins those.
  void add_products(int64_t begin, int64_t count, bool accumulate, bool last,
                    const Member& member) {
    C* const scratch = memory_.scratch_of(member);
    // The last rows leave sums of another type than the weights' in their gradients.
    const auto result = [&](const C* sum, int64_t i) {
      return last && sum && !kIsComputed<E> ? mutable_elements<E>(dweights_[i]) : nullptr;
    };
    if (sums_.w_ih || sums_.w_hh || sums_.bias) {
      const auto [j_begin, j_end] = gate_part(member);
      kernels_.outer_product(
          {.a = memory_.dgate_rows.data() + begin,
           .rows = count,
           .a_columns = stack_.gates(),
           .products = {{memory_.x_rows.data() + begin, input_, sums_.w_ih, result(sums_.w_ih, 0)},
                        {memory_.h_rows.data() + begin, stack_.width, sums_.w_hh,
                         result(sums_.w_hh, 1)}},
           .column_sums = sums_.bias,
           .accumulate = accumulate,
           .scratch = scratch},
          j_begin, j_end);
    }
    if (sums_.w_hr) {
      const auto [j_begin, j_end] = width_part(member);
      kernels_.outer_product({.a = memory_.dprojected_rows.data() + begin,
                              .rows = count,
                              .a_columns = stack_.width,
                              .products = {{memory_.m_rows.data() + begin, stack_.hidden,
                                            sums_.w_hr, result(sums_.w_hr, w_hr_index())},
                                           {}},
                              .column_sums = nullptr,
                              .accumulate = accumulate,
                              .scratch = scratch},
                             j_begin, j_end);
    }
  }

  // Adds this member's part of the sums to the weights' gradients, or begins those.
  void add_to_totals(bool accumulate, const Member& member) {
    const auto add = [&](const C* from, auto* to, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = accumulate ? to[i] + from[i] : from[i];
    };
    const auto add_rows = [&](const C* from, int64_t i, std::pair<int64_t, int64_t> rows,
                              int64_t columns) {
      if (!from) return;  // nor is there a total
      add(from, mutable_elements<C>(dweights_[i]), rows.first * columns, rows.second * columns);
    };
    const auto gates = gate_part(member);
    add_rows(sums_.w_ih, 0, gates, input_);
    add_rows(sums_.w_hh, 1, gates, stack_.width);
    if (sums_.bias) add(sums_.bias, memory_.bias_totals.data(), gates.first, gates.second);
    add_rows(sums_.w_hr, w_hr_index(), width_part(member), stack_.hidden);
  }

  const Stack& stack_;
  const Kernels<E>& kernels_;
  const BackwardPlan& plan_;
  BackwardMemory<E>& memory_;
  const int64_t input_;
  const at::Tensor* const dweights_;
  WeightSums<C> sums_{};
};

}  // namespace fastrnn
