// Whether a layer runs persistently on a GPU, and by which teams of blocks; else step by step.
//
// The persistent kernels read their weights once, and pay a barrier a step; step by step, a
// library's product reads them at every step, and its launches are paid. So the persistent path
// wins while a step is short, and only where the weights fit in shared memory and whole teams run
// at once. The figures below are of an H200 and decide nothing but the path: see
// csrc/cuda/README.md.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "gpu.h"

namespace fastrnn::gpu {
namespace {

using cuda::DeviceLimits;
using cuda::Element;
using cuda::PersistentTile;
using cuda::Teams;

constexpr int kLowestCapability = 80;  // LOWEST_CUDA_ARCH of setup.py
constexpr double kGridBarrierUs = 1.1, kClusterBarrierUs = 0.5;
constexpr int64_t kRoundDepth = 256;       // of K: a chunk for each warp of a block
constexpr double kTileBytesPerUs = 2.5e6;  // of tiles, from L2 to all multiprocessors together
constexpr double kFillBytesPerUs = 4e3;    // of weights, to a block, once: estimated, not measured
// A persistent kernel's costs.
struct Costs {
  double tile_us, row_us;  // of a tile and of each of its rows, beside the product
  double round_us;         // of a tile's product over kRoundDepth, at least
  double flops_per_us;     // floating-point operations of all multiprocessors
};
constexpr Costs kVectorCosts = {0.9, 0.05, 0.17, 19e6}, kTensorCosts = {2.0, 0, 0.5, 54e6};
// A step's by a library's products.
constexpr double kLaunchUs = 7;  // of a kernel, by the host
constexpr double kWeightBytesPerUs = 4e6;
constexpr double kVectorFlopsPerUs = 40e6, kTensorFlopsPerUs = 200e6;

// One pass over a layer, as its paths see it.
struct Pass {
  int64_t depth;    // K of the recurrent product
  int64_t columns;  // of it, for each hidden unit
  int (*teams)(Element, Cell, int64_t hidden, PersistentTile, bool clusters, int*);
};

double bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

// A block reads and multiplies its tiles one after the other, on its share of a multiprocessor.
double persistent_step_us(const Stack& stack, Element element, const Pass& pass, const Teams& teams,
                          int multiprocessors) {
  const PersistentTile& tile = teams.tile;
  const Costs& costs = element == Element::f32 ? kVectorCosts : kTensorCosts;
  const int64_t blocks = stack.directions * teams.slices * divide_up(stack.hidden, tile.units);
  const int64_t tiles = divide_up(divide_up(stack.batch, tile.rows), teams.slices);
  const double reads = static_cast<double>(blocks * tile.rows * pass.depth) * bytes_of(element);
  const double rounds = static_cast<double>(divide_up(pass.depth, kRoundDepth)) * costs.round_us;
  const double flops =
      2.0 * static_cast<double>(tile.rows * pass.depth * pass.columns * tile.units);
  const auto sharing = static_cast<double>(divide_up(blocks, multiprocessors));
  const double product = std::max(
      {rounds, reads / kTileBytesPerUs, sharing * flops * multiprocessors / costs.flops_per_us});
  const double weights =
      static_cast<double>(pass.depth * pass.columns * tile.units) * bytes_of(element);
  const double fill = weights / kFillBytesPerUs / static_cast<double>(stack.steps);
  return fill + (teams.clusters ? kClusterBarrierUs : kGridBarrierUs) +
         static_cast<double>(tiles) * (costs.tile_us + tile.rows * costs.row_us + product);
}

// A library's product reads the weights from L2 at every step; one of it for each direction, and
// the launch of the cells.
double stepwise_step_us(const Stack& stack, Element element, const Pass& pass) {
  const auto weights =
      static_cast<double>(stack.directions * pass.depth * pass.columns * stack.hidden);
  const double flops_per_us = element == Element::f32 ? kVectorFlopsPerUs : kTensorFlopsPerUs;
  return static_cast<double>(1 + stack.directions) * kLaunchUs +
         weights * bytes_of(element) / kWeightBytesPerUs +
         2 * weights * static_cast<double>(stack.batch) / flops_per_us;
}

std::vector<PersistentTile> tiles(const Stack& stack, Element element) {
  if (element != Element::f32) return {{16, 16}};
  const int units = stack.cell == Cell::lstm ? 8 : 16;
  if (stack.batch == 1) return {{units, 1}, {2 * units, 1}};
  return {{units, 4}, {2 * units, 4}, {units, 8}, {2 * units, 8}};
}

// Teams that the device runs at once. To ask takes microseconds, and the answer stays.
int count_teams(const Stack& stack, Element element, const Pass& pass, PersistentTile tile,
                bool clusters, int device) {
  using Question = std::tuple<int, decltype(pass.teams), Element, Cell, int64_t, int, int, bool>;
  static std::mutex mutex;
  static std::map<Question, int> known;
  const Question question{device,       pass.teams, element,   stack.cell,
                          stack.hidden, tile.units, tile.rows, clusters};
  const std::lock_guard lock(mutex);
  const auto found = known.find(question);
  if (found != known.end()) return found->second;
  int teams = 0;
  check(pass.teams(element, stack.cell, stack.hidden, tile, clusters, &teams));
  return known[question] = teams;
}

std::optional<Teams> choose_teams(const Stack& stack, Element element, const Pass& pass) {
  // FASTRNN_CUDA_PATH: "stepwise", or "persistent" wherever it fits; for measurements and tests.
  const char* const variable = std::getenv("FASTRNN_CUDA_PATH");
  const std::string_view wish = variable ? variable : "";
  DeviceLimits limits{};
  check(cuda::query_device(&limits));
  TORCH_CHECK(limits.capability >= kLowestCapability,
              "fastrnn: the CUDA kernels need compute capability 8.0 or later");
  TORCH_CHECK(
      limits.compiled,
      "fastrnn: built without code for this GPU; TORCH_CUDA_ARCH_LIST names those to build for");
  if (wish == "stepwise" || element == Element::f64 || stack.projected) return std::nullopt;
  std::optional<Teams> best;
  double best_us = wish == "persistent" ? std::numeric_limits<double>::infinity()
                                        : stepwise_step_us(stack, element, pass);
  for (const PersistentTile tile : tiles(stack, element)) {
    for (const bool clusters : {true, false}) {
      // As many slices as there are tiles, or as run at once.
      const int64_t slices = std::min(
          count_teams(stack, element, pass, tile, clusters, limits.device) / stack.directions,
          divide_up(stack.batch, tile.rows));
      if (slices == 0) continue;
      const Teams teams{tile, static_cast<int>(slices), clusters};
      const double us = persistent_step_us(stack, element, pass, teams, limits.multiprocessors);
      if (us < best_us) {
        best = teams;
        best_us = us;
      }
    }
  }
  return best;
}

}  // namespace

std::optional<Teams> choose_forward_teams(const Stack& stack, Element element) {
  return choose_teams(stack, element, {stack.hidden, gate_count(stack.cell), cuda::forward_teams});
}

std::optional<Teams> choose_backward_teams(const Stack& stack, Element element) {
  return choose_teams(stack, element, {stack.gates(), 1, cuda::backward_teams});
}

}  // namespace fastrnn::gpu
