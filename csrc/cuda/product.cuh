// The product of a persistent kernel: a tile of batch rows times the weights that a block keeps in
// shared memory, summed over K by all warps.
//
// A product offers, beside its sizes:
//   fill(load)               copies the weights in; load(k, column) gives one, 0 past the ends
//   multiply(row, load_more) leaves in shared memory each warp's share of out[r][column]; row(r) is
//                            where row r of the left operand lies, or null: zeros; each_chunk says
//                            what load_more is
//   sum(r, column)           adds them up, always in the same order
// fill and multiply are called by the whole block, with a __syncthreads between them and sum.
#pragma once

#include <mma.h>

#include "device.cuh"

namespace fastrnn::cuda {

// What other blocks write, from L2. CUDA's own function for the 16-bit types leaves the compiler
// free to move the read across a barrier.
__device__ __forceinline__ float load_from_l2(const float* p) { return __ldcg(p); }
__device__ __forceinline__ __half load_from_l2(const __half* p) {
  return __ushort_as_half(__ldcg(reinterpret_cast<const unsigned short*>(p)));
}
__device__ __forceinline__ __nv_bfloat16 load_from_l2(const __nv_bfloat16* p) {
  return __ushort_as_bfloat16(__ldcg(reinterpret_cast<const unsigned short*>(p)));
}

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kBlockThreads = kWarps * kWarp;

// K in chunks of a warp's width; chunk i belongs to warp i % kWarps.
constexpr int kChunk = kWarp;

// Calls use(left, chunk) for each chunk of this warp in turn, `left` being what fetch(left, chunk)
// loaded; a `left` that was read is given the chunk kAhead * kWarps further on by `use`. So many
// are on their way from L2, which takes as long as some products of a chunk. load_more() loads what
// is wanted after the product. It is called when the first chunks have been asked for: a warp that
// waits for what it loads, or for a register to load into, asks for nothing else meanwhile.
template <int kAhead, typename Left, typename Fetch, typename Load, typename Use>
__device__ __forceinline__ void each_chunk(int64_t chunks, Fetch&& fetch, Load&& load_more,
                                           Use&& use) {
  Left ahead[kAhead];
  const int64_t warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(ahead[i], warp + i * kWarps);
  load_more();
  for (int64_t first = warp; first < chunks; first += kAhead * kWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t chunk = first + i * kWarps;
      if (chunk < chunks) use(ahead[i], chunk);
    }
  }
}

// float32, on CUDA cores. The lanes of a warp run over columns; where there are fewer columns than
// lanes, groups of lanes take parts of a chunk. A weight is read from shared memory once for all R
// rows (32 lanes, 32 banks), an element of the left operand once for all columns (a broadcast).
template <int kColumns, int R>
struct VectorProduct {
  using E = float;
  static constexpr int kRows = R;
  static constexpr int kAhead = R == 1 ? 4 : 2;
  static constexpr int kBlocks = R == 8 ? 1 : 2;  // on a multiprocessor: registers for so many
  static constexpr int kLanes = kColumns < kWarp ? kColumns : kWarp;  // that run over columns
  static constexpr int kPerLane = kColumns / kLanes;
  static constexpr int kGroups = kWarp / kLanes;
  static constexpr int kDepth = kChunk / kGroups;  // of a group within a chunk
  static_assert(kColumns % kLanes == 0 && kDepth % 4 == 0, "whole lanes and whole float4s");

  // Weights (chunk, kDepth, kPerLane, lane), then each warp's rows of a chunk, then its sums.
  static constexpr int kStage = R * kChunk;
  static constexpr int kSums = R * kColumns;
  static __host__ __device__ int64_t weight_elements(int64_t k) {
    return round_up(k, kChunk) * kColumns;
  }
  static int64_t shared_bytes(int64_t k) {
    return static_cast<int64_t>(sizeof(float)) * (weight_elements(k) + kWarps * (kStage + kSums));
  }

  float* const weights;
  float* const stages;
  float* const sums;
  const int64_t k;

