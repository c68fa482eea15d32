// The matrix unit of x86 (AMX): eight tile registers of 16 rows of 64 bytes, and the instruction
// that multiplies two of them. Compilers that know bfloat16's need not know float16's, and their
// intrinsics for loads do not say that they read memory: hence the assembly.
#pragma once

#include "element.h"
#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

// Tiles: the first four hold sums, then come those of a product's left factor and of its right one.
constexpr int kTilesOfSums = 4;

// While one exists, tiles may be used. Without AMX it is nothing.
class TileUnit {
 public:
  // a_tiles: those of the left factor, which like the sums have so many rows; the others have all.
  FASTRNN_INLINE TileUnit([[maybe_unused]] int a_tiles, [[maybe_unused]] int rows) {
#if defined(__AMX_TILE__)
    set_rows(a_tiles, rows);
#endif
  }
#if defined(__AMX_TILE__)
  ~TileUnit() { asm volatile("tilerelease"); }

  // Both lose what the tiles hold.
  static FASTRNN_INLINE void set_rows(int a_tiles, int rows) {
    Config config;
    for (int tile = 0; tile < kTilesOfSums + a_tiles; ++tile) config.rows[tile] = rows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  // So many floats a row in the sums and in the right factor, which is then in the tiles of the
  // left one.
  static FASTRNN_INLINE void set_columns(int a_tiles, int columns) {
    Config config;
    for (int tile = 0; tile < kTilesOfSums + a_tiles; ++tile) {
      config.row_bytes[tile] = columns * sizeof(float);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
#else
  static FASTRNN_INLINE void set_rows(int, int) {}
  static FASTRNN_INLINE void set_columns(int, int) {}
#endif
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};

#if defined(__AMX_TILE__)

template <int tile>
FASTRNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// stride: bytes between rows.
template <int tile>
FASTRNN_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(from), "r"(stride) : "memory");
}

template <int tile>
FASTRNN_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(to), "r"(stride) : "memory");
}

// sum[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1], over k in order.
template <int sum, int a, int b>
FASTRNN_INLINE void tile_multiply(BFloat16*) {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}
template <int sum, int a, int b>
FASTRNN_INLINE void tile_multiply(Half*) {
  // tdpfp16ps, by its bytes: assemblers before binutils 2.40 do not know it.
  constexpr int inverted_b = (15 - b) << 3, registers = 0xc0 | sum << 3 | a;
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"(inverted_b | 3), "i"(registers));
}

#endif

}  // namespace fastrnn::FASTRNN_ISA
