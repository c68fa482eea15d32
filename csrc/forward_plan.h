// How the forward pass of a stack runs: threads, layers in turn or along the diagonal, and which
// weights are packed.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "isa.h"
#include "plan.h"

namespace fastrnn {

// Up to how many steps weights are read in place, by the batch: 1, 2 to 3, 4 to 5; with tiles of
// three rows 1, 2, 3.
using MostSteps = int64_t[3];
struct MostStepsInPlace {
  MostSteps all, half;  // of the columns, or half and more, are in whole spans
};
constexpr MostSteps kMostStepsTransposed[2] = {{1, 1, 1}, {3, 2, 1}};  // less; by vectors' width

// Of so many bytes a strand's packed weights would come from L3 or memory.
constexpr int64_t kPackedBeyondL2 = 6 << 20;

// By whether vectors have 512 bits; by what lies in place (operands; or what is converted, float16
// and bfloat16); by whether there are kPackedBeyondL2 or more.
constexpr MostStepsInPlace kMostStepsInPlace[2][3][2] = {
    {{{{10, 8, 5}, {6, 5, 3}}, {{18, 14, 10}, {13, 9, 7}}},
     {{{14, 10, 7}, {6, 4, 3}}, {{40, 24, 14}, {16, 10, 7}}},
     {{{10, 9, 7}, {5, 4, 3}}, {{30, 20, 12}, {11, 8, 6}}}},
    {{{{16, 10, 8}, {10, 7, 5}}, {{18, 13, 9}, {13, 11, 8}}},
     {{{12, 8, 6}, {9, 6, 4}}, {{40, 24, 14}, {22, 12, 7}}},
     {{{6, 5, 3}, {5, 4, 3}}, {{30, 16, 8}, {18, 12, 5}}}}};

// Bytes of w_ih and w_hh of one direction of a layer, packed.
template <typename E>
int64_t packed_bytes(const Stack& stack, const Kernels<E>& kernels, int64_t layer) {
  int64_t packed = 0;
  for (const int64_t k : {stack.layer_input(layer), stack.width}) {
    packed += kernels.packed_gates(stack.cell, k, stack.hidden);
  }
  return packed * sizeof(Compute<E>);
}

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
  const bool wide = kernels.lanes * sizeof(Compute<E>) == 64;
  const int64_t batch = kernels.tile_rows > 3 ? stack.batch / 2 : stack.batch - 1;
  if (2 * in_spans < x + h) return stack.steps > kMostStepsTransposed[wide][batch];
  const bool converted = !kIsComputed<E> && kernels.depth == 1;
  const int type = !converted ? 0 : std::is_same_v<E, Half> ? 1 : 2;
  const bool beyond_l2 = packed_bytes(stack, kernels, 0) >= kPackedBeyondL2;
  const MostStepsInPlace& most = kMostStepsInPlace[wide][type][beyond_l2];
  return stack.steps > (in_spans == x + h ? most.all : most.half)[batch];
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
  return divide_layer(threads, stack, stack.directions, panels, forward_work(stack)).row_parts > 1;
}

// As forward_diagonal.
template <typename E>
int find_diagonal(const Stack& stack, const Kernels<E>& kernels, int threads, int64_t panels) {
  int64_t packed = 0;
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    packed += packed_bytes(stack, kernels, layer);
  }
  return forward_diagonal(stack, threads, panels, packed);
}

struct ForwardPlan {
  int64_t panels;  // of the hidden units of a cell
  int threads;
  bool diagonal;  // all layers at the same time
  // Which weights are packed as a whole before the first step.
  bool packs_ih, packs_hh, packs_hr;
};

template <typename E>
ForwardPlan plan_forward(const Stack& stack, const Kernels<E>& kernels, bool training) {
  ForwardPlan plan{};
  plan.panels = kernels.cell_panels(stack.cell, stack.hidden);
  plan.threads = forward_threads(stack, plan.panels, training);
  const int at_once = find_diagonal(stack, kernels, plan.threads, plan.panels);
  plan.diagonal = at_once > 0;
  if (plan.diagonal) plan.threads = at_once;
  plan.packs_hh = packs_weights(stack, kernels);
  plan.packs_ih =
      plan.packs_hh && (plan.diagonal || packs_input<E>(stack, plan.threads, plan.panels));
  // A panel of w_hr is not packed before it is used, as those of w_hh are for more rows.
  plan.packs_hr = plan.packs_hh || !kernels.reads_in_place || stack.batch > kernels.tile_rows;
  return plan;
}

}  // namespace fastrnn
