// The working memory of a backward pass.
#pragma once

#include <algorithm>
#include <vector>

#include "arena.h"
#include "backward_plan.h"
#include "buffers.h"

namespace fastrnn {

// Where the gradients of a strand's weights are summed, sample after sample; null: not wanted.
// Both biases have the same.
template <typename C>
struct WeightSums {
  C *w_ih, *w_hh, *bias, *w_hr;
};

// The rows of a weight's gradients, sample after sample, as a team shares them out: whole tiles.
struct TiledRows {
  int64_t rows, samples, tile_rows;

  int64_t tiles() const { return divide_up(rows, tile_rows); }
  // Calls f(sample, begin, end) for the rows of each sample that a member has.
  template <typename F>
  void for_share_of(const Member& member, F&& f) const {
    auto [tile, end] = member.part(samples * tiles());
    while (tile < end) {
      const int64_t first = tile % tiles(), last = std::min(first + end - tile, tiles());
      f(tile / tiles(), first * tile_rows, std::min(last * tile_rows, rows));
      tile += last - first;
    }
  }
  // At most so many of a sample are one member's.
  int64_t most_of_sample(int members) const {
    return std::min(tiles(), divide_up(samples * tiles(), members)) * tile_rows;
  }
};

// Of a strand. Those that run one after the other share it.
template <typename E>
struct StrandMemory {
  using C = Compute<E>;

  C *packed_w_hh = nullptr, *partial_w_hh = nullptr, *packed_w_hr = nullptr;
  C *dgates = nullptr, *dprojected = nullptr;  // of the slots
  C* dc = nullptr;                             // (N, H), LSTM only
  WeightSums<C> sums{};                        // where they are not the gradients themselves
  std::vector<double> bias_totals;             // if the plan has sums apart
  // The rows of a chunk, sample after sample, each in the order of the loop:
  std::vector<const C*> dgate_rows, dprojected_rows;
  std::vector<const E*> x_rows, h_rows, m_rows;
  std::vector<E*> dx_rows;
};

template <typename E>
class BackwardMemory {
 public:
  using C = Compute<E>;

  std::vector<StrandMemory<E>> strands;  // that run at the same time
  C* zeros = nullptr;                    // a row

  BackwardMemory(const Stack& stack, const Kernels<E>& kernels, const BackwardPlan& plan,
                 bool needs_dc)
      : strands(plan.diagonal       ? stack.layers
                : plan.side_by_side ? 2
                                    : 1),
        stack_(stack),
        kernels_(kernels),
        plan_(plan),
        needs_dc_(needs_dc && stack.cell == Cell::lstm),
        scratch_size_(measure_scratch()),
        arena_(parts(), /*keeps=*/false) {
    std::fill_n(zeros, std::max(stack.hidden, stack.width), C(0));
    for (size_t d = 0; d < strands.size(); ++d) {
      if (packs_in_scratch()) strands[d].packed_w_hh = scratch_ + scratch_of_strand(d).begin;
      prepare(strands[d]);
    }
  }

  void check() const { arena_.check(); }
  C* scratch_of(const Member& member) const {
    return Arena<C>::share_of(member, scratch_, scratch_size_);
  }