  __device__ __forceinline__ VectorProduct(unsigned char* shared, int64_t depth)
      : weights(reinterpret_cast<float*>(shared)),
        stages(weights + weight_elements(depth)),
        sums(stages + kWarps * kStage),
        k(depth) {}

  template <typename Load>
  __device__ __forceinline__ void fill(Load&& load) const {
    // Several at a time on their way from memory, or each would be waited for.
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < weight_elements(k); i += kBlockThreads) {
      const int lane = static_cast<int>(i % kWarp);
      const int64_t slot = i / kWarp;  // (chunk, kDepth, kPerLane)
      const int c = static_cast<int>(slot % kPerLane);
      const int64_t step = slot / kPerLane % kDepth, chunk = slot / kPerLane / kDepth;
      weights[i] = load(chunk * kChunk + lane / kLanes * kDepth + step, c * kLanes + lane % kLanes);
    }
  }

  template <typename Row, typename Load>
  __device__ __forceinline__ void multiply(Row&& row, Load&& load_more) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int group = lane / kLanes;
    float* const stage = stages + warp * kStage;
    struct Left {
      float row[R];
    };
    const float* rows[R];
    float total[R][kPerLane] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) rows[r] = row(r);
    const auto fetch = [&](Left& left, int64_t chunk) {
      const int64_t at = chunk * kChunk + lane;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        left.row[r] =
            rows[r] && at < k + is(Mutant::depth_past_end) ? load_from_l2(rows[r] + at) : 0.f;
      }
    };
    const auto use = [&](Left& left, int64_t chunk) {
#pragma unroll
      for (int r = 0; r < R; ++r) stage[r * kChunk + lane] = left.row[r];
      if (!is(Mutant::no_warp_barrier_before_product)) __syncwarp();
      fetch(left, chunk + kAhead * kWarps);
      const float* w = weights + chunk * kChunk * kColumns + lane;
#pragma unroll
      for (int i = 0; i < kDepth; i += 4) {
        float4 a[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          a[r] = *reinterpret_cast<const float4*>(stage + r * kChunk + group * kDepth + i);
        }
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          const float w0 = w[((i + 0) * kPerLane + c) * kWarp];
          const float w1 = w[((i + 1) * kPerLane + c) * kWarp];
          const float w2 = w[((i + 2) * kPerLane + c) * kWarp];
          const float w3 = w[((i + 3) * kPerLane + c) * kWarp];
#pragma unroll
          for (int r = 0; r < R; ++r) {
            total[r][c] = ::fma(a[r].x, w0, total[r][c]);
            total[r][c] = ::fma(a[r].y, w1, total[r][c]);
            total[r][c] = ::fma(a[r].z, w2, total[r][c]);
            total[r][c] = ::fma(a[r].w, w3, total[r][c]);
          }
        }
      }
      if (!is(Mutant::no_warp_barrier_after_product)) __syncwarp();
    };
    each_chunk<kAhead, Left>(divide_up(k, kChunk), fetch, load_more, use);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        float value = total[r][c];
#pragma unroll
        for (int distance = kLanes; distance < kWarp; distance *= 2) {
          value += __shfl_xor_sync(0xffffffffu, value, distance);
        }
        if (group == 0) sums[warp * kSums + r * kColumns + c * kLanes + lane] = value;
      }
    }
  }

  __device__ __forceinline__ float sum(int r, int column) const {
    float value = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += sums[w * kSums + r * kColumns + column];
    return value;
  }
};

// float16 and bfloat16, on tensor cores: products of 16 x 16 x 16, sums in float32.
template <typename Half, int kColumns>
struct TensorProduct {
  using E = Half;
  static constexpr int kRows = 16;
  static constexpr int kAhead = 2;
  static constexpr int kTile = 16;
  static constexpr int kBlocks = kColumns == kTile ? 2 : 1;
  static constexpr int kPadding = 8;  // so that 8 rows lie in 8 different sets of banks
  static_assert(kColumns % kTile == 0, "whole tiles");

