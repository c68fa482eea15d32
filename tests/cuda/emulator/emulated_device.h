// The device side of cuda_runtime.h: qualifiers, indices, vectors, barriers, shuffles, arithmetic.
#pragma once

#include <math.h>  // the C++ one: overloads for float in the global namespace

#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

using uint3 = fastrnn_emulator::Index;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = fastrnn_emulator::kWarp;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Barriers.
inline void __syncthreads(fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  fastrnn_emulator::sync_threads(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  fastrnn_emulator::sync_warp(mask, where);
}
// Fences order memory for those who then meet at a barrier, which orders it by itself here.
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles.
namespace fastrnn_emulator {
template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int operand, int width, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, operand, width, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace fastrnn_emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  using namespace fastrnn_emulator;
  return shuffle_value(Shuffle::index, mask, value, lane, width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  using namespace fastrnn_emulator;
  return shuffle_value(Shuffle::up, mask, value, static_cast<int>(delta), width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  using namespace fastrnn_emulator;
  return shuffle_value(Shuffle::down, mask, value, static_cast<int>(delta), width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  using namespace fastrnn_emulator;
  return shuffle_value(Shuffle::exclusive_or, mask, value, lane_mask, width, where);
}

// Loads and stores with a say in caching.
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

// min and max of CUDA's: those of floats pass over a NaN.
#define FASTRNN_EMULATOR_MINMAX(T)                    \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
FASTRNN_EMULATOR_MINMAX(int)
FASTRNN_EMULATOR_MINMAX(unsigned)
FASTRNN_EMULATOR_MINMAX(long)
FASTRNN_EMULATOR_MINMAX(unsigned long)
FASTRNN_EMULATOR_MINMAX(long long)
FASTRNN_EMULATOR_MINMAX(unsigned long long)
#undef FASTRNN_EMULATOR_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
