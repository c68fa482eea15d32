// The gradients of a strand's weights, summed chunk after chunk.
#pragma once

#include <ATen/ops/from_blob.h>

#include <algorithm>

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

  // dweights: of the strand, undefined where not wanted. Refers to all but the numbers.
  WeightGradients(const Stack& stack, const Kernels<E>& kernels, const BackwardPlan& plan,
                  StrandMemory<E>& memory, int64_t input, const at::Tensor* dweights)
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

  // Memory of w_hh's gradient, that is first written when a chunk is added.
  C* w_hh_memory() const {
    if (kIsComputed<E> || !plan_.in_one_block) return sums_.w_hh;
    return reinterpret_cast<C*>(mutable_elements<E>(dweights_[1]));
  }

  // Adds this member's part of what a chunk's rows, which the memory points to, give. scratch: the
  // member's own.
  void add_chunk(int64_t rows, bool last, Progress& progress, const Member& member, C* scratch) {
    const int64_t sample_rows = rows / plan_.samples;
    for (int64_t row = 0; row < sample_rows; row += plan_.block_rows) {
      const int64_t count = std::min(sample_rows - row, plan_.block_rows);
      const bool is_last = last && row + count == sample_rows;
      add_products(sample_rows, row, count, /*accumulate=*/progress.blocks > 0, is_last, member,
                   scratch);
      ++progress.blocks;
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
        std::copy_n(sums_.bias, plan_.samples * stack_.gates(), out);
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
  // Of w_ih and w_hh (gates) or w_hr (width).
  TiledRows tiled(int64_t rows) const { return {rows, plan_.samples, kernels_.tile_rows}; }

  // Adds products of rows [begin, begin + count) of each sample of a chunk to the sums, or begins
  // those.
  void add_products(int64_t sample_rows, int64_t begin, int64_t count, bool accumulate, bool last,
                    const Member& member, C* scratch) {
    // The product with those rows that gives gradient i, of `size` elements. The last rows leave
    // sums of another type than the weights' in their gradients.
    const auto product = [&](const std::vector<const E*>& rows, int64_t columns, C* sums, int64_t i,
                             int64_t size, int64_t sample) {
      OuterProduct<E> result{rows.data() + sample * sample_rows + begin, columns, nullptr, nullptr};
      if (!sums) return result;
      result.out = sums + sample * size;
      if (last && !kIsComputed<E>) {
        result.result = mutable_elements<E>(dweights_[i]) + sample * size;
      }
      return result;
    };
    const int64_t gates = stack_.gates(), width = stack_.width, hidden = stack_.hidden;
    if (sums_.w_ih || sums_.w_hh || sums_.bias) {
      tiled(gates).for_share_of(member, [&](int64_t sample, int64_t j_begin, int64_t j_end) {
        kernels_.outer_product(
            {.a = memory_.dgate_rows.data() + sample * sample_rows + begin,
             .rows = count,
             .a_columns = gates,
             .products = {product(memory_.x_rows, input_, sums_.w_ih, 0, gates * input_, sample),
                          product(memory_.h_rows, width, sums_.w_hh, 1, gates * width, sample)},
             .column_sums = sums_.bias ? sums_.bias + sample * gates : nullptr,
             .accumulate = accumulate,
             .scratch = scratch},
            j_begin, j_end);
      });
    }
    if (sums_.w_hr) {
      tiled(width).for_share_of(member, [&](int64_t sample, int64_t j_begin, int64_t j_end) {
        kernels_.outer_product({.a = memory_.dprojected_rows.data() + sample * sample_rows + begin,
                                .rows = count,
                                .a_columns = width,
                                .products = {product(memory_.m_rows, hidden, sums_.w_hr,
                                                     w_hr_index(), width * hidden, sample),
                                             {}},
                                .column_sums = nullptr,
                                .accumulate = accumulate,
                                .scratch = scratch},
                               j_begin, j_end);
      });
    }
  }

  // Adds this member's part of the sums to the weights' gradients, or begins those.
  void add_to_totals(bool accumulate, const Member& member) {
    const auto add = [&](const C* from, auto* to, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = accumulate ? to[i] + from[i] : from[i];
    };
    const auto add_rows = [&](const C* from, int64_t i, int64_t begin, int64_t end,
                              int64_t columns) {
      if (!from) return;  // nor is there a total
      add(from, mutable_elements<C>(dweights_[i]), begin * columns, end * columns);
    };
    const int64_t gates = stack_.gates(), width = stack_.width;
    tiled(gates).for_share_of(member, [&](int64_t sample, int64_t j_begin, int64_t j_end) {
      const int64_t begin = sample * gates + j_begin, end = sample * gates + j_end;
      add_rows(sums_.w_ih, 0, begin, end, input_);
      add_rows(sums_.w_hh, 1, begin, end, width);
      if (sums_.bias) add(sums_.bias, memory_.bias_totals.data(), begin, end);
    });
    if (!sums_.w_hr) return;
    tiled(width).for_share_of(member, [&](int64_t sample, int64_t j_begin, int64_t j_end) {
      add_rows(sums_.w_hr, w_hr_index(), sample * width + j_begin, sample * width + j_end,
               stack_.hidden);
    });
  }

  const Stack& stack_;
  const Kernels<E>& kernels_;
  const BackwardPlan& plan_;
  StrandMemory<E>& memory_;
  const int64_t input_;
  const at::Tensor* const dweights_;
  WeightSums<C> sums_{};
};

}  // namespace fastrnn
