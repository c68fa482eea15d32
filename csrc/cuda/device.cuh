// What all kernels share: element types, the cell's arithmetic on a GPU, walking through steps, and
// launching.
//
// Two habits let g++ compile these files against the emulator's headers (tests/cuda/emulator):
// shared memory is declared by FASTRNN_SHARED_MEMORY, and kernels start through `launch` alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

#if defined(__CUDACC__)
#define FASTRNN_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define FASTRNN_SHARED_MEMORY(name) unsigned char* const name = fastrnn_emulator::shared_memory()
#endif

namespace fastrnn::cuda {

// Faults on purpose. Where FASTRNN_MUTANTS is defined, as in the emulated tests alone, `mutant`
// plants one, and tests/cuda shows that it is caught.
enum class Mutant : int {
  none,
  no_barrier_after_fill,
  no_barrier_before_sum,
  no_barrier_after_tile,
  no_team_barrier,
  no_warp_barrier_before_product,
  no_warp_barrier_after_product,
  row_past_end,
  unit_past_end,
  depth_past_end,
  weight_past_end,
  size_past_end,
  previous_row_past_end
};
#if defined(FASTRNN_MUTANTS)
extern Mutant mutant;
inline bool is(Mutant fault) { return fault == mutant; }
#else
__host__ __device__ constexpr bool is(Mutant) { return false; }
#endif

template <typename E>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename E>
using Compute = typename ComputeOf<E>::type;

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename E>
__device__ __forceinline__ E from_compute(Compute<E> x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float x) {
  return __float2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// The M of cell_math.h.
template <typename C>
struct Math {
  using V = C;
  static __device__ __forceinline__ C fma(C a, C b, C c) { return ::fma(a, b, c); }
  // Near 1 the rounding of 1 + exp counts only exp times: memories that hardly fade hang on it.
  static __device__ __forceinline__ C sigmoid(C x) {
    const C e = ::exp(-::fabs(x));
    const C small = e / (C(1) + e);
    return x < C(0) ? small : C(1) - small;
  }
  static __device__ __forceinline__ C tanh(C x) { return ::tanh(x); }
  static __device__ __forceinline__ C positive_part(C x) { return x <= C(0) ? C(0) : x; }
  // x where h > 0 or h is NaN, as torch's threshold_backward.
  static __device__ __forceinline__ C zero_unless_positive(C x, C h) {
    return h <= C(0) ? C(0) : x;
  }
};

// One direction's way through the steps; `backward` from the last that forward took to the first.
struct Walk {
  Schedule schedule;
  bool descending;

  __device__ __forceinline__ Walk(const Schedule& s, int direction, bool backward)
      : schedule(s), descending((direction == 1) != backward) {}
  __device__ __forceinline__ int64_t time(int64_t s) const { return schedule.step(s, descending); }
  // Rows of the s-th step, none before the first or after the last.
  __device__ __forceinline__ int64_t rows(int64_t s) const {
    return s < 0 || s >= schedule.steps ? 0 : schedule.rows_at(time(s));
  }
  // The first of them among all rows.
  __device__ __forceinline__ int64_t first_row(int64_t s) const { return schedule.offset(time(s)); }
};

// Calls f(E{}) for an element type of CUDA's.
template <typename F>
int with_element(Element element, F&& f) {
  switch (element) {
    case Element::f32: return f(float{});
    case Element::f64: return f(double{});
    case Element::f16: return f(__half{});
    case Element::bf16: return f(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

template <Cell cell>
struct CellTag {
  static constexpr Cell value = cell;
};

// Calls f(CellTag<cell>{}).
template <typename F>
int with_cell(Cell cell, F&& f) {
  switch (cell) {
    case Cell::lstm: return f(CellTag<Cell::lstm>{});
    case Cell::rnn_tanh: return f(CellTag<Cell::rnn_tanh>{});
    case Cell::rnn_relu: return f(CellTag<Cell::rnn_relu>{});
  }
  return cudaErrorInvalidValue;
}

// Which blocks of a launch run at once and may meet at a barrier: those along x, or all.
enum class Together { none, along_x, all };

// How a kernel is launched, or what is asked about such a launch.
struct Launch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launch(dim3 grid, int threads, int64_t shared_bytes, Together together, Stream stream) {
    if (together == Together::along_x) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {grid.x, 1, 1};
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = together == Together::none ? 0 : 1;
  }
  Launch(const Launch&) = delete;
};

// Launches kernel(args...).
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), const Launch& how, const Args&... args) {
  return cudaLaunchKernelEx(&how.config, kernel, Params(args)...);
}

// The same for blocks that run on their own, without shared memory.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), dim3 grid, int threads, Stream stream, const Args&... args) {
  return launch(kernel, Launch(grid, threads, 0, Together::none, stream), args...);
}

}  // namespace fastrnn::cuda
