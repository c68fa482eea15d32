// How the backward pass of a stack runs: its chunks, and which weights are packed.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "plan.h"

namespace fastrnn {

// Rows of gate gradients in a chunk. It fixes the order in which a weight's gradient is summed, so
// it may depend on the arguments alone. LSTMs take 768 rows, which is 2% faster; 16-bit, projected
// and packed ones 256, as torch.nn needs less memory for them and fastrnn is to need no more;
// RNNs in float16 half of that, unless 256 are all, as sums and gate gradients take twice its
// bytes. Narrow rows: as many as are kChunkBytes, as all threads wait for each other twice a chunk.
constexpr int64_t kChunkBytes = 96 << 10;

// Whether torch.nn's memory is hard to match: an LSTM's is not, which keeps more.
template <typename E>
bool is_short_of_memory(const Stack& stack) {
  return std::is_same_v<E, Half> && stack.cell != Cell::lstm;
}

template <typename E>
int64_t chunk_rows(const Stack& stack, int64_t samples) {
  const bool many = stack.cell == Cell::lstm && !stack.projected && !stack.packed && kIsComputed<E>;
  const bool few = is_short_of_memory<E>(stack) && stack.rows / samples > kGradientRows;
  const int64_t rows = many ? 3 * kGradientRows : few ? kGradientRows / 2 : kGradientRows;
  return std::max(rows, kChunkBytes / (stack.gates() * int64_t{sizeof(Compute<E>)}));
}

// Steps of a chunk: chunks are as few as those rows allow, and of equal length. The rows are those
// of one sample: its sums are what they are where it runs alone. Of 256 rows, a single chunk may
// have as many more as w_hh has columns: it needs no memory for the packed w_hh, which would take
// as much.
template <typename E>
int64_t chunk_steps_of(const Stack& stack, int64_t samples) {
  const int64_t rows = chunk_rows<E>(stack, samples);
  const int64_t all_rows = stack.steps * stack.batch / samples;  // of which packed ones use some
  if (rows == kGradientRows && all_rows <= rows + stack.width) return stack.steps;
  const int64_t most = std::max<int64_t>(1, rows * samples / stack.batch);
  return divide_up(stack.steps, divide_up(stack.steps, most));
}

// Rows of a block, that are packed together and summed before they are added to a weight's
// gradient. Of one or two steps torch.nn's RNN keeps hardly anything: smaller blocks take less
// memory.
template <typename E>
int64_t block_rows_of(const Stack& stack) {
  return stack.steps <= 2 && stack.cell != Cell::lstm && kIsComputed<E> ? 128 : kGradientRows;
}

// A weight's gradient is the sum of `blocks` blocks. So many of them are added one to another, and
// then to the gradient: each addition rounds, so the error grows with the root of their number. It
// is some 1e-7 of a float's size after 32, 3e-7 after 500 at once, and with the root of their
// number at most 2e-7 for 4,000, which is torch.nn's.
constexpr int64_t kBlocksTogether = 32;
inline int64_t most_blocks_together(int64_t blocks) {
  return std::max(kBlocksTogether, static_cast<int64_t>(std::sqrt(blocks)));
}

// Units of a layer whose directions run side by side, at most: of an LSTM, and of others and packed
// ones. Wider ones gain little (3% where cores are near), and with the working memory of both take
// more than torch.nn, or than L3 holds.
constexpr int64_t kLstmSideBySide = 256, kSideBySide = 128;

// Weights that serve at most so many tiles of rows are not worth a copy.
constexpr int64_t kTilesInPlace = 2;

// Elements of a packed weight: of its full panels and of the last, if that is not full. Of one that
// is read in place the last alone is packed.
struct PackedColumns {
  int64_t full, partial;

