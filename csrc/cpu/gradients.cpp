// The two products of the backward pass that run over all steps at once: the gradient of the input,
// and the gradients of the weights.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// Rows summed in one accumulator before the sum is added to the total: bounds the rounding error of
// a gradient over many steps, and is fixed, so that the result does not depend on the thread count.
constexpr int64_t kBlockRows = 256;

// Columns of the left operand packed together: with float, 192 x 256 values are 192 KB of the L2
// cache.
constexpr int64_t kBlockColumns = 192;

// Elements of the right operand that stay in L2: out is written along its rows for so many.
template <typename C>
constexpr int64_t kCachedElements = 512 * 1024 / sizeof(C);

// With so few rows in all a tile would be stored as soon as it is begun: out is then written row by
// row, one stream of stores and not one for each row of a tile.
constexpr int64_t kFewRows = 4;

// Up to so many columns of right operands are packed together and share the packed left one, if
// that is no narrower: with more, that is hardly faster, and takes twice the memory.
constexpr int64_t kColumnsTogether = 384;

template <typename C>
int64_t padded_columns(int64_t columns) {
  return (columns + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// Whether the two are packed together, and the columns that they, or the wider one, then take.
template <typename C>
bool packs_together(int64_t a_columns, int64_t columns0, int64_t columns1) {
  const int64_t both = padded_columns<C>(columns0) + padded_columns<C>(columns1);
  return both <= kColumnsTogether && both <= padded_columns<C>(a_columns);
}
template <typename C>
int64_t packed_columns_b(int64_t a_columns, int64_t columns0, int64_t columns1) {
  const int64_t padded0 = padded_columns<C>(columns0), padded1 = padded_columns<C>(columns1);
  if (packs_together<C>(a_columns, columns0, columns1)) return padded0 + padded1;
  return padded0 > padded1 ? padded0 : padded1;
}

// Elements from one packed block of R columns to the next: an odd number of cache lines, as packing
// writes to all blocks in turn, which must not share a few sets of the L1 cache.
template <typename C>
int64_t block_stride(int64_t operands) {
  constexpr int64_t line = 64 / sizeof(C);
  const int64_t size = operands * kTileRows;
  return kHasMatrixUnit ? size : ((size + line - 1) / line | 1) * line;
}

template <typename E>
struct OuterProducts {
  using C = Compute<E>;
  static constexpr int L = kLanes<C>;
  static constexpr int R = kTileRows;
  static constexpr int kDeep = kDepth<E>;  // rows in an operand

  const OuterProductArgs<E>& args;
  const int64_t block_operands = operands<E>(args.rows < kBlockRows ? args.rows : kBlockRows);
  const int64_t columns0 = args.products[0].columns, columns1 = args.products[1].columns;
  const int together = packs_together<C>(args.a_columns, columns0, columns1) ? 2 : 1;
  C* const packed_b[2] = {args.scratch,
                          args.scratch + (together == 2 ? block_operands * padded(0) : 0)};
  C* const packed_a =  // (blocks of R, operands, R)
      args.scratch + block_operands * packed_columns_b<C>(args.a_columns, columns0, columns1);

  // Columns of packed_b.
  int64_t padded(int i) const { return padded_columns<C>(args.products[i].columns); }

  const Gradient<E>* a_row(int64_t row) const {
    return reinterpret_cast<const Gradient<E>*>(args.a[row]);
  }

  void run(int64_t j_begin, int64_t j_end) const {
    if constexpr (kIsComputed<E>) {
      if (args.rows <= kFewRows) {
        if (args.column_sums) sum_columns(0, args.rows, j_begin, j_end, args.accumulate);
        for (const OuterProduct<E>& product : args.products) {
          if (product.out) run_few_rows<kFewRows>(product, j_begin, j_end);
        }
        return;
      }
    }
    for (int64_t row = 0; row < args.rows; row += kBlockRows) {
      const int64_t count = args.rows - row < kBlockRows ? args.rows - row : kBlockRows;
      const bool accumulate = args.accumulate || row > 0, last = row + count == args.rows;
      if (args.column_sums) sum_columns(row, count, j_begin, j_end, accumulate);
      for (int first = 0; first < 2; first += together) {
        run_products(first, row, count, j_begin, j_end, accumulate, last);
      }
    }
  }

  // Those that are packed together, from the first on.
  void run_products(int first, int64_t row, int64_t count, int64_t j_begin, int64_t j_end,
                    bool accumulate, bool last) const {
    bool wanted = false;
    for (int i = first; i < first + together; ++i) {
      if (!args.products[i].out) continue;
      pack_b(args.products[i], row, count, packed_b[i]);
      wanted = true;
    }
    for (int64_t j = j_begin; wanted && j < j_end; j += kBlockColumns) {
      const int64_t end = j + kBlockColumns < j_end ? j + kBlockColumns : j_end;
      pack_a(row, count, j, end);
      for (int i = first; i < first + together; ++i) {
        if (args.products[i].out) {
          run_block(args.products[i], packed_b[i], count, j, end, accumulate, last);
        }
      }
    }
  }

  template <int N>
  void run_few_rows(const OuterProduct<E>& product, int64_t j_begin, int64_t j_end) const {
    if constexpr (N > 1) {
      if (args.rows < N) return run_few_rows<N - 1>(product, j_begin, j_end);
    }
    for (int64_t j = j_begin; j < j_end; ++j) {
      C* const out = product.out + j * product.columns;
      for (int64_t column = 0; column < product.columns; column += L) {
        const int64_t count = product.columns - column;
        Vec<C> sum{};
        for (int i = 0; i < N; ++i) {
          sum = fma<C>(broadcast(args.a[i][j]), load(product.b[i] + column, count), sum);
        }
        if (args.accumulate) sum = load(out + column, count) + sum;
        store(out + column, sum, count);
      }
    }
  }

  // (panels, operands of rows, vectors, lanes)
  static void pack_b(const OuterProduct<E>& product, int64_t row, int64_t count, C* packed) {
    for_column_panels<C>(product.columns, [&](int64_t column, int vectors) {
      C* out = packed + column * operands<E>(count);
      for (int64_t i = row; i < row + count; i += kDeep) {
        const bool has_next = i + 1 < row + count;
        for (int v = 0; v < vectors; ++v, out += L) {
          const int64_t at = column + v * L;
          store(out, column_operands(product.b[i] + at, has_next ? product.b[i + 1] + at : nullptr,
                                     product.columns - at));
        }
      }
      const C* const end = packed + (column + vectors * L) * operands<E>(count);
      for (; out < end; out += L) store(out, Vec<C>{});
    });
  }

  // a's columns [j_begin, j_end) in blocks of R, (operands of rows, R) each or, for a matrix unit,
  // (R, operands of rows); columns past the end are dropped when the tile is stored.
  void pack_a(int64_t row, int64_t count, int64_t j_begin, int64_t j_end) const {
    if constexpr (kHasMatrixUnit) {
      pack_a_transposed(row, count, j_begin, j_end);
    } else {
      pack_a_in_order(row, count, j_begin, j_end);
    }
  }

  void pack_a_transposed(int64_t row, int64_t count, int64_t j_begin, int64_t j_end) const {
    const int64_t k_count = operands<E>(count);
    const int64_t end = row + count;
    for (int64_t k = 0; k < k_count; k += L) {
      for (int64_t j = j_begin; j < j_end; j += L) {
        C copy[L * L];
        for (int64_t i = 0; i < L; ++i) {
          const int64_t at = row + (k + i) * kDeep;
          store(copy + i * L,
                at < end ? column_operands(a_row(at) + j,
                                           at + 1 < end ? a_row(at + 1) + j : nullptr, j_end - j)
                         : Vec<C>{});
        }
        Vec<C> square[L];
        load_transposed<C>(square, copy, L);
        C* const out = packed_a + (j - j_begin) * k_count + k;
        for (int64_t i = 0; i < L; ++i) store(out + i * k_count, square[i]);
      }
    }
  }

  void pack_a_in_order(int64_t row, int64_t count, int64_t j_begin, int64_t j_end) const {
    const int64_t stride = block_stride<C>(operands<E>(count));
    C* out = packed_a;
    for (int64_t i = row; i < row + count; i += kDeep, out += R) {
      if constexpr (kDeep == 1) {
        C* target = out;
        int64_t j = j_begin;
        for (; j + R <= j_end; j += R, target += stride) {
          __builtin_memcpy(target, args.a[i] + j, R * sizeof(C));
        }
        for (int r = 0; j < j_end && r < R; ++r) {
          target[r] = args.a[i][j + r < j_end ? j + r : j_end - 1];
        }
      } else {
        const bool has_next = i + 1 < row + count;
        auto* target = reinterpret_cast<Gradient<E>*>(out);
        for (int64_t j = j_begin; j < j_end; j += R, target += stride * kDeep) {
          for (int r = 0; r < R; ++r) {
            const int64_t at = j + r < j_end ? j + r : j_end - 1;
            target[r * kDeep] = a_row(i)[at];
            target[r * kDeep + 1] = has_next ? a_row(i + 1)[at] : Gradient<E>{};
          }
        }
      }
    }
  }

  void run_block(const OuterProduct<E>& product, const C* b, int64_t count, int64_t j_begin,
                 int64_t j_end, bool accumulate, bool last) const {
    E* const result = last ? product.result : nullptr;
    const int64_t k_count = operands<E>(count);
    const auto run_tile = [&](int64_t j, int64_t column, int vectors) {
      const int rows = static_cast<int>(j_end - j < R ? j_end - j : R);
      const C* a = packed_a + (j - j_begin) / R * block_stride<C>(k_count);
      const C* a_rows[R];
      for (int r = 0; r < R; ++r) a_rows[r] = a + r * (kHasMatrixUnit ? k_count : 1);
      Tile<C> sums;
      multiply_tile<Multiplier<E>>(
          {a_rows, R, b + column * k_count, vectors * L, 0, k_count, false, false}, rows, vectors,
          sums.at);
      C* out = product.out + j * product.columns;
      for (int r = 0; r < rows; ++r, out += product.columns) {
        Vec<C>* row = sums.at + r * vectors;
        if (accumulate) add_row(out, column, product.columns, vectors, row);
        if (result) {
          store_row(result + (j + r) * product.columns, column, product.columns, vectors, row);
        } else {
          store_row(out, column, product.columns, vectors, row);
        }
      }
    };
    const int64_t cached = kCachedElements<C> / k_count / kPanelColumns<C> * kPanelColumns<C>;
    for (int64_t begin = 0; begin < product.columns; begin += cached) {
      const int64_t left = product.columns - begin;
      for (int64_t j = j_begin; j < j_end; j += R) {
        for_column_panels<C>(left < cached ? left : cached, [&](int64_t column, int vectors) {
          run_tile(j, begin + column, vectors);
        });
      }
    }
  }

  void sum_columns(int64_t row, int64_t count, int64_t j_begin, int64_t j_end,
                   bool accumulate) const {
    constexpr int64_t kRun = 16;  // rows summed before they are added to the block's sum
    for (int64_t j = j_begin; j < j_end; j += L) {
      Vec<C> sum{};
      for (int64_t i = 0; i < count; i += kRun) {
        Vec<C> run{};
        for (int64_t k = i; k < count && k < i + kRun; ++k) {
          run += load_as(a_row(row + k) + j, j_end - j);
        }
        sum += run;
      }
      if (accumulate) sum += load(args.column_sums + j, j_end - j);
      store(args.column_sums + j, sum, j_end - j);
    }
  }
};

// How a product reads its weights where they lie. With small ones so many tiles are finished before
// the next. Of others so many rows stay in L2: all tiles are multiplied with those before the next,
// so that memory is read in the order in which it lies.
constexpr int64_t kTilesAtOnce = 4;
constexpr int64_t kWideRows = 2 * kSumBlock;

template <typename C>
bool is_small(int64_t k, int64_t columns) {
  return k * columns * int64_t{sizeof(C)} <= kSmallWeights;
}

// The full panels of a product. finish(row, rows, column, sums) is called for each tile.
template <typename E, typename F>
FASTRNN_INLINE void multiply_panels_in_place(const RowProductArgs<E>& args, int64_t full,
                                             int64_t row_begin, int64_t row_end, F&& finish) {
  using C = Compute<E>;
  const bool small = is_small<C>(args.k, args.columns);
  const int64_t group = small ? kTilesAtOnce * kTileRows : row_end - row_begin;
  const int64_t chunk = small ? args.k : kWideRows;
  for (int64_t begin = row_begin; begin < row_end; begin += group) {
    const int64_t end = begin + group < row_end ? begin + group : row_end;
    for (int64_t k = 0; k < args.k; k += chunk) {
      const int64_t count = args.k - k < chunk ? args.k - k : chunk;
      Tile<C> tile;
      Vec<C>* sums = small ? tile.at : reinterpret_cast<Vec<C>*>(args.scratch);
      for (int64_t column = 0; column < full; column += kPanelColumns<C>) {
        const C* const w = reinterpret_cast<const C*>(args.w) + k * args.columns + column;
        for_row_blocks(begin, end, [&](int64_t row, int rows) {
          const C* a[kTileRows];
          for (int r = 0; r < rows; ++r) a[r] = args.a[row + r] + k;
          multiply_tile<Multiplier<E>>({a, 1, w, args.columns, 0, count, false, k > 0}, rows,
                                       kPanelVectors, sums);
          if (k + count == args.k) finish(row, rows, column, sums);
          if (!small) sums += rows * kPanelVectors;
        });
      }
    }
  }
}

}  // namespace

template <typename E>
void row_product(const RowProductArgs<E>& args, int64_t row_begin, int64_t row_end) {
  using C = Compute<E>;
  if (row_begin >= row_end) return;
  const TileUnit unit;
  const auto store_tile = [&](int64_t row, int rows, int64_t column, int vectors, Vec<C>* sums) {
    for (int r = 0; r < rows; ++r, sums += vectors) {
      if (args.accumulate) add_row(args.out[row + r], column, args.columns, vectors, sums);
      store_row(args.out[row + r], column, args.columns, vectors, sums);
    }
  };
  int64_t full = 0;
  if constexpr (kIsComputed<E>) {
    if (args.in_place) {
      full = args.columns / kPanelColumns<C> * kPanelColumns<C>;
      multiply_panels_in_place(args, full, row_begin, row_end,
                               [&](int64_t row, int rows, int64_t column, Vec<C>* sums) {
                                 store_tile(row, rows, column, kPanelVectors, sums);
                               });
    }
  }
  const int64_t k = operands<E>(args.k);
  for_column_panels<C>(args.columns - full, [&](int64_t first, int vectors) {
    const int64_t column = full + first, panel = column / kPanelColumns<C>;
    C* const packed = args.scratch - column * k;  // pack_columns adds column * k
    pack_columns(args.w, args.k, args.columns, packed, panel, panel + 1);
    for_row_blocks(row_begin, row_end, [&](int64_t row, int rows) {
      Tile<C> sums;
      multiply_tile<Multiplier<E>>(
          {args.a + row, 1, args.scratch, vectors * kLanes<C>, 0, k, false, false}, rows, vectors,
          sums.at);
      store_tile(row, rows, column, vectors, sums.at);
    });
  });
}

template <typename E>
int64_t row_product_scratch(int64_t k, int64_t columns, int64_t rows_in_place) {
  using C = Compute<E>;
  const int64_t packed = operands<E>(k) * kPanelColumns<C>;
  if (rows_in_place == 0) return packed;
  const int64_t rest = columns % kPanelColumns<C>;
  const int64_t sums = is_small<C>(k, columns) ? 0 : rows_in_place * (columns - rest);
  return rest == 0 || sums > packed ? sums : packed;
}

template <typename E>
void outer_product(const OuterProductArgs<E>& args, int64_t j_begin, int64_t j_end) {
  const TileUnit unit;
  OuterProducts<E>{args}.run(j_begin, j_end);
}

template <typename E>
int64_t outer_product_scratch(int64_t a_columns, int64_t columns0, int64_t columns1, int64_t rows) {
  using C = Compute<E>;
  if (kIsComputed<E> && rows <= kFewRows) return 0;
  const int64_t k_count = operands<E>(rows < kBlockRows ? rows : kBlockRows);
  const int64_t columns = a_columns < kBlockColumns ? a_columns : kBlockColumns;
  return k_count * packed_columns_b<C>(a_columns, columns0, columns1) +
         (columns + kTileRows - 1) / kTileRows * block_stride<C>(k_count);
}

#define INSTANTIATE(E)                                                       \
  template void row_product(const RowProductArgs<E>&, int64_t, int64_t);     \
  template int64_t row_product_scratch<E>(int64_t, int64_t, int64_t);        \
  template void outer_product(const OuterProductArgs<E>&, int64_t, int64_t); \
  template int64_t outer_product_scratch<E>(int64_t, int64_t, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
