// The two products of the backward pass that run over all steps at once: the gradient of the input,
// and the gradients of the weights.
#include "tile.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// Rows summed in one accumulator before the sum is added to the total: bounds the rounding error of
// a gradient over many steps, and is fixed, so that the result does not depend on the thread count.
constexpr int64_t kBlockRows = 256;

// Rows of the left operand packed together: with float, 192 x 256 values are 192 KB of the L2
// cache.
constexpr int64_t kBlockColumns = 192;

// Writes a tile's row to columns `column` and on of out, or adds it to what is there.
template <typename T, int C>
FASTRNN_INLINE void add_row(T* out, int64_t column, int64_t columns, bool accumulate,
                            Vec<T> (&sums)[C]) {
  if (accumulate) {
    for (int c = 0; c < C; ++c) {
      const int64_t first = column + c * kLanes<T>;
      sums[c] += load(out + first, columns - first);
    }
  }
  store_row(out, column, columns, sums);
}

template <typename T>
struct OuterProduct {
  static constexpr int L = kLanes<T>;
  static constexpr int R = kTileRows;

  const OuterProductArgs<T>& args;
  T* const packed_b = args.scratch;  // (panels, rows, vectors, lanes)
  T* const packed_a = packed_b + kBlockRows * ((args.columns + L - 1) / L * L);

  void run(int64_t j_begin, int64_t j_end) const {
    for (int64_t row = 0; row < args.rows; row += kBlockRows) {
      const int64_t count = args.rows - row < kBlockRows ? args.rows - row : kBlockRows;
      const bool accumulate = args.accumulate || row > 0;
      if (args.column_sums) sum_columns(row, count, j_begin, j_end, accumulate);
      if (!args.out) continue;
      pack_b(row, count);
      for (int64_t j = j_begin; j < j_end; j += kBlockColumns) {
        run_block(row, count, j, j + kBlockColumns < j_end ? j + kBlockColumns : j_end, accumulate);
      }
    }
  }

  void pack_b(int64_t row, int64_t count) const {
    for_column_panels<T>(args.columns, [&](int64_t column, auto vectors) {
      T* out = packed_b + column * count;
      for (int64_t i = 0; i < count; ++i) {
        const T* in = args.b[row + i];
        for (int c = 0; c < decltype(vectors)::value; ++c, out += L) {
          const int64_t at = column + c * L;
          store(out, load(in + at, args.columns - at));
        }
      }
    });
  }

  // a's columns [j, j_end) as blocks of R columns, (rows, R) each; columns past the end repeat the
  // last one and are dropped when the tile is stored.
  void run_block(int64_t row, int64_t count, int64_t j_begin, int64_t j_end,
                 bool accumulate) const {
    T* out = packed_a;
    for (int64_t j = j_begin; j < j_end; j += R) {
      for (int64_t i = 0; i < count; ++i) {
        const T* in = args.a[row + i];
        for (int r = 0; r < R; ++r) *out++ = in[j + r < j_end ? j + r : j_end - 1];
      }
    }
    for_column_panels<T>(args.columns, [&](int64_t column, auto vectors) {
      const T* a = packed_a;
      for (int64_t j = j_begin; j < j_end; j += R, a += R * count) {
        tile<decltype(vectors)::value>(a, column, count, j, j_end - j < R ? j_end - j : R,
                                       accumulate);
      }
    });
  }

  template <int C>
  __attribute__((noinline)) void tile(const T* a, int64_t column, int64_t count, int64_t j,
                                      int64_t valid_rows, bool accumulate) const {
    Sums<T, R, C> sums{};
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = a + r;
    multiply<T, R>(sums, rows, packed_b + column * count, count, 0);
    T* out = args.out + j * args.columns;
    for (int r = 0; r < valid_rows; ++r, out += args.columns) {
      add_row(out, column, args.columns, accumulate, sums.at[r]);
    }
  }

  void sum_columns(int64_t row, int64_t count, int64_t j_begin, int64_t j_end,
                   bool accumulate) const {
    constexpr int64_t kRun = 16;  // rows summed before they are added to the block's sum
    for (int64_t j = j_begin; j < j_end; j += L) {
      Vec<T> sum{};
      for (int64_t i = 0; i < count; i += kRun) {
        Vec<T> run{};
        for (int64_t k = i; k < count && k < i + kRun; ++k) {
          run += load(args.a[row + k] + j, j_end - j);
        }
        sum += run;
      }
      if (accumulate) sum += load(args.column_sums + j, j_end - j);
      store(args.column_sums + j, sum, j_end - j);
    }
  }
};

template <typename T, int R, int C>
__attribute__((noinline)) void row_product_tile(const RowProductArgs<T>& args, int64_t row,
                                                int64_t column) {
  Sums<T, R, C> sums{};
  const T* a[R];
  for (int r = 0; r < R; ++r) a[r] = args.a[row + r];
  multiply(sums, a, args.packed + column * args.k, args.k, 0);
  for (int r = 0; r < R; ++r) {
    add_row(args.out[row + r], column, args.columns, args.accumulate, sums.at[r]);
  }
}

}  // namespace

template <typename T>
void row_product(const RowProductArgs<T>& args, int64_t row_begin, int64_t row_end) {
  for_column_panels<T>(args.columns, [&](int64_t column, auto vectors) {
    for_row_blocks(row_begin, row_end, [&](int64_t row, auto rows) {
      row_product_tile<T, decltype(rows)::value, decltype(vectors)::value>(args, row, column);
    });
  });
}

template <typename T>
void outer_product(const OuterProductArgs<T>& args, int64_t j_begin, int64_t j_end) {
  OuterProduct<T>{args}.run(j_begin, j_end);
}

template <typename T>
int64_t outer_product_scratch(int64_t columns) {
  constexpr int L = kLanes<T>;
  return kBlockRows * ((columns + L - 1) / L * L + kBlockColumns + kTileRows);
}

#define INSTANTIATE(T)                                                       \
  template void row_product(const RowProductArgs<T>&, int64_t, int64_t);     \
  template void outer_product(const OuterProductArgs<T>&, int64_t, int64_t); \
  template int64_t outer_product_scratch<T>(int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
