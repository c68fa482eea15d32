// The product over all steps that gives the gradients of the weights.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// Columns of the left operand packed together, whole tiles: with float, 128 x 256 values are 128 KB
// of the L2 cache.
constexpr int64_t kBlockColumns = 128 / kTileRows * kTileRows;

// Elements of the right operand that stay in cache: out is written along its rows for so many.
// Tiles of three rows read them twice as often as tiles of six: they want them nearer.
template <typename C>
constexpr int64_t kCachedElements = (FASTRNN_REGISTERS == 32 ? 512 : 32) * 1024 / sizeof(C);

// With so few rows in all a tile would be stored as soon as it is begun: out is then written row by
// row, one stream of stores and not one for each row of a tile.
constexpr int64_t kFewRows = 4;

// Right operands whose rows are together no longer than this are packed together and share the
// packed left one, if that is no narrower: with more, that is hardly faster, and takes twice the
// memory. Left ones are packed for tiles of three rows by more copies.
constexpr int64_t kBytesTogether = FASTRNN_REGISTERS == 32 ? 2560 : 4096;

template <typename C>
int64_t padded_columns(int64_t columns) {
  return round_up(columns, kLanes<C>);
}

// Whether the two are packed together, and the columns that they, or the wider one, then take.
template <typename C>
bool packs_together(int64_t a_columns, int64_t columns0, int64_t columns1) {
  const int64_t both = padded_columns<C>(columns0) + padded_columns<C>(columns1);
  return both * int64_t{sizeof(C)} <= kBytesTogether && both <= padded_columns<C>(a_columns);
}
template <typename C>
int64_t packed_columns_b(int64_t a_columns, int64_t columns0, int64_t columns1) {
  const int64_t padded0 = padded_columns<C>(columns0), padded1 = padded_columns<C>(columns1);
  if (packs_together<C>(a_columns, columns0, columns1)) return padded0 + padded1;
  return padded0 > padded1 ? padded0 : padded1;
}

// Elements copied of a row for a tile: of three or six with what follows them, which is one access
// and not two. The next row's then replace that.
constexpr int64_t kCopied = round_up(kTileRows, 4);

// Elements from one packed block of R columns to the next: an odd number of cache lines, as packing
// writes to all blocks in turn, which must not share a few sets of the L1 cache.
template <typename C>
int64_t block_stride(int64_t operands) {
  constexpr int64_t line = 64 / sizeof(C);
  const int64_t size = operands * kTileRows;
  return kHasMatrixUnit ? size : (divide_up(size + kCopied - kTileRows, line) | 1) * line;
}

template <typename E>
struct OuterProducts {
  using C = Compute<E>;
  static constexpr int L = kLanes<C>;
  static constexpr int R = kTileRows;
  static constexpr int kDeep = kDepth<E>;  // rows in an operand
  static constexpr int64_t kRun = 16;      // rows summed before they are added to the block's sum
  static constexpr int64_t kTogether = kHasMatrixUnit ? L * kDeep : kRun;  // rows read together

  const OuterProductArgs<E>& args;
  const int64_t rows_in_operands = operands<E>(args.rows);
  const int64_t columns0 = args.products[0].columns, columns1 = args.products[1].columns;
  const int together = packs_together<C>(args.a_columns, columns0, columns1) ? 2 : 1;
  C* const packed_b[2] = {args.scratch,
                          args.scratch + (together == 2 ? rows_in_operands * padded(0) : 0)};
  C* const packed_a =  // (blocks of R, operands, R)
      args.scratch + rows_in_operands * packed_columns_b<C>(args.a_columns, columns0, columns1);

  // Columns of packed_b.
  int64_t padded(int i) const { return padded_columns<C>(args.products[i].columns); }

  const Part<E>* a_row(int64_t row, int part = 0) const {
    return reinterpret_cast<const Part<E>*>(args.a[row] + part * part_operands<E>(args.a_columns));
  }

  void run(int64_t j_begin, int64_t j_end) const {
    if (args.rows <= kFewRows) {
      if (args.column_sums) sum_columns(j_begin, j_end);
      for (const OuterProduct<E>& product : args.products) {
        if (product.out) run_few_rows<kFewRows>(product, j_begin, j_end);
      }
      return;
    }
    bool sums = args.column_sums;
    for (int first = 0; first < 2; first += together) {
      if (!pack_together(first)) continue;
      for_column_blocks(j_begin, j_end, [&](int64_t j, int64_t end) {
        read_a(j, end, true, sums);
        for (int i = first; i < first + together; ++i) {
          if (args.products[i].out) run_block(args.products[i], packed_b[i], j, end);
        }
      });
      sums = false;
    }
    if (sums) sum_columns(j_begin, j_end);
  }

  // Packs the right operands that are packed together, from the first on. False if there is none.
  bool pack_together(int first) const {
    bool any = false;
    for (int i = first; i < first + together; ++i) {
      if (!args.products[i].out) continue;
      pack_b(args.products[i], packed_b[i]);
      any = true;
    }
    return any;
  }