 private:
  typename Arena<C>::Parts parts() {
    const int64_t gates = stack_.gates(), width = stack_.width, hidden = stack_.hidden;
    const int64_t slot_rows = plan_.slots * stack_.batch;
    typename Arena<C>::Parts parts;
    for (StrandMemory<E>& one : strands) {
      const bool apart = !plan_.shares_dw_hh && !packs_in_scratch();
      parts.push_back({&one.packed_w_hh, apart ? plan_.packed_w_hh.size() : 0});
      parts.push_back({&one.partial_w_hh, plan_.partial_apart ? plan_.packed_w_hh.partial : 0});
      parts.push_back({&one.dgates, slot_rows * kernels_.operands(gates)});
      parts.push_back({&one.dc, needs_dc_ ? stack_.batch * hidden : 0});
      if (stack_.projected) {
        parts.push_back({&one.packed_w_hr, plan_.packed_w_hr.size()});
        parts.push_back({&one.dprojected, slot_rows * kernels_.operands(width)});
      }
      if (kIsComputed<E> && !plan_.sums_apart) continue;
      const auto in_blocks = [&](int64_t elements) {
        return plan_.in_one_block ? 0 : plan_.samples * elements;
      };
      parts.push_back({&one.sums.w_ih, in_blocks(gates * stack_.widest_input())});
      parts.push_back({&one.sums.w_hh, in_blocks(gates * width)});
      parts.push_back({&one.sums.bias, plan_.samples * gates});
      if (stack_.projected) parts.push_back({&one.sums.w_hr, in_blocks(width * hidden)});
    }
    parts.push_back({&zeros, std::max(hidden, width)});
    parts.push_back({&scratch_, scratch_size_});
    return parts;
  }
  // A chunk that packs it, or is all, is done with the packed w_hh, and its readers have waited for
  // each other, before the products use the scratch.
  bool packs_in_scratch() const {
    if (plan_.packs_each_chunk) return true;
    if (plan_.shares_dw_hh || plan_.diagonal || plan_.chunk_steps < stack_.steps) return false;
    return plan_.packed_w_hh.size() <= scratch_of_strand(0).size;
  }
  struct Range {
    int64_t begin, size;
  };
  // What the threads that run a strand have of the scratch, in a team of whatever size: all or,
  // side by side, half, but for what Arena::share_of leaves out to end shares on cache lines.
  Range scratch_of_strand(int64_t d) const {
    if (!plan_.side_by_side) return {0, scratch_size_};
    const int64_t half = scratch_size_ / 2;
    return {d * half, half - plan_.threads * Arena<C>::padded(1)};
  }
  void prepare(StrandMemory<E>& one) const {
    clear_padding(one.dgates, stack_.gates());
    if (stack_.projected) clear_padding(one.dprojected, stack_.width);
    const int64_t rows = plan_.chunk_rows;
    one.dgate_rows.resize(rows);
    one.x_rows.resize(rows);
    one.h_rows.resize(rows);
    one.dx_rows.resize(rows);
    if (plan_.sums_apart) one.bias_totals.resize(plan_.samples * stack_.gates());
    if (!stack_.projected) return;
    one.dprojected_rows.resize(rows);
    one.m_rows.resize(rows);
  }
  // Of all members of a team, of which torch may make a smaller one.
  int64_t measure_scratch() const {
    int64_t most = plan_.packs_each_chunk ? plan_.packed_w_hh.size() : 0;
    for (int size = 1; size <= plan_.threads; ++size) {
      const int together = plan_.side_by_side && size % 2 == 0 ? size / 2 : size;
      most = std::max(most, size * scratch_for(together));
    }
    return most;
  }
  // Of one of the members that run a strand together: of the products over a chunk's rows, one
  // after the other.
  int64_t scratch_for(int members) const {
    const int64_t gates = stack_.gates(), width = stack_.width, hidden = stack_.hidden;
    const int64_t rows =
        std::min(std::min(stack_.rows, plan_.chunk_rows) / plan_.samples, plan_.block_rows);
    const auto outer = [&](int64_t columns, int64_t columns0, int64_t columns1) {
      const TiledRows tiled{columns, plan_.samples, kernels_.tile_rows};
      return kernels_.outer_product_scratch(columns, tiled.most_of_sample(members), columns0,
                                            columns1, rows);
    };
    // On the diagonal a layer is one member's.
    const int64_t rows_of_dx = plan_.diagonal ? stack_.rows : divide_up(stack_.rows, members);
    int64_t most = stack_.projected ? outer(width, hidden, 0) : 0;
    for (const int64_t input : stack_.layer_inputs()) {
      most = std::max(
          {most, outer(gates, input, width),
           kernels_.row_product_scratch(gates, input, plan_.reads_w_ih_in_place ? rows_of_dx : 0)});
    }
    return Arena<C>::padded(most);
  }
  // What follows a row's last element in its operands is read, and never written.
  void clear_padding(C* rows, int64_t width) const {
    if (!kernels_.pads(width)) return;
    std::fill_n(rows, plan_.slots * stack_.batch * kernels_.operands(width), C(0));
  }

  const Stack& stack_;
  const Kernels<E>& kernels_;
  const BackwardPlan& plan_;
  const bool needs_dc_;
  const int64_t scratch_size_;
  C* scratch_ = nullptr;
  Arena<C> arena_;  // the last member: it fills pointers among the others
};

}  // namespace fastrnn
