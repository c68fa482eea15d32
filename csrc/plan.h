// How the threads of a team divide a layer among them.
#pragma once

#include <tuple>
#include <utility>

#include "isa.h"
#include "stack.h"
#include "team.h"

namespace fastrnn {

// A layer is divided by direction, by batch rows, or by hidden units, which alone needs a barrier
// at each step. Threads past the product have nothing to do.
struct Division {
  int direction_groups, row_parts, unit_parts;
};

// What a step of a layer takes for each row: operations of its products; elements that threads
// which divide hidden units read from one another; their barriers.
struct StepWork {
  double products;
  int64_t exchanged;
  int barriers;  // of threads that divide hidden units; 0: they cannot
};
StepWork forward_work(const Stack& stack);  // the mean of the layers
StepWork backward_work(const Stack& stack);

// Threads worth using, at most torch's. panels: as of divide_layer.
int forward_threads(const Stack& stack, int64_t panels, bool training);
int backward_threads(const Stack& stack, int64_t panels, int64_t directions);  // at a time

// For a team of that size; panels: of the hidden units of a cell, in backward of h too.
Division divide_layer(int threads, const Stack& stack, int64_t directions, int64_t panels,
                      const StepWork& work);

// Threads with which the layers of a stack run best along the diagonal (see diagonal.h); 0: they
// run better one after the other, each divided among `threads`. weight_bytes: of all layers, as
// they are read.
int forward_diagonal(const Stack& stack, int threads, int64_t panels, int64_t weight_bytes);
int backward_diagonal(const Stack& stack, int threads, int64_t panels, int64_t weight_bytes);

// Calls f(begin, end) for each of `parts` consecutive ranges of a packed batch's rows, of nearly
// equal work. Allocates nothing: no member of a team may throw.
template <typename F>
void for_packed_ranges(const Stack& stack, int parts, F&& f) {
  int64_t t = stack.steps - 1, work = 0, begin = 0;
  int part = 0;  // that row n is in
  for (int64_t n = 0; n < stack.batch; ++n) {
    while (n >= stack.batch_sizes[t]) --t;
    work += t + 1;
    for (; part < parts - 1 && work * parts >= stack.rows * (part + 1); ++part, begin = n + 1) {
      f(begin, n + 1);
    }
  }
  for (; part < parts; ++part, begin = stack.batch) f(begin, stack.batch);
}

// Likewise one of the ranges, of any batch.
std::pair<int64_t, int64_t> split_rows(const Stack& stack, int parts, int part);

// Calls f(rows) for the numbers of rows that the ranges have.
template <typename F>
void for_range_sizes(const Stack& stack, int parts, F&& f) {
  if (stack.packed) {
    for_packed_ranges(stack, parts, [&](int64_t begin, int64_t end) { f(end - begin); });
  } else {
    f(stack.batch / parts);
    f(divide_up(stack.batch, parts));
  }
}

// The barrier of the threads that share the rows of one direction.
struct GroupBarrier {
  Barrier barrier;
  int size = 1;

  static void wait(void* self);
};

// A member's part of a division.
template <typename C>
struct Assignment {
  bool works;
  int direction_group;
  Share<C> share;  // scratch is left to the caller
};

// group_barriers: one a direction group, whose sizes the caller sets.
template <typename C>
Assignment<C> assign(const Division& division, const Stack& stack, int member, int64_t panels,
                     GroupBarrier* group_barriers) {
  const int group_size = division.row_parts * division.unit_parts;
  const int group = member / group_size;
  if (group >= division.direction_groups) return {};
  const int row_part = member % group_size / division.unit_parts;
  const int unit_part = member % division.unit_parts;
  Share<C> share{};
  std::tie(share.row_begin, share.row_end) = split_rows(stack, division.row_parts, row_part);
  share.panel_begin = panels * unit_part / division.unit_parts;
  share.panel_end = panels * (unit_part + 1) / division.unit_parts;
  if (division.unit_parts > 1) {
    share.sync = GroupBarrier::wait;
    share.barrier = &group_barriers[group];
  }
  return {true, group, share};
}

}  // namespace fastrnn
