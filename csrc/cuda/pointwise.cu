// The cells of one step, between two matrix products: a thread for each hidden unit of each row.
#include "cells.cuh"

namespace fastrnn::cuda {
namespace {

constexpr int kThreads = 256;

// Where a thread's element lies, and whether it exists at this step.
struct Position {
  int64_t d, n, j;

  __device__ __forceinline__ explicit Position(int64_t hidden) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    d = blockIdx.y;
    n = i / hidden;
    j = i % hidden;
  }
};

dim3 grid_of(int64_t rows, int64_t hidden, int64_t directions) {
  return dim3(static_cast<unsigned>(divide_up(rows * hidden, kThreads)),
              static_cast<unsigned>(directions));
}

template <typename E, Cell cell>
__global__ void __launch_bounds__(kThreads)
    pointwise_forward_kernel(ForwardArgs args, const void* recurrent, int64_t step) {
  using C = Compute<E>;
  const Position at(args.hidden);
  const Walk walk(args.schedule, static_cast<int>(at.d), /*backward=*/false);
  if (at.n >= walk.rows(step) + is(Mutant::row_past_end)) return;
  const ForwardElement<E, cell> element{args, at.d, at.n, at.j, walk.first_row(step) + at.n};
  constexpr int kGateCount = gate_count(cell);
  const int64_t gates = kGateCount * args.hidden;
  const C* product =
      static_cast<const C*>(recurrent) + (at.d * args.schedule.rows + at.n) * gates + at.j;
  typename ForwardElement<E, cell>::Operands operands;
  element.load(operands);
  const auto biases = ForwardElement<E, cell>::load_biases(args, at.d, at.j);
  const E h = element.update(operands, biases, [&](int g) { return product[g * args.hidden]; });
  if (args.unprojected[at.d]) {
    static_cast<E*>(args.unprojected[at.d])[element.row * args.hidden + at.j] = h;
  } else {
    element.h() = h;
    element.h_n() = h;
  }
}

template <typename E, Cell cell>
__global__ void __launch_bounds__(kThreads)
    pointwise_backward_kernel(BackwardArgs args, int64_t step) {
  const Position at(args.hidden);
  const Walk walk(args.schedule, static_cast<int>(at.d), /*backward=*/true);
  if (at.n >= walk.rows(step) + is(Mutant::row_past_end)) return;
  const BackwardElement<E, cell> element{args, walk, at.d, at.n, at.j};
  typename BackwardElement<E, cell>::Operands operands;
  element.load(step, operands);
  element.update(step, element.dh(), operands);
}

}  // namespace

int launch_pointwise_forward(const ForwardArgs& args, const void* recurrent, int64_t step,
                             Stream stream) {
  return with_element(args.element, [&](auto element) {
    return with_cell(args.cell, [&](auto cell) {
      return launch(pointwise_forward_kernel<decltype(element), cell.value>,
                    grid_of(args.schedule.rows, args.hidden, args.directions), kThreads, stream,
                    args, recurrent, step);
    });
  });
}

int launch_pointwise_backward(const BackwardArgs& args, int64_t step, Stream stream) {
  return with_element(args.element, [&](auto element) {
    return with_cell(args.cell, [&](auto cell) {
      return launch(pointwise_backward_kernel<decltype(element), cell.value>,
                    grid_of(args.schedule.rows, args.hidden, args.directions), kThreads, stream,
                    args, step);
    });
  });
}

}  // namespace fastrnn::cuda
