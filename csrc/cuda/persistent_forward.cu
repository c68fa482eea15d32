// The forward pass of a whole layer in one launch. A block owns some hidden units of one direction
// and keeps all gates' rows of w_hh for them in shared memory; h goes from step to step through
// global memory, with one barrier a step.
#include "cells.cuh"
#include "team.cuh"

namespace fastrnn::cuda {
namespace {

struct PersistentForwardArgs {
  ForwardArgs base;
  const void* w_hh[kDirections];
  const void* h0;
  void* exchange;
  bool clusters;
};

template <typename E, Cell cell, int kUnits, int R>
__global__ void __launch_bounds__(kBlockThreads, Product<E, gate_count(cell) * kUnits, R>::kBlocks)
    persistent_forward_kernel(PersistentForwardArgs args) {
  using C = Compute<E>;
  constexpr int kGateCount = gate_count(cell);
  using Product = cuda::Product<E, kGateCount * kUnits, R>;
  static_assert(R * kUnits <= kBlockThreads, "an element for each thread");
  FASTRNN_SHARED_MEMORY(shared);

  const ForwardArgs& base = args.base;
  const int64_t hidden = base.hidden, batch = base.schedule.rows;
  const int64_t d = blockIdx.y, first_unit = static_cast<int64_t>(blockIdx.x) * kUnits;
  const Product product(shared, hidden);
  const E* const w_hh = static_cast<const E*>(args.w_hh[d]);
  product.fill([&](int64_t k, int column) {
    const int64_t unit = first_unit + column % kUnits;
    const bool exists = k < hidden + is(Mutant::weight_past_end) && unit < hidden;
    return exists ? w_hh[(column / kUnits * hidden + unit) * hidden + k] : from_compute<E>(0);
  });
  if (!is(Mutant::no_barrier_after_fill)) __syncthreads();

  // What h of a step is read by the next one; row 0 of this direction.
  const auto exchange = [&](int64_t s) {
    return static_cast<E*>(args.exchange) + (s % 2 * base.directions + d) * batch * hidden;
  };
  const E* const h0 = static_cast<const E*>(args.h0) + d * batch * hidden;
  const Walk walk(base.schedule, static_cast<int>(d), /*backward=*/false);
  const int r = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
  const int64_t j = first_unit + unit;
  const auto biases = ForwardElement<E, cell>::load_biases(base, d, j);
  for (int64_t s = 0; s < base.schedule.steps; ++s) {
    const int64_t rows = walk.rows(s), running = walk.rows(s - 1), lasting = walk.rows(s + 1);
    const E* const h_before = exchange(s + 1);
    for (int64_t first = first_tile<R>(); first < rows; first += gridDim.z * R) {
      const int64_t n = first + r;
      const bool mine =
          r < R && n < rows + is(Mutant::row_past_end) && j < hidden + is(Mutant::unit_past_end);
      const ForwardElement<E, cell> element{base, d, n, j, walk.first_row(s) + n};
      typename ForwardElement<E, cell>::Operands operands;
      const auto row_of_h = [&](int i) -> const E* {
        const int64_t row = first + i;
        if (row >= rows) return nullptr;
        return (row < running ? h_before : h0) + row * hidden;
      };
      product.multiply(row_of_h, [&] {
        if (mine) element.load(operands);
      });
      if (!is(Mutant::no_barrier_before_sum)) __syncthreads();
      if (mine) {
        const auto sum = [&](int g) { return product.sum(r, g * kUnits + unit); };
        const E h = element.update(operands, biases, sum);
        exchange(s)[n * hidden + j] = h;
        element.h() = h;
        if (n >= lasting) element.h_n() = h;
      }
      if (!is(Mutant::no_barrier_after_tile)) __syncthreads();
    }
    if (!is(Mutant::no_team_barrier) && s + 1 < base.schedule.steps) meet(args.clusters);
  }
}

// Shared memory of one block.
template <typename E, Cell cell, typename Tile>
int64_t block_shared_bytes(int64_t hidden) {
  return Product<E, gate_count(cell) * Tile::units, Tile::rows>::shared_bytes(hidden);
}

}  // namespace

int forward_teams(Element element, Cell cell, int64_t hidden, PersistentTile tile, bool clusters,
                  int* teams) {
  return with_tile(element, cell, tile, [&](auto e, auto c, auto t) {
    const int64_t bytes = block_shared_bytes<decltype(e), c.value, decltype(t)>(hidden);
    return count_teams(persistent_forward_kernel<decltype(e), c.value, t.units, t.rows>,
                       divide_up(hidden, t.units), bytes, clusters, teams);
  });
}

int launch_persistent_forward(const ForwardArgs& args, const Teams& teams,
                              const void* const w_hh[kDirections], const void* h0, void* exchange,
                              Stream stream) {
  const PersistentForwardArgs all{args, {w_hh[0], w_hh[1]}, h0, exchange, teams.clusters};
  return with_tile(args.element, args.cell, teams.tile, [&](auto e, auto c, auto t) {
    const int64_t bytes = block_shared_bytes<decltype(e), c.value, decltype(t)>(args.hidden);
    return launch_persistent(persistent_forward_kernel<decltype(e), c.value, t.units, t.rows>,
                             args.hidden, args.directions, teams, bytes, stream, all);
  });
}

}  // namespace fastrnn::cuda
