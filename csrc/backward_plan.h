// How the backward pass of a stack runs: its chunks, and which weights are packed.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "plan.h"

namespace fastrnn {

// Rows of gate gradients in a chunk: the order of summation of a weight's gradient follows it, so
// that nothing but the arguments may decide. Longer chunks are 2% faster for an LSTM; where it is
// packed, and for the others, torch.nn takes less memory, and it is memory that counts. Of narrow
// rows so many bytes are a chunk: all threads wait for each other twice a chunk.
constexpr int64_t kChunkBytes = 96 << 10;

template <typename E>
int64_t chunk_rows(const Stack& stack) {
  const bool lstm = stack.cell == Cell::lstm && !stack.projected && kIsComputed<E>;
  const int64_t rows = !lstm ? 256 : stack.packed ? 512 : 768;
  return std::max(rows, kChunkBytes / (stack.gates() * int64_t{sizeof(Compute<E>)}));
}

// Steps of a chunk: chunks are as few as those rows allow, and of equal length.
template <typename E>
int64_t chunk_steps_of(const Stack& stack) {
  const auto divide_up = Kernels<E>::divide_up;
  const int64_t most = std::max<int64_t>(1, chunk_rows<E>(stack) / stack.batch);
  return divide_up(stack.steps, divide_up(stack.steps, most));
}

// Weights that serve at most so many tiles of rows are not worth a copy.
constexpr int64_t kTilesInPlace = 2;

template <typename E>
class BackwardPlan {
  // First, as the members below are initialised from them.
  const Stack& stack_;
  const Kernels<E>& kernels_;

 public:
  // sums_dw_hh: whether every w_hh wants its gradient.
  BackwardPlan(const Stack& stack, const Kernels<E>& kernels, bool wants_dh0, bool sums_dw_hh)
      : stack_(stack),
        kernels_(kernels),
        threads(thread_count(stack, stack.gates() * (stack.input + stack.width), 4. * stack.rows)),
        chunk_steps(chunk_steps_of<E>(stack)),
        slots(chunk_steps < stack.steps ? chunk_steps + 1 : chunk_steps),
        in_one_block(chunk_steps == stack.steps && stack.rows <= kGradientRows),
        w_hh_rows(stack.rows - (wants_dh0 ? 0 : stack.batch)),
        shares_dw_hh(
            sums_dw_hh && chunk_steps == stack.steps && (kIsComputed<E> || !in_one_block) &&
            packed_size(stack.gates(), stack.width, w_hh_rows) <= stack.gates() * stack.width),
        reads_w_ih_in_place(kernels.reads_in_place && w_ih_is_better_in_place()) {}

  const int threads;
  const int64_t chunk_steps;  // of the time loop
  const int64_t slots;        // steps whose gate gradients are kept: a chunk's and the one before
  // Sums of another type than the weights' are then stored as gradients, and not in memory of their
  // own.
  const bool in_one_block;
  const int64_t w_hh_rows;  // that w_hh serves; 0: it is not read
  // A single chunk is done with the packed w_hh before the gradient of w_hh is written: they share
  // memory if the one fits in the other.
  const bool shares_dw_hh;
  const bool reads_w_ih_in_place;

  // Rows of a chunk, at most.
  int64_t chunk_row_count() const { return chunk_steps * stack_.batch; }
  int64_t slot_row_count() const { return slots * stack_.batch; }

  // Whether weights that serve so many rows are better read where they lie.
  bool reads_in_place(int64_t rows) const {
    return kernels_.reads_in_place && rows <= kTilesInPlace * kernels_.tile_rows;
  }
  // What pack_columns needs for w (k, columns), or for the panel of it that is not full.
  int64_t packed_size(int64_t k, int64_t columns, int64_t rows) const {
    if (rows == 0) return 0;
    return reads_in_place(rows) ? kernels_.operands(k) * kPanelVectors * kernels_.lanes
                                : kernels_.packed_columns(k, columns);
  }

 private:
  // For dx all rows are multiplied at once. That is faster where the weights lie if they stay in
  // L2, and also if the sums, which are then all in use at the same time, are no more than a packed
  // panel.
  bool w_ih_is_better_in_place() const {
    const int64_t gates = stack_.gates(), input = stack_.widest_input();
    return reads_in_place(stack_.rows) || gates * input * int64_t{sizeof(E)} <= kSmallWeights ||
           stack_.rows * input <= gates * kPanelVectors * kernels_.lanes;
  }
};

}  // namespace fastrnn
