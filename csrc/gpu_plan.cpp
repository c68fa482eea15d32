// Which path a layer takes on a GPU.
//
// The persistent kernels read their weights once, and pay one barrier of the grid a step; step by
// step, a library's product reads them at every step, and two launches a step are paid. So the
// persistent path wins while a step is short, and only where every block of it runs at once.
// The figures below are published ones of an H100, and decide nothing but the path: see
// csrc/cuda/README.md, which also says what to measure first on a real one.
#include <cstdlib>
#include <string_view>

#include "gpu.h"

namespace fastrnn::gpu {
namespace {

using cuda::DeviceLimits;
using cuda::Element;
using cuda::PersistentTile;

constexpr int kLowestCapability = 80;  // LOWEST_CUDA_ARCH of setup.py
constexpr double kBarrierUs = 1.5, kLaunchUs = 2.5;
constexpr double kMultiprocessors = 132;
constexpr double kL2BytesPerUs = 5.5e6;  // to all multiprocessors together
// What the persistent kernels and a library's product are expected to reach of 67 (float32) and 990
// (16-bit types) TFLOP/s.
struct Rates {
  double persistent, gemm;  // floating-point operations a microsecond
};
constexpr Rates kVectorRates = {0.5 * 67e6, 0.6 * 67e6};
constexpr Rates kTensorRates = {0.2 * 990e6, 0.3 * 990e6};

// One pass over a layer, as its paths see it.
struct Pass {
  int64_t depth;    // K of the recurrent product
  int64_t columns;  // of it, for each hidden unit
  int64_t (*shared_bytes)(Element, Cell, int64_t hidden, PersistentTile);
  int (*blocks)(Element, Cell, int64_t hidden, PersistentTile, int*);
};

const Rates& rates(Element element) {
  return element == Element::f32 ? kVectorRates : kTensorRates;
}

int64_t block_count(const Stack& stack, PersistentTile tile) {
  return stack.directions * ((stack.hidden - 1) / tile.units + 1);
}

// A block reads all rows of the left operand and multiplies whole tiles of them, on its share of
// one multiprocessor.
double persistent_step_us(const Stack& stack, Element element, const Pass& pass,
                          PersistentTile tile, int multiprocessors) {
  const double element_bytes = element == Element::f32 ? 4 : 2;
  const auto depth = static_cast<double>(pass.depth);
  const auto rows = static_cast<double>(((stack.batch - 1) / tile.rows + 1) * tile.rows);
  const double reads = static_cast<double>(stack.batch) * depth * element_bytes;
  const double flops = 2 * rows * depth * static_cast<double>(pass.columns * tile.units);
  const auto sharing = static_cast<double>((block_count(stack, tile) - 1) / multiprocessors + 1);
  return kBarrierUs +
         sharing * kMultiprocessors * (reads / kL2BytesPerUs + flops / rates(element).persistent);
}

// A library's product reads the weights from L2 at every step; one of it for each direction, and
// the launch of the cells.
double stepwise_step_us(const Stack& stack, Element element, const Pass& pass) {
  const double element_bytes = element == Element::f32 ? 4 : 2;
  const auto weights =
      static_cast<double>(stack.directions * pass.depth * pass.columns * stack.hidden);
  return static_cast<double>(1 + stack.directions) * kLaunchUs +
         weights * element_bytes / kL2BytesPerUs +
         2 * weights * static_cast<double>(stack.batch) / rates(element).gemm;
}

// Tiles from the one of the fewest hidden units, so of the most blocks, on.
std::vector<PersistentTile> tiles(const Stack& stack, Element element) {
  if (element != Element::f32) return {{16, 16}};
  const int rows = stack.batch == 1 ? 1 : stack.batch <= 4 ? 4 : 8;
  const int units = stack.cell == Cell::lstm ? 8 : 16;
  return {{units, rows}, {2 * units, rows}};
}

bool fits(const Stack& stack, Element element, const Pass& pass, PersistentTile tile,
          const DeviceLimits& limits) {
  if (pass.shared_bytes(element, stack.cell, stack.hidden, tile) > limits.shared_bytes) {
    return false;
  }
  int per_multiprocessor = 0;
  check(pass.blocks(element, stack.cell, stack.hidden, tile, &per_multiprocessor));
  return block_count(stack, tile) <=
         static_cast<int64_t>(per_multiprocessor) * limits.multiprocessors;
}

Path choose_path(const Stack& stack, Element element, const Pass& pass) {
  const Path stepwise{false, {}};
  // FASTRNN_CUDA_PATH: "stepwise", or "persistent" wherever it fits; for measurements and tests.
  const char* const variable = std::getenv("FASTRNN_CUDA_PATH");
  const std::string_view wish = variable ? variable : "";
  DeviceLimits limits{};
  check(cuda::query_device(&limits));
  TORCH_CHECK(limits.capability >= kLowestCapability,
              "fastrnn: the CUDA kernels need compute capability 8.0 or later");
  const bool only_stepwise = element == Element::f64 || stack.projected || !limits.cooperative;
  if (wish == "stepwise" || only_stepwise) return stepwise;
  for (const PersistentTile tile : tiles(stack, element)) {
    const bool faster = persistent_step_us(stack, element, pass, tile, limits.multiprocessors) <
                        stepwise_step_us(stack, element, pass);
    if (!faster && wish != "persistent") continue;
    if (fits(stack, element, pass, tile, limits)) return {true, tile};
  }
  return stepwise;
}

}  // namespace

Path choose_forward_path(const Stack& stack, Element element) {
  return choose_path(
      stack, element,
      {stack.hidden, gate_count(stack.cell), cuda::forward_shared_bytes, cuda::forward_blocks});
}

Path choose_backward_path(const Stack& stack, Element element) {
  return choose_path(stack, element,
                     {stack.gates(), 1, cuda::backward_shared_bytes, cuda::backward_blocks});
}

}  // namespace fastrnn::gpu
