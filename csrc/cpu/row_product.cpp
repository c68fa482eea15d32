// The product over all steps that gives the gradient of the input.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

// How a product reads its weights where they lie. With small ones so many tiles are finished before
// the next. Of others so many rows stay in L2: all tiles are multiplied with those before the next,
// so that memory is read in the order in which it lies.
constexpr int64_t kTilesAtOnce = 4;
constexpr int64_t kWideRows = 2 * kSumBlock;

// The full panels of a product. finish(row, rows, column, sums) is called for each tile.
template <typename E, typename F>
FASTRNN_INLINE void multiply_panels_in_place(const RowProductArgs<E>& args, int64_t full,
                                             int64_t row_begin, int64_t row_end, F&& finish) {
  using C = Compute<E>;
  const bool small = are_small(args.k, args.columns, sizeof(C));
  const int64_t group = small ? kTilesAtOnce * kTileRows : row_end - row_begin;
  const int64_t chunk = small ? args.k : kWideRows;
  for (int64_t begin = row_begin; begin < row_end; begin += group) {
    const int64_t end = smaller(begin + group, row_end);
    for (int64_t k = 0; k < args.k; k += chunk) {
      const int64_t count = smaller(args.k - k, chunk);
      Tile<C> tile;
      Vec<C>* sums = small ? tile.at : reinterpret_cast<Vec<C>*>(args.scratch);
      for (int64_t column = 0; column < full; column += kPanelColumns<C>) {
        const C* const w = reinterpret_cast<const C*>(args.w) + k * args.columns + column;
        for_row_blocks(begin, end, [&](int64_t row, int rows) {
          const C* a[kTileRows];
          for (int r = 0; r < rows; ++r) a[r] = args.a[row + r] + k;
          multiply_tile<Part<E>, kParts<E>>(
              {.a = a, .w = w, .w_stride = args.columns, .k_count = count, .accumulate = k > 0},
              rows, kPanelVectors, sums);
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
  const TileUnit unit(kParts<E>, kTileRows);
  const auto store_tile = [&](int64_t row, int rows, int64_t column, int vectors, Vec<C>* sums) {
    for (int r = 0; r < rows; ++r, sums += vectors) {
      if (args.accumulate) add_row(args.out[row + r], column, args.columns, vectors, sums);
      store_row(args.out[row + r], column, args.columns, vectors, sums);
    }
  };
  int64_t full = 0;
  if constexpr (kIsOperand<E>) {
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
      multiply_tile<Part<E>, kParts<E>>(
          {.a = args.a + row, .w = args.scratch, .w_stride = vectors * kLanes<C>, .k_count = k},
          rows, vectors, sums.at);
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
  const int64_t sums = are_small(k, columns, sizeof(C)) ? 0 : rows_in_place * (columns - rest);
  return rest == 0 || sums > packed ? sums : packed;
}

#define INSTANTIATE(E)                                                   \
  template void row_product(const RowProductArgs<E>&, int64_t, int64_t); \
  template int64_t row_product_scratch<E>(int64_t, int64_t, int64_t);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