  // Calls f(first column, end) for each block of a's columns.
  template <typename F>
  static void for_column_blocks(int64_t j_begin, int64_t j_end, F&& f) {
    for (int64_t j = j_begin; j < j_end; j += kBlockColumns) {
      f(j, smaller(j + kBlockColumns, j_end));
    }
  }

  void sum_columns(int64_t j_begin, int64_t j_end) const {
    for_column_blocks(j_begin, j_end, [&](int64_t j, int64_t end) { read_a(j, end, false, true); });
  }

  template <int N>
  void run_few_rows(const OuterProduct<E>& product, int64_t j_begin, int64_t j_end) const {
    if constexpr (N > 1) {
      if (args.rows < N) return run_few_rows<N - 1>(product, j_begin, j_end);
    }
    for (int64_t first = j_begin; first < j_end; first += L) {
      C a[N][L];
      for (int i = 0; i < N; ++i) store(a[i], load_a(i, first, j_end - first));
      for (int64_t j = first; j < j_end && j < first + L; ++j) {
        C* const out = product.out + j * product.columns;
        E* const result = product.result ? product.result + j * product.columns : nullptr;
        for (int64_t column = 0; column < product.columns; column += L) {
          const int64_t count = product.columns - column;
          Vec<C> sum{};
          for (int i = 0; i < N; ++i) {
            sum = fma<C>(broadcast(a[i][j - first]), load_as(product.b[i] + column, count), sum);
          }
          if (args.accumulate) sum = load(out + column, count) + sum;
          if (result) {
            store_as(result + column, sum, count);
          } else {
            store(out + column, sum, count);
          }
        }
      }
    }
  }

  // Columns j and on of a row of a, the sums of their parts.
  Vec<C> load_a(int64_t row, int64_t j, int64_t count) const {
    Vec<C> sum = load_as(a_row(row) + j, count);
    for (int part = 1; part < kParts<E>; ++part) sum += load_as(a_row(row, part) + j, count);
    return sum;
  }

  // (panels, operands of rows, vectors, lanes); kTogether rows after the other, so that each is
  // read along.
  void pack_b(const OuterProduct<E>& product, C* packed) const {
    const int64_t count = args.rows, size = part_operands<E>(count);
    for (int64_t i = 0; i < size * kDeep; i += kTogether) {
      const int64_t i_end = smaller(i + kTogether, size * kDeep);
      for_column_panels<C>(product.columns, [&](int64_t column, int vectors) {
        C* out = packed + column * rows_in_operands + i / kDeep * vectors * L;
        for (int64_t k = i; k < i_end; k += kDeep) {
          const E* const first = k < count ? product.b[k] + column : nullptr;
          const E* const next = k + 1 < count ? product.b[k + 1] + column : nullptr;
          for (int v = 0; v < vectors; ++v, out += L) {
            for_parts<E>([&](auto part) {
              constexpr int p = decltype(part)::value;
              store(out + p * size * vectors * L,
                    first ? column_operands<E, p>(first + v * L, next ? next + v * L : nullptr,
                                                  product.columns - column - v * L)
                          : Vec<C>{});
            });
          }
        }
      });
    }
  }

  // Packs a's columns [j_begin, j_end) and adds them up, kTogether rows after the other, as `packs`
  // and `sums` say. Packed they are in blocks of R, (operands of rows, R) each or, for a matrix
  // unit, (R, operands of rows); columns past the end are dropped when the tile is stored.
  void read_a(int64_t j_begin, int64_t j_end, bool packs, bool sums) const {
    C block_sums[round_up(kBlockColumns, L)] = {};
    for (int64_t i = 0; i < args.rows; i += kTogether) {
      const int64_t rows = smaller(args.rows - i, kTogether);
      if (sums) add_columns(i, rows, j_begin, j_end, block_sums);
      if (!packs) continue;
      if constexpr (kHasMatrixUnit) {
        pack_a_transposed(i, j_begin, j_end);
      } else {
        pack_a_in_order(i, rows, j_begin, j_end);
      }
    }
    for (int64_t j = j_begin; sums && j < j_end; j += L) {
      Vec<C> sum = load(block_sums + j - j_begin);
      if (args.accumulate) sum += load(args.column_sums + j, j_end - j);
      store(args.column_sums + j, sum, j_end - j);
    }
  }

  void add_columns(int64_t row, int64_t rows, int64_t j_begin, int64_t j_end, C* sums) const {
    for (int64_t j = j_begin; j < j_end; j += L, sums += L) {
      Vec<C> sum = load(sums);
      for (int64_t i = 0; i < rows; i += kRun) {
        Vec<C> run{};
        for (int64_t k = i; k < rows && k < i + kRun; ++k) {
          run += load_a(row + k, j, j_end - j);
        }
        sum += run;
      }
      store(sums, sum);
    }
  }