  // Weights (column, K), then each warp's rows of a chunk, then its sums.
  static constexpr int kStageStride = kChunk + kPadding;
  static constexpr int kStage = kRows * kStageStride;
  static constexpr int kSums = kRows * kColumns;
  static __host__ __device__ int64_t weight_stride(int64_t k) {
    return round_up(k, kChunk) + kPadding;
  }
  // In Halves; so many that what follows starts on 128 bytes.
  static __host__ __device__ int64_t weight_elements(int64_t k) {
    return round_up(kColumns * weight_stride(k), 64);
  }
  static int64_t shared_bytes(int64_t k) {
    return static_cast<int64_t>(sizeof(Half)) * (weight_elements(k) + kWarps * kStage) +
           static_cast<int64_t>(sizeof(float)) * kWarps * kSums;
  }

  Half* const weights;
  Half* const stages;
  float* const sums;
  const int64_t k;

  __device__ __forceinline__ TensorProduct(unsigned char* shared, int64_t depth)
      : weights(reinterpret_cast<Half*>(shared)),
        stages(weights + weight_elements(depth)),
        sums(reinterpret_cast<float*>(stages + kWarps * kStage)),
        k(depth) {}

  template <typename Load>
  __device__ __forceinline__ void fill(Load&& load) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t stride = weight_stride(k);
    for (int column = warp; column < kColumns; column += kWarps) {
#pragma unroll 8
      for (int64_t i = lane; i < stride; i += kWarp) weights[column * stride + i] = load(i, column);
    }
  }

  template <typename Row, typename Load>
  __device__ __forceinline__ void multiply(Row&& row, Load&& load_more) const {
    namespace wmma = nvcuda::wmma;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Half* const stage = stages + warp * kStage;
    struct Left {
      Half row[kRows];
    };
    const Half* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = row(r);
    const auto fetch = [&](Left& left, int64_t chunk) {
      const int64_t at = chunk * kChunk + lane;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        left.row[r] = rows[r] && at < k + is(Mutant::depth_past_end) ? load_from_l2(rows[r] + at)
                                                                     : from_compute<Half>(0.f);
      }
    };
    constexpr int kTiles = kColumns / kTile;
    wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> total[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) wmma::fill_fragment(total[tile], 0.f);
    const int64_t stride = weight_stride(k);
    const auto use = [&](Left& left, int64_t chunk) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) stage[r * kStageStride + lane] = left.row[r];
      if (!is(Mutant::no_warp_barrier_before_product)) __syncwarp();
      fetch(left, chunk + kAhead * kWarps);
#pragma unroll
      for (int i = 0; i < kChunk; i += kTile) {
        wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, Half, wmma::row_major> a;
        wmma::load_matrix_sync(a, stage + i, kStageStride);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, Half, wmma::col_major> b;
          wmma::load_matrix_sync(b, weights + tile * kTile * stride + chunk * kChunk + i,
                                 static_cast<unsigned>(stride));
          wmma::mma_sync(total[tile], a, b, total[tile]);
        }
      }
      if (!is(Mutant::no_warp_barrier_after_product)) __syncwarp();
    };
    each_chunk<kAhead, Left>(divide_up(k, kChunk), fetch, load_more, use);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      wmma::store_matrix_sync(sums + warp * kSums + tile * kTile, total[tile], kColumns,
                              wmma::mem_row_major);
    }
  }

  __device__ __forceinline__ float sum(int r, int column) const {
    float value = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += sums[w * kSums + r * kColumns + column];
    return value;
  }
};

template <typename E, int kColumns, int R>
struct ProductOf {
  using type = TensorProduct<E, kColumns>;
};
template <int kColumns, int R>
struct ProductOf<float, kColumns, R> {
  using type = VectorProduct<kColumns, R>;
};
template <typename E, int kColumns, int R>
using Product = typename ProductOf<E, kColumns, R>::type;

}  // namespace fastrnn::cuda
