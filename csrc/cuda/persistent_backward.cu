// The backward pass of a whole layer in one launch. A block owns some hidden units of one direction
// and keeps their columns of w_hh in shared memory; the gradients of a step's pre-activations are
// written to global memory, where the weights' gradients need them anyway, and read there by the
// step before, after one barrier.
#include "cells.cuh"
#include "team.cuh"

namespace fastrnn::cuda {
namespace {

struct PersistentBackwardArgs {
  BackwardArgs base;
  const void* w_hh[kDirections];
  bool clusters;
};

template <typename E, Cell cell, int kUnits, int R>
__global__ void __launch_bounds__(kBlockThreads, Product<E, kUnits, R>::kBlocks)
    persistent_backward_kernel(PersistentBackwardArgs args) {
  using C = Compute<E>;
  using Product = cuda::Product<E, kUnits, R>;
  static_assert(R * kUnits <= kBlockThreads, "an element for each thread");
  FASTRNN_SHARED_MEMORY(shared);

  const BackwardArgs& base = args.base;
  const int64_t hidden = base.hidden, gates = gate_count(cell) * hidden;
  const int64_t d = blockIdx.y, first_unit = static_cast<int64_t>(blockIdx.x) * kUnits;
  const Product product(shared, gates);
  const E* const w_hh = static_cast<const E*>(args.w_hh[d]);
  product.fill([&](int64_t k, int column) {
    const int64_t unit = first_unit + column;
    return k < gates + is(Mutant::weight_past_end) && unit < hidden ? w_hh[k * hidden + unit]
                                                                    : from_compute<E>(0);
  });
  if (!is(Mutant::no_barrier_after_fill)) __syncthreads();

  const E* const dgates = static_cast<const E*>(base.dgates) + d * base.rows * gates;
  const Walk walk(base.schedule, static_cast<int>(d), /*backward=*/true);
  const int r = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
  const int64_t j = first_unit + unit;
  // The last turn, past the steps, only leaves the gradient of h0.
  for (int64_t s = 0; s <= base.schedule.steps; ++s) {
    const int64_t rows = walk.rows(s), running = walk.rows(s - 1);
    const E* const before = running > 0 ? dgates + walk.first_row(s - 1) * gates : nullptr;
    const int64_t end = rows < running ? running : rows;
    for (int64_t first = first_tile<R>(); first < end; first += gridDim.z * R) {
      const int64_t n = first + r;
      const bool mine =
          r < R && j < hidden + is(Mutant::unit_past_end) && n < end + is(Mutant::row_past_end);
      const BackwardElement<E, cell> element{base, walk, d, n, j};
      typename BackwardElement<E, cell>::Operands operands;
      // On their way while the product runs. (Loaded by it, as in forward, they are registers too
      // many for a 16-bit LSTM.)
      if (mine && n < rows) element.load(s, operands);
      if (first < running) {
        const auto row_of_dgates = [&](int i) -> const E* {
          return first + i < running ? before + (first + i) * gates : nullptr;
        };
        product.multiply(row_of_dgates, [] {});
      }
      if (!is(Mutant::no_barrier_before_sum)) __syncthreads();
      if (mine) {
        const C dh = n < running ? product.sum(r, unit) : element.dh();
        if (n < rows) {
          element.update(s, dh, operands);
        } else {
          element.dh() = dh;
        }
      }
      if (!is(Mutant::no_barrier_after_tile)) __syncthreads();
    }
    if (!is(Mutant::no_team_barrier) && s < base.schedule.steps) meet(args.clusters);
  }
}

// Shared memory of one block.
template <typename E, Cell cell, typename Tile>
int64_t block_shared_bytes(int64_t hidden) {
  return Product<E, Tile::units, Tile::rows>::shared_bytes(gate_count(cell) * hidden);
}

}  // namespace

int backward_teams(Element element, Cell cell, int64_t hidden, PersistentTile tile, bool clusters,
                   int* teams) {
  return with_tile(element, cell, tile, [&](auto e, auto c, auto t) {
    const int64_t bytes = block_shared_bytes<decltype(e), c.value, decltype(t)>(hidden);
    return count_teams(persistent_backward_kernel<decltype(e), c.value, t.units, t.rows>,
                       divide_up(hidden, t.units), bytes, clusters, teams);
  });
}

int launch_persistent_backward(const BackwardArgs& args, const Teams& teams,
                               const void* const w_hh[kDirections], Stream stream) {
  const PersistentBackwardArgs all{args, {w_hh[0], w_hh[1]}, teams.clusters};
  return with_tile(args.element, args.cell, teams.tile, [&](auto e, auto c, auto t) {
    const int64_t bytes = block_shared_bytes<decltype(e), c.value, decltype(t)>(args.hidden);
    return launch_persistent(persistent_backward_kernel<decltype(e), c.value, t.units, t.rows>,
                             args.hidden, args.directions, teams, bytes, stream, all);
  });
}

}  // namespace fastrnn::cuda
