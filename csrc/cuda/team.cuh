// What both persistent kernels share: their tiles, their teams of blocks (see kernels.h), and the
// launch.
#pragma once

#include <cooperative_groups.h>

#include "product.cuh"

// What multiprocessors of compute capability 9.0 and later have; and the emulator, and nvcc's pass
// for the host, which looks at the device's code too.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTRNN_CLUSTERS 1
#endif

namespace fastrnn::cuda {

template <int kUnits, int kRows>
struct TileTag {
  static constexpr int units = kUnits;
  static constexpr int rows = kRows;
};

// Calls f(E{}, CellTag, TileTag) for the tiles that exist: see tiles in ../gpu_plan.cpp.
template <typename F>
int with_tile(Element element, Cell cell, PersistentTile tile, F&& f) {
  return with_cell(cell, [&](auto cell_tag) -> int {
    constexpr bool kLstm = cell_tag.value == Cell::lstm;
    constexpr int kSmall = kLstm ? 8 : 16, kLarge = 2 * kSmall;
    const auto is = [&](int units, int rows) { return tile.units == units && tile.rows == rows; };
    if (element == Element::f32) {
      if (is(kSmall, 1)) return f(float{}, cell_tag, TileTag<kSmall, 1>{});
      if (is(kSmall, 4)) return f(float{}, cell_tag, TileTag<kSmall, 4>{});
      if (is(kSmall, 8)) return f(float{}, cell_tag, TileTag<kSmall, 8>{});
      if (is(kLarge, 1)) return f(float{}, cell_tag, TileTag<kLarge, 1>{});
      if (is(kLarge, 4)) return f(float{}, cell_tag, TileTag<kLarge, 4>{});
      if (is(kLarge, 8)) return f(float{}, cell_tag, TileTag<kLarge, 8>{});
    } else if (is(16, 16)) {
      if (element == Element::f16) return f(__half{}, cell_tag, TileTag<16, 16>{});
      if (element == Element::bf16) return f(__nv_bfloat16{}, cell_tag, TileTag<16, 16>{});
    }
    return cudaErrorInvalidValue;
  });
}

// Of this block's slice.
template <int R>
__device__ __forceinline__ int64_t first_tile() {
  return static_cast<int64_t>(blockIdx.z) * R;
}

// After this the blocks of a team see what the others wrote.
__device__ __forceinline__ void meet([[maybe_unused]] bool clusters) {
#if defined(FASTRNN_CLUSTERS)
  if (clusters) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  cooperative_groups::this_grid().sync();
}

// More than 8 blocks have to be allowed.
constexpr int64_t kMaxCluster = 16;
template <typename Kernel>
int allow_large_clusters(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Lets a kernel have all the shared memory that a block may have on this device. Always all of it:
// another thread may be about to launch the same kernel with more than this one needs.
template <typename Kernel>
int allow_shared_memory(Kernel kernel) {
  int device = 0, bytes = 0;
  int error = cudaGetDevice(&device);
  if (!error) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Whether a kernel was compiled with the barrier of a cluster: a device that has clusters may run
// what its driver made of an older PTX.
template <typename Kernel>
int knows_clusters(Kernel kernel, bool* knows) {
  cudaFuncAttributes compiled{};
  const int error = cudaFuncGetAttributes(&compiled, kernel);
  *knows = compiled.ptxVersion >= 90;
  return error;
}

// Teams of so many blocks that the device runs at once.
template <typename Kernel>
int count_teams(Kernel kernel, int64_t blocks, int64_t shared_bytes, bool clusters, int* teams) {
  *teams = 0;
  DeviceLimits limits{};
  int error = query_device(&limits);
  bool can = limits.cooperative;
  if (!error && clusters) error = knows_clusters(kernel, &can);
  if (error) return error;
  if (clusters) can = can && limits.clusters && blocks <= kMaxCluster;
  if (!can || shared_bytes > limits.shared_bytes) return cudaSuccess;
  error = allow_shared_memory(kernel);
  if (error) return error;
  if (!clusters) {
    int per_multiprocessor = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel,
                                                          kBlockThreads, shared_bytes);
    *teams = static_cast<int>(int64_t{per_multiprocessor} * limits.multiprocessors / blocks);
    return error;
  }
  const Launch how(dim3(static_cast<unsigned>(blocks)), kBlockThreads, shared_bytes,
                   Together::along_x, nullptr);
  error = allow_large_clusters(kernel);
  if (!error) error = cudaOccupancyMaxActiveClusters(teams, kernel, &how.config);
  if (!error) return cudaSuccess;
  // This device takes fewer blocks than kMaxCluster, or no clusters after all: the grid's barrier
  // does without. If nothing works, that says so too.
  take_error(error);
  *teams = 0;
  return cudaSuccess;
}

// Launches a persistent kernel: a block for each tile of hidden units, direction and slice.
template <typename... Params, typename... Args>
int launch_persistent(void (*kernel)(Params...), int64_t hidden, int64_t directions,
                      const Teams& teams, int64_t shared_bytes, Stream stream,
                      const Args&... args) {
  int error = allow_shared_memory(kernel);
  if (!error && teams.clusters) error = allow_large_clusters(kernel);
  if (error) return error;
  const dim3 grid(static_cast<unsigned>(divide_up(hidden, teams.tile.units)),
                  static_cast<unsigned>(directions), static_cast<unsigned>(teams.slices));
  const Together together = teams.clusters ? Together::along_x : Together::all;
  return launch(kernel, Launch(grid, kBlockThreads, shared_bytes, together, stream), args...);
}

}  // namespace fastrnn::cuda
