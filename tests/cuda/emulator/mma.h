// The emulator's mma.h: tensor-core tiles of 16 x 16 x 16, float16 or bfloat16 in, float32 sums.
#pragma once

#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_read_range(void* address, unsigned long size);
#endif

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

// x holds this lane's part, in float32 whatever the type.
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the emulator knows tiles of 16 x 16 x 16 only");
  static constexpr bool kSum = std::is_same_v<Use, accumulator>;
  static_assert(kSum ? std::is_same_v<T, float>
                     : std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>,
                "the emulator multiplies 16-bit floats and sums in float32");
  static_assert(kSum == std::is_void_v<Layout>, "a layout for matrices, none for sums");
  static constexpr int num_elements = fastrnn_emulator::kTileElements;
  float x[num_elements];
};

template <typename T>
using Sum = fragment<accumulator, 16, 16, 16, T>;

namespace emulator {

using fastrnn_emulator::Where;

inline float widen(float x) { return x; }
inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// What hardware demands of a tile in memory.
template <typename T>
void check(const char* operation, const T* pointer, unsigned stride, Where where) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0) {
    fastrnn_emulator::fail(where, "%s: pointer %p is not aligned to 32 bytes", operation,
                           static_cast<const void*>(pointer));
  }
  constexpr unsigned kMultiple = 16 / sizeof(T);
  if (stride % kMultiple != 0) {
    fastrnn_emulator::fail(where, "%s: leading dimension %u is no multiple of %u", operation,
                           stride, kMultiple);
  }
  fastrnn_emulator::converge(operation, pointer, stride, where);
}

// Where in memory this lane's i-th element lies.
inline size_t offset(bool rows, unsigned stride, int lane, int i) {
  const size_t row = fastrnn_emulator::element_row(lane, i);
  const size_t column = fastrnn_emulator::element_column(lane, i);
  return rows ? row * stride + column : column * stride + row;
}

template <typename T>
void load(float* x, const T* pointer, unsigned stride, bool rows, Where where) {
  check("load_matrix_sync", pointer, stride, where);
#if defined(__SANITIZE_THREAD__)
  // Which lane reads what is not for a kernel to know: a race with any of it is a race.
  for (int i = 0; i < fastrnn_emulator::kTile; ++i) {
    __tsan_read_range(const_cast<T*>(pointer + static_cast<size_t>(i) * stride),
                      fastrnn_emulator::kTile * sizeof(T));
  }
#endif
  const int lane = fastrnn_emulator::lane();
  for (int i = 0; i < fastrnn_emulator::kTileElements; ++i) {
    x[i] = widen(pointer[offset(rows, stride, lane, i)]);
  }
}

}  // namespace emulator

template <typename Use, typename T, typename Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& f, const std::common_type_t<T>& value) {
  for (float& x : f.x) x = emulator::widen(value);
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* pointer, unsigned stride,
                      fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  emulator::load(f.x, pointer, stride, std::is_same_v<Layout, row_major>, where);
}

template <typename T>
void load_matrix_sync(Sum<T>& f, const T* pointer, unsigned stride, layout_t layout,
                      fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  emulator::load(f.x, pointer, stride, layout == mem_row_major, where);
}

template <typename T>
void store_matrix_sync(T* pointer, const Sum<T>& f, unsigned stride, layout_t layout,
                       fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  emulator::check("store_matrix_sync", pointer, stride, where);
  const int lane = fastrnn_emulator::lane();
  for (int i = 0; i < f.num_elements; ++i) {
    pointer[emulator::offset(layout == mem_row_major, stride, lane, i)] = f.x[i];
  }
}

template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(Sum<float>& d, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b, const Sum<float>& c,
              fastrnn_emulator::Where where = fastrnn_emulator::Where::here()) {
  fastrnn_emulator::multiply_tiles(d.x, a.x, b.x, c.x, where);
}

}  // namespace nvcuda::wmma
