// Small kernels, right and wrong, on which test_emulator.py tries the emulator. The argument names
// one; a right one prints "ok".
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#define FASTRNN_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define FASTRNN_SHARED_MEMORY(name) unsigned char* const name = fastrnn_emulator::shared_memory()
#endif

namespace {

void require(bool condition, const char* what, int line) {
  if (condition) return;
  std::printf("%s:%d: %s\n", __FILE__, line, what);
  std::exit(1);
}
#define REQUIRE(condition) require(condition, #condition, __LINE__)

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                   bool cooperative, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// In clusters of so many blocks along x.
struct ClusterConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterConfig(dim3 grid, dim3 block, size_t shared, unsigned cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster,
                            const Args&... args) {
  const ClusterConfig how(grid, block, 0, cluster);
  return cudaLaunchKernelEx(&how.config, kernel, Params(args)...);
}

template <typename Kernel>
int count_clusters(Kernel kernel, dim3 block, size_t shared, unsigned cluster) {
  const ClusterConfig how(cluster, block, shared, cluster);
  int clusters = -1;
  REQUIRE(cudaOccupancyMaxActiveClusters(&clusters, kernel, &how.config) == cudaSuccess);
  return clusters;
}

// Each block reverses its part of x through shared memory. barrier: 0 leaves out the barrier.
__global__ void reverse_kernel(float* x, int barrier) {
  FASTRNN_SHARED_MEMORY(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int n = blockDim.x, i = threadIdx.x;
  float* const part = x + blockIdx.x * n;
  shared[i] = part[i];
  if (barrier) __syncthreads();
  part[i] = shared[n - 1 - i];
}

void reverse(int barrier) {
  constexpr int kThreads = 96, kBlocks = 5;
  std::vector<float> x(kThreads * kBlocks);
  for (int i = 0; i < kThreads * kBlocks; ++i) x[i] = static_cast<float>(i);
  const size_t bytes = kThreads * sizeof(float);
  REQUIRE(launch(reverse_kernel, kBlocks, kThreads, bytes, false, x.data(), barrier) ==
          cudaSuccess);
  for (int i = 0; barrier && i < kThreads * kBlocks; ++i) {
    const int block = i / kThreads, thread = i % kThreads;
    REQUIRE(x[i] == static_cast<float>(block * kThreads + kThreads - 1 - thread));
  }
}

// As above within a warp.
__global__ void warp_reverse_kernel(float* x, int barrier) {
  FASTRNN_SHARED_MEMORY(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, lane = i % warpSize;
  shared[i] = x[i];
  if (barrier) __syncwarp();
  x[i] = shared[i - lane + warpSize - 1 - lane];
}

void warp_reverse(int barrier) {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
  REQUIRE(launch(warp_reverse_kernel, 1, 64, 256, false, x.data(), barrier) == cudaSuccess);
  for (int i = 0; barrier && i < 64; ++i) {
    REQUIRE(x[i] == static_cast<float>(i / 32 * 32 + 31 - i % 32));
  }
}

// Each turn, each thread takes the value of one of the next block.
__global__ void rotate_kernel(float* x, float* y, int turns, int barrier) {
  const int n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int turn = 0; turn < turns; ++turn) {
    (turn % 2 ? x : y)[i] = __ldcg((turn % 2 ? y : x) + (i + blockDim.x) % n) + 1;
    if (barrier) cooperative_groups::this_grid().sync();
  }
}

void rotate(int blocks, int threads, int barrier) {
  const int n = blocks * threads, turns = 4;
  std::vector<float> x(n), y(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i);
  REQUIRE(launch(rotate_kernel, blocks, threads, 0, true, x.data(), y.data(), turns, barrier) ==
          cudaSuccess);
  for (int i = 0; barrier && i < n; ++i) {
    REQUIRE(x[i] == static_cast<float>((i + turns * threads) % n + turns));
  }
}

constexpr int kCluster = 4;

// Likewise within each cluster.
__global__ void rotate_in_cluster_kernel(float* x, float* y, int turns, int barrier) {
  const int n = kCluster * blockDim.x, i = blockIdx.x % kCluster * blockDim.x + threadIdx.x;
  const int first = blockIdx.x / kCluster * n;
  for (int turn = 0; turn < turns; ++turn) {
    (turn % 2 ? x : y)[first + i] = __ldcg((turn % 2 ? y : x) + first + (i + blockDim.x) % n) + 1;
    if (barrier) cooperative_groups::this_cluster().sync();
  }
}

void rotate_in_cluster(int barrier) {
  const int threads = 64, n = kCluster * threads, clusters = 7, turns = 4;
  std::vector<float> x(clusters * n), y(clusters * n);
  for (int i = 0; i < clusters * n; ++i) x[i] = static_cast<float>(i);
  REQUIRE(launch_clusters(rotate_in_cluster_kernel, clusters * kCluster, threads, kCluster,
                          x.data(), y.data(), turns, barrier) == cudaSuccess);
  for (int i = 0; barrier && i < clusters * n; ++i) {
    REQUIRE(x[i] == static_cast<float>(i / n * n + (i % n + turns * threads) % n + turns));
  }
}

// What a thread waits for before it reads what another wrote.
enum class Weak { shuffle, warp, half_warp, block };

// Reads from a thread that did not wait for this one; `enough` makes it one that did.
__global__ void weak_kernel(float* x, float* y, Weak weak, int enough) {
  const int first = blockIdx.x * blockDim.x, i = threadIdx.x, lane = i % warpSize;
  x[first + i] = static_cast<float>(first + i);
  int from = first + i;
  for (int turn = 0; turn < 3; ++turn) {
    switch (weak) {
      case Weak::shuffle:
        __shfl_xor_sync(0xffffffffu, turn, 1);
        if (!enough) from = first + (i ^ 1);
        break;
      case Weak::warp:
        __syncwarp();
        from = first + (i ^ (enough ? 1 : warpSize));
        break;
      case Weak::half_warp:
        __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
        from = first + (i ^ (enough ? 1 : 16));
        break;
      case Weak::block:
        __syncthreads();
        from = enough ? first + (i ^ warpSize) : (first + i + blockDim.x) % (2 * blockDim.x);
        break;
    }
  }
  y[first + i] = x[from];
}

void weak(Weak kind, int enough) {
  std::vector<float> x(128), y(128);
  REQUIRE(launch(weak_kernel, 2, 64, 0, true, x.data(), y.data(), kind, enough) == cudaSuccess);
}

// Threads of one block after the other use the same stacks.
__device__ __noinline__ void count_up(float* numbers) {
  for (int i = 0; i < 8; ++i) numbers[i] = static_cast<float>(i);
}
__global__ void stack_kernel(float* x) {
  float local[8];
  count_up(local);
  x[blockIdx.x * blockDim.x + threadIdx.x] = local[threadIdx.x % 8];
}

void stacks() {
  std::vector<float> x(5 * 96);
  REQUIRE(launch(stack_kernel, 5, 96, 0, false, x.data()) == cudaSuccess);
  for (int i = 0; i < 5 * 96; ++i) REQUIRE(x[i] == static_cast<float>(i % 96 % 8));
}

// Loads a tile of which each lane wrote what it happens to get under the emulator, and no barrier
// stands between.
__global__ void own_part_kernel(float* x) {
  namespace wmma = nvcuda::wmma;
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) {
    x[(lane / 4 + 8 * (i / 4)) * 16 + lane % 4 * 2 + 8 * (i / 2 % 2) + i % 2] = 1;
  }
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::load_matrix_sync(sum, x, 16, wmma::mem_row_major);
}

void own_part() {
  alignas(32) float x[256];
  REQUIRE(launch(own_part_kernel, 1, 32, 0, false, x) == cudaSuccess);
}

// Notes who runs, one after the other, before, between and after two barriers.
__global__ void order_kernel(int* count, int* log) {
  const int warp = static_cast<int>(blockIdx.x) * 2 + static_cast<int>(threadIdx.x) / warpSize;
  log[(*count)++] = warp;
  __syncwarp();
  log[(*count)++] = 4 + warp;
  __syncthreads();
  log[(*count)++] = 8 + warp;
}

// Prints each run of a warp once, as phase, block and warp.
void order() {
  std::vector<int> log(3 * 128);
  int count = 0, before = -1;
  REQUIRE(launch(order_kernel, 2, 64, 0, true, &count, log.data()) == cudaSuccess);
  REQUIRE(count == 3 * 128);
  for (const int entry : log) {
    if (entry != before) std::printf("%c%d%d ", "abc"[entry / 4], entry / 2 % 2, entry % 2);
    before = entry;
  }
}

// All threads of a grid write one place.
__global__ void same_place_kernel(int* x, int by_block) {
  if (threadIdx.x == 0) x[by_block ? 0 : blockIdx.x] = 1;
}

void same_place(int by_block) {
  std::vector<int> x(8);
  REQUIRE(launch(same_place_kernel, 8, 64, 0, false, x.data(), by_block) == cudaSuccess);
  // The host and a second grid come after the first.
  x[0] = 2;
  REQUIRE(launch(same_place_kernel, 8, 64, 0, false, x.data(), 0) == cudaSuccess);
  REQUIRE(x[0] == 1);
}

__global__ void shuffle_kernel(float* sums, double* x) {
  float sum = static_cast<float>(threadIdx.x);
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  sums[threadIdx.x] = sum;
  const double value = threadIdx.x;
  const int lane = threadIdx.x % warpSize;
  // The halves of a warp go their own ways.
  double got;
  if (lane < 16) {
    got = __shfl_down_sync(0x0000ffffu, value, 3, 8);
  } else {
    got = __shfl_sync(0xffff0000u, value, 17);
    got += __shfl_up_sync(0xffff0000u, value, 1, 16);
  }
  x[threadIdx.x] = got;
}

void shuffle() {
  std::vector<float> sums(64);
  std::vector<double> x(64);
  REQUIRE(launch(shuffle_kernel, 1, 64, 0, false, sums.data(), x.data()) == cudaSuccess);
  for (int i = 0; i < 64; ++i) {
    REQUIRE(sums[i] == (i < 32 ? 496.f : 1520.f));
    const int first = i / 32 * 32, lane = i % 32;
    if (lane < 16) {
      REQUIRE(x[i] == (lane % 8 + 3 < 8 ? i + 3 : i));
    } else {
      REQUIRE(x[i] == first + 17 + (lane == 16 ? i : i - 1));
    }
  }
}

enum class Fault {
  none,
  lane_not_named,
  named_lane_leaves,
  named_lane_elsewhere,
  unnamed_source,
  other_operation,
  thread_leaves,
  other_barrier,
  half_waits_for_grid,
  grid_without_cooperation,
  block_leaves_cluster
};

__global__ void faulty_kernel(float* x, Fault fault) {
  const int lane = threadIdx.x % warpSize;
  float value = x[threadIdx.x];
  switch (fault) {
    case Fault::none: break;
    case Fault::lane_not_named: value = __shfl_xor_sync(0x7fffffffu, value, 0); break;
    case Fault::named_lane_leaves:
      if (lane == 5) return;
      value = __shfl_xor_sync(0xffffffffu, value, 0);
      break;
    case Fault::named_lane_elsewhere:
      if (lane == 5) {
        __syncthreads();
      } else {
        value = __shfl_xor_sync(0xffffffffu, value, 0);
      }
      break;
    case Fault::unnamed_source:
      if (lane < 8) value = __shfl_sync(0xffu, value, 8);
      break;
    case Fault::other_operation:
      if (lane < 8) {
        __syncwarp();
      } else {
        value = __shfl_xor_sync(0xffffffffu, value, 0);
      }
      break;
    case Fault::thread_leaves:
      if (threadIdx.x == 40) return;
      __syncthreads();
      break;
    case Fault::other_barrier:
      if (threadIdx.x < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Fault::half_waits_for_grid:
      if (threadIdx.x < 32) {
        cooperative_groups::this_grid().sync();
      } else {
        __syncthreads();
      }
      break;
    case Fault::grid_without_cooperation: cooperative_groups::this_grid().sync(); break;
    case Fault::block_leaves_cluster:
      if (blockIdx.x == 1) return;
      cooperative_groups::this_cluster().sync();
      break;
  }
  x[threadIdx.x] = value;
}

void faulty(Fault fault) {
  std::vector<float> x(64);
  if (fault == Fault::block_leaves_cluster) {
    REQUIRE(launch_clusters(faulty_kernel, 2, 64, 2, x.data(), fault) == cudaSuccess);
    return;
  }
  const bool cooperative = fault != Fault::grid_without_cooperation;
  REQUIRE(launch(faulty_kernel, 1, 64, 0, cooperative, x.data(), fault) == cudaSuccess);
}

// Touches x[i] and an element of shared memory, and leaves what shared memory holds in y.
__global__ void touch_kernel(float* x, long i, long shared_i, float* y) {
  FASTRNN_SHARED_MEMORY(memory);
  float* const shared = reinterpret_cast<float*>(memory);
  x[i] = 1;
  if (threadIdx.x == 0) *y = shared[shared_i];
}

void touch(long i, long shared_i, long shared_count) {
  float* const x = static_cast<float*>(std::malloc(9 * sizeof(float)));
  float y = 0;
  REQUIRE(launch(touch_kernel, 1, 1, shared_count * sizeof(float), false, x, i, shared_i, &y) ==
          cudaSuccess);
  REQUIRE(y != y);  // NaN: nobody wrote it
  std::free(x);
}

// Reads four floats at once from where no four floats may lie.
__global__ void misaligned_kernel(const float* x, float* y) {
  const float4 all = *reinterpret_cast<const float4*>(x + 1);
  *y = all.x + all.w;
}

void misaligned() {
  alignas(16) const float x[8] = {};
  float y = 0;
  REQUIRE(launch(misaligned_kernel, 1, 1, 0, false, x, &y) == cudaSuccess);
}

// Uses stack without end.
__global__ void recurse_kernel(volatile int* depth) {
  volatile char frame[1024];
  frame[0] = static_cast<char>(++*depth);
  recurse_kernel(depth);
  frame[1] = frame[0];
}

__device__ __half narrow(float x, __half) { return __float2half(x); }
__device__ __nv_bfloat16 narrow(float x, __nv_bfloat16) { return __float2bfloat16(x); }
float widen(__half x) { return __half2float(x); }
float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// One warp: out = a b, twice over. fault: 1 misaligned, 2 leading dimension, 3 half a warp, 4 no
// barrier before the load, 5 none after the store.
template <typename T, typename LayoutA, typename LayoutB>
__global__ void multiply_kernel(const T* a, const T* b, float* out, int lda, int ldb, int fault) {
  namespace wmma = nvcuda::wmma;
  FASTRNN_SHARED_MEMORY(memory);
  T* const shared_a = reinterpret_cast<T*>(memory);
  float* const sums = reinterpret_cast<float*>(memory + 16 * lda * sizeof(T));
  for (int i = threadIdx.x; i < 16 * lda; i += warpSize) shared_a[i] = a[i];
  if (fault != 4) __syncwarp();
  if (fault == 3 && threadIdx.x >= 16) return;
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LayoutA> tile_a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LayoutB> tile_b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  wmma::fill_fragment(sum, 0.f);
  wmma::load_matrix_sync(tile_a, shared_a + (fault == 1 ? 8 : 0), lda - (fault == 2 ? 4 : 0));
  wmma::load_matrix_sync(tile_b, b, ldb);
  for (int i = 0; i < 2; ++i) wmma::mma_sync(sum, tile_a, tile_b, sum);
  wmma::store_matrix_sync(sums, sum, 20, wmma::mem_row_major);
  if (fault != 5) __syncwarp();
  for (int i = threadIdx.x; i < 256; i += warpSize) out[i] = sums[i / 16 * 20 + i % 16];
}

template <typename T, typename LayoutA, typename LayoutB>
void multiply(int fault) {
  constexpr int lda = 24, ldb = 16;
  const bool a_rows = std::is_same_v<LayoutA, nvcuda::wmma::row_major>;
  const bool b_rows = std::is_same_v<LayoutB, nvcuda::wmma::row_major>;
  T* const b = static_cast<T*>(std::aligned_alloc(32, 16 * ldb * sizeof(T)));
  std::vector<T> a(16 * lda);
  for (int i = 0; i < 16 * lda; ++i) a[i] = narrow(static_cast<float>(i * 7 % 23 - 11), T{});
  for (int i = 0; i < 16 * ldb; ++i) b[i] = narrow(static_cast<float>(i * 5 % 19) / 8, T{});
  std::vector<float> out(256);
  const size_t bytes = 16 * lda * sizeof(T) + 16 * 20 * sizeof(float);
  REQUIRE(launch(multiply_kernel<T, LayoutA, LayoutB>, 1, 32, bytes, false, a.data(), b, out.data(),
                 lda, ldb, fault) == cudaSuccess);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float expected = 0;  // exact: small integers over 8
      for (int k = 0; k < 16; ++k) {
        expected += 2 * widen(a[a_rows ? row * lda + k : k * lda + row]) *
                    widen(b[b_rows ? k * ldb + column : column * ldb + k]);
      }
      REQUIRE(fault != 0 || out[row * 16 + column] == expected);
    }
  }
  std::free(b);
}