  int64_t size() const { return full + partial; }
};

struct BackwardPlan {
  int64_t panels;     // of the hidden units, or of h where that is wider
  bool side_by_side;  // both directions of a layer, each by half of the threads of an even team
  bool diagonal;      // all layers at the same time
  int threads;
  int64_t chunk_steps;      // of the time loop
  int64_t chunk_rows;       // at most
  int64_t slots;            // steps whose gate gradients are kept: a chunk's, but two at least,
                            // as a step reads those of the one before it
  int64_t block_rows;       // at most
  int64_t blocks_together;  // all, or:
  bool sums_apart;          // their sums are in memory of their own, as there are more blocks
  // Sums of another type than the weights' are then stored as gradients, and not in memory of their
  // own.
  bool in_one_block;
  int64_t samples;
  bool reads_w_ih_in_place, reads_w_hh_in_place, reads_w_hr_in_place;
  PackedColumns packed_w_hh, packed_w_hr;
  // A single chunk is done with the packed w_hh before the gradient of w_hh is written: they share
  // memory if the one fits in the other, all of it or (partial_apart) the full panels.
  bool shares_dw_hh, partial_apart;
  // w_hh is packed anew for each chunk, in the scratch of the products: some 1% of the time, for
  // less memory.
  bool packs_each_chunk;
};

// sums_dw_hh: whether every w_hh wants its gradient. samples: see Gradients.
template <typename E>
BackwardPlan plan_backward(const Stack& stack, const Kernels<E>& kernels, bool wants_dh0,
                           bool sums_dw_hh, int64_t samples) {
  // Whether weights that serve so many rows are better read where they lie.
  const auto in_place = [&](int64_t rows) {
    return kernels.reads_in_place && rows <= kTilesInPlace * kernels.tile_rows;
  };
  const auto packed = [&](int64_t k, int64_t columns, bool reads_in_place) -> PackedColumns {
    const int64_t panel_columns = kPanelVectors * kernels.lanes;
    if (reads_in_place) return {0, kernels.operands(k) * panel_columns};
    const int64_t full = kernels.operands(k) * (columns / panel_columns * panel_columns);
    return {full, kernels.packed_columns(k, columns) - full};
  };
  const int64_t gates = stack.gates(), input = stack.widest_input();
  BackwardPlan plan{};
  plan.panels = kernels.panels(std::max(stack.hidden, stack.width));
  // Side by side, each direction finds in half of dx what the other has left there, and adds to it.
  // Only where that was rounded to 16 bits can the sum tell which of the two came first.
  const bool may_be_side_by_side =
      stack.directions == 2 && kIsComputed<E> && samples == 1 &&
      stack.hidden <= (stack.cell == Cell::lstm && !stack.packed ? kLstmSideBySide : kSideBySide);
  plan.threads = backward_threads(stack, plan.panels, may_be_side_by_side ? 2 : 1);
  plan.side_by_side = may_be_side_by_side && plan.threads % 2 == 0;
  plan.samples = samples;
  plan.chunk_steps = chunk_steps_of<E>(stack, samples);
  plan.chunk_rows = plan.chunk_steps * stack.batch;
  const bool one_chunk = plan.chunk_steps == stack.steps;
  plan.slots = std::max(plan.chunk_steps, std::min<int64_t>(2, stack.steps));
  plan.block_rows = block_rows_of<E>(stack);
  const int64_t blocks = divide_up(stack.steps, plan.chunk_steps) *
                         divide_up(plan.chunk_rows / samples, plan.block_rows);
  plan.blocks_together = kIsComputed<E> ? most_blocks_together(blocks) : blocks;
  plan.sums_apart = blocks > plan.blocks_together;
  plan.in_one_block = one_chunk && stack.rows / samples <= plan.block_rows;
  // For dx all rows are multiplied at once. That is faster where the weights lie if they stay in
  // L2, and also if the sums, which are then all in use at the same time, are no more than a packed
  // panel.
  plan.reads_w_ih_in_place =
      kernels.reads_in_place && (in_place(stack.rows) || are_small(gates, input, sizeof(E)) ||
                                 stack.rows * input <= gates * kPanelVectors * kernels.lanes);
  const int64_t w_hh_rows = stack.rows - (wants_dh0 ? 0 : stack.batch);
  plan.reads_w_hh_in_place = in_place(w_hh_rows);
  plan.reads_w_hr_in_place = in_place(stack.rows);
  // A block of few steps multiplies too few rows for w_ih to be packed, and ends no chunk.
  if (one_chunk && plan.reads_w_ih_in_place && samples == 1) {
    const int64_t weights = stack.layers * gates * (input + stack.width) * int64_t{sizeof(E)};
    const int at_once = backward_diagonal(stack, plan.threads, plan.panels, weights);
    plan.diagonal = at_once > 0;
    if (plan.diagonal) plan.threads = at_once;
  }
  if (w_hh_rows > 0) plan.packed_w_hh = packed(gates, stack.width, plan.reads_w_hh_in_place);
  if (stack.projected) {
    plan.packed_w_hr = packed(stack.width, stack.hidden, plan.reads_w_hr_in_place);
  }
  if (sums_dw_hh && one_chunk) {
    const int64_t bytes = plan.in_one_block ? sizeof(E) : sizeof(Compute<E>);
    const int64_t room = gates * stack.width * bytes / int64_t{sizeof(Compute<E>)};
    const auto [full, partial] = plan.packed_w_hh;
    const bool fits = full + partial <= room;
    plan.shares_dw_hh = fits || (full > 0 && full <= room);
    plan.partial_apart = plan.shares_dw_hh && !fits;
  }
  plan.packs_each_chunk = is_short_of_memory<E>(stack) && !one_chunk;
  return plan;
}

}  // namespace fastrnn
