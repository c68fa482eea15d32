// Rows of h that a thread keeps apart from those of the others, where cores are distant.
//
// Where threads divide the rows of a batch that is laid out step after step, the rows of each lie
// between those of others, and a core that fetches ahead of what it reads takes lines from the one
// that is about to write them. So a thread leaves h of a few steps, which it reads again, in memory
// of its own, and then copies them to where they belong.
#pragma once

#include <algorithm>

#include "stack.h"

namespace fastrnn {

// Steps that are copied at once.
constexpr int64_t kStepsApart = 8;

// Of a share's rows of one step. More gain little beside what they compute.
constexpr int64_t kMostBytesApart = 8 << 10;

// Elements of memory for a share of so many rows; 0: they are written where they belong at once.
template <typename E>
int64_t apart_size(const Stack& stack, int64_t rows) {
  const int64_t step = rows * stack.width;
  const bool kept = stack.distant && !stack.packed && stack.steps > 1 &&
                    step * static_cast<int64_t>(sizeof(E)) <= kMostBytesApart;
  return kept ? (kStepsApart + 1) * step : 0;
}

// Calls run(args, s_begin, s_end) for all steps of a share of those rows, a few at a time, with
// args whose h is in `memory`, of apart_size() elements.
template <typename E, typename Run>
void run_apart(const ForwardArgs<E>& args, int64_t row_begin, int64_t row_end, E* memory,
               const Run& run) {
  const Schedule& schedule = args.schedule;
  const int64_t step = (row_end - row_begin) * args.width;
  const bool adjacent = args.h.row_stride == args.width;
  const int64_t together = adjacent ? step : args.width;
  const int64_t out_stride = adjacent ? step : args.h.row_stride;
  ForwardArgs<E> apart = args;
  apart.h.row_stride = args.width;
  apart.h.step_stride = args.reverse ? -step : step;
  for (int64_t s = 0; s < schedule.steps; s += kStepsApart) {
    const int64_t s_end = std::min(s + kStepsApart, schedule.steps);
    const int64_t first = schedule.step(s, args.reverse);
    // The step before them comes first.
    apart.h.data = memory + step - first * apart.h.step_stride - row_begin * args.width;
    run(apart, s, s_end);
    const E* row = memory + step;
    for (int64_t i = s; i < s_end; ++i) {
      E* out = args.h.row(schedule, schedule.step(i, args.reverse), row_begin);
      for (int64_t left = step; left > 0; left -= together, row += together, out += out_stride) {
        std::copy_n(row, together, out);
      }
    }
    std::copy_n(row - step, step, memory);
  }
}

}  // namespace fastrnn