void multiply_all() {
  using nvcuda::wmma::col_major;
  using nvcuda::wmma::row_major;
  multiply<__half, row_major, row_major>(0);
  multiply<__half, row_major, col_major>(0);
  multiply<__half, col_major, row_major>(0);
  multiply<__nv_bfloat16, col_major, col_major>(0);
  multiply<__nv_bfloat16, row_major, col_major>(0);
}

__global__ void empty_kernel(int) {}
__global__ void other_empty_kernel(int) {}

void limits() {
  const auto code = [](dim3 grid, dim3 block, size_t shared, bool cooperative) {
    const cudaError_t error = launch(empty_kernel, grid, block, shared, cooperative, 0);
    REQUIRE(cudaPeekAtLastError() == error);
    REQUIRE(cudaGetLastError() == error);
    REQUIRE(cudaGetLastError() == cudaSuccess);
    return error;
  };
  constexpr size_t kKiB = 1024;
  REQUIRE(code(1, 1024, 48 * kKiB, false) == cudaSuccess);
  REQUIRE(code(0, 1, 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(1, 0, 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(1, 1025, 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(1, dim3(32, 33), 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(1, dim3(1, 1, 65), 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(dim3(1, 65536), 1, 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(dim3(1, 1, 65536), 1, 0, false) == cudaErrorInvalidConfiguration);
  REQUIRE(code(1, 1, 48 * kKiB + 1, false) == cudaErrorInvalidValue);
  const auto allow = [](size_t bytes) {
    return cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  };
  REQUIRE(allow(227 * kKiB + 1) == cudaErrorInvalidValue);
  REQUIRE(allow(227 * kKiB) == cudaSuccess);
  REQUIRE(cudaGetLastError() == cudaErrorInvalidValue);
  REQUIRE(code(1, 1, 227 * kKiB, false) == cudaSuccess);
  REQUIRE(code(1, 1, 227 * kKiB + 1, false) == cudaErrorInvalidValue);
  REQUIRE(launch(other_empty_kernel, 1, 1, 49 * kKiB, false, 0) == cudaErrorInvalidValue);
  cudaGetLastError();
  int blocks = 0;
  const auto count = [&](int threads, size_t shared) {
    REQUIRE(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, empty_kernel, threads, shared) ==
            cudaSuccess);
    return blocks;
  };
  REQUIRE(count(1024, 0) == 2);
  REQUIRE(count(33, 0) == 32);
  REQUIRE(count(256, 0) == 8);
  REQUIRE(count(32, 227 * kKiB) == 1);
  REQUIRE(count(32, 113 * kKiB) == 2);
  REQUIRE(count(32, 114 * kKiB) == 1);
  REQUIRE(code(132, 32, 227 * kKiB, true) == cudaSuccess);
  REQUIRE(code(133, 32, 227 * kKiB, true) == cudaErrorCooperativeLaunchTooLarge);
  const auto cluster_code = [](unsigned grid, unsigned cluster) {
    const cudaError_t error = launch_clusters(empty_kernel, grid, 32, cluster, 0);
    REQUIRE(cudaGetLastError() == error);
    return error;
  };
  REQUIRE(cluster_code(16, 8) == cudaSuccess);
  REQUIRE(cluster_code(12, 8) == cudaErrorInvalidClusterSize);
  REQUIRE(cluster_code(16, 16) == cudaErrorInvalidClusterSize);
  REQUIRE(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess);
  REQUIRE(cluster_code(16, 16) == cudaSuccess);
  REQUIRE(cluster_code(17, 17) == cudaErrorInvalidClusterSize);
  REQUIRE(count_clusters(empty_kernel, 32, 227 * kKiB, 8) == 16);
  REQUIRE(fastrnn_emulator_set("sms", "2") == 0);
  REQUIRE(code(4, 1024, 0, true) == cudaSuccess);
  REQUIRE(code(5, 1024, 0, true) == cudaErrorCooperativeLaunchTooLarge);
  REQUIRE(fastrnn_emulator_set("cooperative", "0") == 0);
  REQUIRE(code(1, 32, 0, true) == cudaErrorNotSupported);
  REQUIRE(fastrnn_emulator_set("shared", "100000") == 0);
  REQUIRE(allow(100001) == cudaErrorInvalidValue);
  REQUIRE(fastrnn_emulator_set("capability", "86") == 0);
  REQUIRE(cluster_code(8, 8) == cudaErrorNotSupported);
  const auto ask = [](cudaDeviceAttr attribute) {
    int value = -1;
    REQUIRE(cudaDeviceGetAttribute(&value, attribute, 0) == cudaSuccess);
    return value;
  };
  REQUIRE(ask(cudaDevAttrMultiProcessorCount) == 2);
  REQUIRE(ask(cudaDevAttrComputeCapabilityMajor) == 8);
  REQUIRE(ask(cudaDevAttrComputeCapabilityMinor) == 6);
  REQUIRE(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin) == 100000);
  REQUIRE(ask(cudaDevAttrCooperativeLaunch) == 0);
  REQUIRE(fastrnn_emulator_set("schedule", "sideways") == -1);
  REQUIRE(fastrnn_emulator_set("sms", "two") == -1);
  REQUIRE(std::strcmp(cudaGetErrorName(cudaErrorCooperativeLaunchTooLarge),
                      "cudaErrorCooperativeLaunchTooLarge") == 0);
}

// All 16-bit floats there and back, the midpoints between neighbours, and beyond the ends.
template <typename T>
void conversions(unsigned infinity) {
  const auto of = [](unsigned bits) { return T{static_cast<uint16_t>(bits)}; };
  for (unsigned bits = 0; bits <= infinity; ++bits) {
    for (const unsigned sign : {0u, 0x8000u}) {
      const float x = widen(of(bits | sign));
      REQUIRE(narrow(x, T{}).bits == (bits | sign));
      if (bits + 2 > infinity) continue;
      const double middle = (static_cast<double>(x) + widen(of((bits + 1) | sign))) / 2;
      const float tie = static_cast<float>(middle);
      const unsigned even = bits % 2 == 0 ? bits : bits + 1;
      if (tie != middle) continue;  // between the two smallest of bfloat16's
      REQUIRE(narrow(tie, T{}).bits == (even | sign));
      REQUIRE(narrow(nextafterf(tie, 0), T{}).bits == (bits | sign));
      REQUIRE(narrow(nextafterf(tie, tie * 2), T{}).bits == ((bits + 1) | sign));
    }
  }
  REQUIRE(narrow(3.4028234e38f, T{}).bits == infinity);
  const float nan = widen(narrow(NAN, T{}));
  REQUIRE(nan != nan);
}

const std::map<std::string, std::function<void()>> kCases = {
    {"reverse", [] { reverse(1); }},
    {"reverse-no-barrier", [] { reverse(0); }},
    {"warp-reverse", [] { warp_reverse(1); }},
    {"warp-reverse-no-barrier", [] { warp_reverse(0); }},
    {"rotate", [] { rotate(7, 64, 1); }},
    {"rotate-no-barrier", [] { rotate(7, 64, 0); }},
    {"rotate-in-cluster", [] { rotate_in_cluster(1); }},
    {"rotate-in-cluster-no-barrier", [] { rotate_in_cluster(0); }},
    {"rotate-most-fibers", [] { rotate(16, 256, 1); }},
    {"largest", [] { rotate(2 * 132, 1024, 1); }},
    {"order", order},
    {"load-own-part-without-barrier", own_part},
    {"stacks", stacks},
    {"shuffle-orders-nothing", [] { weak(Weak::shuffle, 0); }},
    {"warp-orders-no-other-warp", [] { weak(Weak::warp, 0); }},
    {"half-warp-orders-no-other-half", [] { weak(Weak::half_warp, 0); }},
    {"block-orders-no-other-block", [] { weak(Weak::block, 0); }},
    {"enough-order",
     [] {
       for (const Weak kind : {Weak::shuffle, Weak::warp, Weak::half_warp, Weak::block}) {
         weak(kind, 1);
       }
     }},
    {"same-place", [] { same_place(0); }},
    {"same-place-race", [] { same_place(1); }},
    {"shuffle", shuffle},
    {"lane-not-named", [] { faulty(Fault::lane_not_named); }},
    {"named-lane-leaves", [] { faulty(Fault::named_lane_leaves); }},
    {"named-lane-elsewhere", [] { faulty(Fault::named_lane_elsewhere); }},
    {"unnamed-source", [] { faulty(Fault::unnamed_source); }},
    {"other-operation", [] { faulty(Fault::other_operation); }},
    {"thread-leaves", [] { faulty(Fault::thread_leaves); }},
    {"other-barrier", [] { faulty(Fault::other_barrier); }},
    {"half-waits-for-grid", [] { faulty(Fault::half_waits_for_grid); }},
    {"grid-without-cooperation", [] { faulty(Fault::grid_without_cooperation); }},
    {"block-leaves-cluster", [] { faulty(Fault::block_leaves_cluster); }},
    {"no-fault", [] { faulty(Fault::none); }},
    {"touch", [] { touch(8, 8, 9); }},
    {"touch-global", [] { touch(9, 8, 9); }},
    {"touch-shared", [] { touch(8, 9, 9); }},
    {"touch-no-shared", [] { touch(8, 0, 0); }},
    {"touch-before-shared", [] { touch(8, -1, 9); }},
    {"misaligned", misaligned},
    {"recurse",
     [] {
       int depth = 0;
       launch(recurse_kernel, 1, 1, 0, false, &depth);
     }},
    {"multiply", multiply_all},
    {"multiply-misaligned",
     [] { multiply<__half, nvcuda::wmma::row_major, nvcuda::wmma::row_major>(1); }},
    {"multiply-leading-dimension",
     [] { multiply<__half, nvcuda::wmma::row_major, nvcuda::wmma::row_major>(2); }},
    {"multiply-half-a-warp",
     [] { multiply<__half, nvcuda::wmma::row_major, nvcuda::wmma::row_major>(3); }},
    {"multiply-no-barrier-before",
     [] { multiply<__half, nvcuda::wmma::row_major, nvcuda::wmma::row_major>(4); }},
    {"multiply-no-barrier-after",
     [] { multiply<__half, nvcuda::wmma::row_major, nvcuda::wmma::row_major>(5); }},
    {"limits", limits},
    {"conversions",
     [] {
       conversions<__half>(0x7c00);
       conversions<__nv_bfloat16>(0x7f80);
     }},
};

}  // namespace

int main(int, char** argv) {
  kCases.at(argv[1])();
  std::puts("ok");
}