  // Of rows i to i + rows - 1.
  void pack_a_in_order(int64_t i, int64_t rows, int64_t j_begin, int64_t j_end) const {
    const int64_t stride = block_stride<C>(rows_in_operands);
    C* out = packed_a + i / kDeep * R;
    for (int64_t j = j_begin; j < j_end; j += R, out += stride) {
      C* target = out;
      for (int64_t k = i; k < i + rows; k += kDeep, target += R) {
        if constexpr (kDeep == 1) {
          if (j + kCopied <= j_end) {
            __builtin_memcpy(target, args.a[k] + j, kCopied * sizeof(C));
          } else if constexpr (R <= L) {
            store(target, load(args.a[k] + j, j_end - j), R);
          } else {
            for (int r = 0; r < R; ++r) target[r] = args.a[k][smaller(j + r, j_end - 1)];
          }
        } else {
          const bool has_next = k + 1 < args.rows;
          auto* pairs = reinterpret_cast<Part<E>*>(target);
          for (int r = 0; r < R; ++r) {
            const int64_t at = smaller(j + r, j_end - 1);
            pairs[r * kDeep] = a_row(k)[at];
            pairs[r * kDeep + 1] = has_next ? a_row(k + 1)[at] : Part<E>{};
          }
        }
      }
    }
  }

  // Of the kTogether rows from i on.
  void pack_a_transposed(int64_t i, int64_t j_begin, int64_t j_end) const {
    const int64_t k_count = rows_in_operands, end = args.rows;
    for (int64_t j = j_begin; j < j_end; j += L) {
      for (int part = 0; part < kParts<E>; ++part) {
        C copy[L * L];
        for (int64_t k = 0; k < L; ++k) {
          const int64_t at = i + k * kDeep;
          const Part<E>* const next = at + 1 < end ? a_row(at + 1, part) + j : nullptr;
          store(copy + k * L,
                at < end ? column_operands(a_row(at, part) + j, next, j_end - j) : Vec<C>{});
        }
        Vec<C> square[L];
        load_transposed<C>(square, copy, L);
        C* const out =
            packed_a + (j - j_begin) * k_count + part * part_operands<E>(end) + i / kDeep;
        for (int64_t k = 0; k < L; ++k) store(out + k * k_count, square[k]);
      }
    }
  }

  void run_block(const OuterProduct<E>& product, const C* b, int64_t j_begin, int64_t j_end) const {
    E* const result = product.result;
    const int64_t k_count = rows_in_operands;
    const auto run_tile = [&](int64_t j, int64_t column, int vectors) {
      const int rows = static_cast<int>(smaller(j_end - j, R));
      const C* a = packed_a + (j - j_begin) / R * block_stride<C>(k_count);
      const C* a_rows[R];
      for (int r = 0; r < R; ++r) a_rows[r] = a + r * (kHasMatrixUnit ? k_count : 1);
      // The lines of `out` come while the tile is multiplied.
      const bool touches_out = args.accumulate || !result;
      for (int r = 0; touches_out && r < rows; ++r) {
        fetch_lines(product.out + (j + r) * product.columns + column, vectors * L * sizeof(C));
      }
      Tile<C> sums;
      multiply_tile<Part<E>, kParts<E>>({.a = a_rows,
                                         .a_stride = R,
                                         .w = b + column * k_count,
                                         .w_stride = vectors * L,
                                         .k_count = k_count},
                                        rows, vectors, sums.at);
      C* out = product.out + j * product.columns;
      for (int r = 0; r < rows; ++r, out += product.columns) {
        Vec<C>* row = sums.at + r * vectors;
        if (args.accumulate) add_row(out, column, product.columns, vectors, row);
        if (result) {
          store_row(result + (j + r) * product.columns, column, product.columns, vectors, row);
        } else {
          store_row(out, column, product.columns, vectors, row);
        }
      }
    };
    const int64_t cached = kCachedElements<C> / k_count / kPanelColumns<C> * kPanelColumns<C>;
    for (int64_t begin = 0; begin < product.columns; begin += cached) {
      const int64_t width = smaller(product.columns - begin, cached);
      for (int64_t j = j_begin; j < j_end; j += R) {
        for_column_panels<C>(
            width, [&](int64_t column, int vectors) { run_tile(j, begin + column, vectors); });
      }
    }
  }
};

}  // namespace

template <typename E>
void outer_product(const OuterProductArgs<E>& args, int64_t j_begin, int64_t j_end) {
  if (j_begin >= j_end) return;
  const TileUnit unit(kParts<E>, kTileRows);
  OuterProducts<E>{args}.run(j_begin, j_end);
}

template <typename E>
int64_t outer_product_scratch(int64_t a_columns, int64_t share, int64_t columns0, int64_t columns1,
                              int64_t rows) {
  using C = Compute<E>;
  if (rows <= kFewRows || share == 0) return 0;
  const int64_t k_count = operands<E>(rows);
  const int64_t columns = smaller(share, kBlockColumns);
  return k_count * packed_columns_b<C>(a_columns, columns0, columns1) +
         (divide_up(columns, kTileRows) - 1) * block_stride<C>(k_count) + k_count * kTileRows;
}

#define INSTANTIATE(E)                                                       \
  template void outer_product(const OuterProductArgs<E>&, int64_t, int64_t); \
  template int64_t outer_product_scratch<E>(int64_t, int64_t, int64_t, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
