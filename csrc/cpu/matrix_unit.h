// Products in the matrix unit, for product.cpp: with packed weights as the right factor, and with
// weights as they lie as the left one.
#pragma once

#if defined(__AMX_BF16__)

#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// Calls f(Constant<value>) for 0 <= value < Count.
template <int Count, typename F>
FASTRNN_INLINE void with_each(F&& f) {
  if constexpr (Count > 0) {
    with_each<Count - 1>(f);
    f(Constant<Count - 1>{});
  }
}

// As multiply_tile, V vectors of up to 16 rows. Where it is set up for more rows than
// exist, these have results too, in the room for a tile's sums, that no one reads.
template <typename Part, int parts, int V>
__attribute__((noinline)) void multiply_in_matrix_unit(const TileProduct<float>& product, int rows,
                                                       Vec<float>* sums) {
  constexpr int kA = kTilesOfSums, kB = kA + parts, kTilesOfB = 8 - kB;
  constexpr int64_t K = kOperandUnit, stride_of_sums = V * sizeof(Vec<float>);
  const int64_t size = product.k_count / parts;
  with_each<V>([&](auto v) {
    constexpr int tile = decltype(v)::value;
    if (product.accumulate) {
      tile_load<tile>(sums + tile, stride_of_sums);
    } else {
      tile_zero<tile>();
    }
  });
  // Whether the rows of a lie as a tile's do.
  const float* const* a = product.a;
  const int64_t a_stride = rows > 1 ? a[1] - a[0] : 0;
  bool regular = rows == product.unit_rows;
  for (int r = 2; regular && r < rows; ++r) regular = a[r] - a[r - 1] == a_stride;
  alignas(64) float copy[kTileRows * K];
  const int64_t w_part = size * product.w_stride;
  const float* w = product.w;
  for (int64_t k = 0; k < size; k += K, w += K * product.w_stride) {
    with_each<parts>([&](auto p) {
      constexpr int part = decltype(p)::value, tile = kA + part;
      const int64_t offset = part * size + k;
      if (regular) {
        tile_load<tile>(a[0] + offset, a_stride * sizeof(float));
      } else {
        for (int r = 0; r < rows; ++r) store(copy + r * K, load(a[r] + offset));
        tile_load<tile>(copy, K * sizeof(float));
      }
    });
    if constexpr (parts == 1) {
      with_each<V>([&](auto v) {
        constexpr int tile = decltype(v)::value, b = kB + tile % kTilesOfB;
        tile_load<b>(w + tile * K, product.w_stride * sizeof(float));
        tile_multiply<tile, kA, b>((Part*)nullptr);
      });
    } else {
      // Vectors by twos, so that no product waits for the one before it.
      with_each<parts*((V + 1) / 2)>([&](auto i) {
        constexpr int part = decltype(i)::value / ((V + 1) / 2);
        constexpr int first = decltype(i)::value % ((V + 1) / 2) * 2, last = first + 1;
        const float* const from = w + part * w_part;
        tile_load<kB>(from + first * K, product.w_stride * sizeof(float));
        if constexpr (last < V) {
          tile_load<kB + 1>(from + last * K, product.w_stride * sizeof(float));
        }
        with_each<parts - part>([&](auto a_part) {
          constexpr int a_tile = kA + decltype(a_part)::value;
          tile_multiply<first, a_tile, kB>((Part*)nullptr);
          if constexpr (last < V) tile_multiply<last, a_tile, kB + 1>((Part*)nullptr);
        });
      });
    }
  }
  with_each<V>([&](auto v) {
    constexpr int tile = decltype(v)::value;
    tile_store<tile>(sums + tile, stride_of_sums);
  });
}

// The product of V vectors of a panel's rows of w, where they lie, with the columns of a.
template <typename E, int V>
struct LeftProduct {
  static constexpr int kA = kTilesOfSums, kB = kA + kParts<E>, kTilesOfB = 8 - kB;
  static constexpr int L = kLanes<float>, kElements = kOperandUnit * kDepth<E>;  // of a tile's rows
  using Square = float[L * L];
  using Copy = Square[kParts<E>];  // of a vector's rows, as operands

  const float* a;
  const E* w;
  int64_t k_count;
  const PanelRows& panel;
  int rows;
  const E* first_rows[V];  // of the vectors' rows, if those lie one behind the other; else null

  LeftProduct(const float* a, const E* w, int64_t k_count, const PanelRows& panel, int rows)
      : a(a), w(w), k_count(k_count), panel(panel), rows(rows) {
    for (int64_t v = 0; v < V; ++v) {
      const VectorRows<float> of_vector(panel, v);
      first_rows[v] = of_vector.neighbours ? w + of_vector.first * k_count : nullptr;
    }
  }

  void add_to(Vec<float>* sums, bool accumulate) const {
    with_each<V>([&](auto v) { begin<decltype(v)::value>(sums, accumulate); });
    alignas(64) Copy copies[2][V];
    for (int v = 0; v < V; ++v) copy(0, v, copies[0][v]);
    const int64_t size = part_operands<E>(k_count);
    for (int64_t k = 0, i = 0; k < size; k += kOperandUnit, i ^= 1) {
      with_each<kParts<E>>([&](auto part) {
        constexpr int p = decltype(part)::value;
        tile_load<kA + p>(a + (p * size + k) * rows, rows * sizeof(float));
      });
      with_each<V>([&](auto vector) {
        constexpr int v = decltype(vector)::value;
        // Copied long before a tile is loaded from it, which would wait for the stores.
        if (k + kOperandUnit < size) copy((k + kOperandUnit) * kDepth<E>, v, copies[i ^ 1][v]);
        multiply_by<v>(k * kDepth<E>, copies[i][v]);
      });
    }
    with_each<V>([&](auto v) { finish<decltype(v)::value>(sums); });
  }

 private:
  // Whether a tile can be loaded from the rows of a vector, element k and on, as they lie.
  bool lies(int64_t k, int v) const {
    return kIsHalfOperand<E> && first_rows[v] && k_count - k >= kElements;
  }
  FASTRNN_INLINE void copy(int64_t k, int v, Copy& out) const {
    if (lies(k, v)) return;
    if (first_rows[v] && k_count - k >= kElements) {
      for (int j = 0; j < L; ++j) copy_row(first_rows[v] + j * k_count + k, kElements, j, out);
    } else {
      for (int j = 0; j < L; ++j) {
        const bool exists = v * L + j < panel.columns;
        const E* const row = exists ? w + panel.row(v * L + j) * k_count + k : nullptr;
        copy_row(row, k_count - k, j, out);
      }
    }
  }
  static FASTRNN_INLINE void copy_row(const E* row, int64_t count, int j, Copy& out) {
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value;
      store(out[p] + j * L, row ? row_operands<E, p>(row, count) : Vec<float>{});
    });
  }
  template <int v>
  FASTRNN_INLINE void multiply_by(int64_t k, const Copy& copied) const {
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value, b = kB + (p * V + v) % kTilesOfB;
      if (lies(k, v)) {
        tile_load<b>(first_rows[v] + k, k_count * sizeof(E));
      } else {
        tile_load<b>(copied[p], L * sizeof(float));
      }
      with_each<kParts<E> - p>([&](auto a_part) {
        tile_multiply<v, b, kA + decltype(a_part)::value>((Part<E>*)nullptr);
      });
    });
  }

  // A tile has a row of sums for each lane of the vector.
  template <int v>
  FASTRNN_INLINE void begin(const Vec<float>* sums, bool accumulate) const {
    if (!accumulate) return tile_zero<v>();
    if (rows == 1) return tile_load<v>(sums + v, sizeof(float));
    alignas(64) Square square;
    for (int r = 0; r < rows; ++r) store(square + r * L, sums[r * V + v]);
    transpose(square);
    tile_load<v>(square, L * sizeof(float));
  }
  template <int v>
  FASTRNN_INLINE void finish(Vec<float>* sums) const {
    if (rows == 1) return tile_store<v>(sums + v, sizeof(float));
    alignas(64) Square square;
    tile_store<v>(square, L * sizeof(float));
    transpose(square);
    for (int r = 0; r < rows; ++r) sums[r * V + v] = load(square + r * L);
  }
  static FASTRNN_INLINE void transpose(Square& square) {
    Vec<float> columns[L];
    load_transposed<float>(columns, square, L);
    for (int j = 0; j < L; ++j) store(square + j * L, columns[j]);
  }
};

}  // namespace
}  // namespace fastrnn::FASTRNN_ISA

#endif
