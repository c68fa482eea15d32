// The table of this instruction set's kernels.
#include "pack.h"

// The set that setup.py compiles for must be the one that simd.h finds in the compiler's macros.
#if defined(FASTRNN_SET)
#define FASTRNN_TEXT(x) #x
#define FASTRNN_TEXT_OF(x) FASTRNN_TEXT(x)
static_assert(__builtin_strcmp(FASTRNN_SET, FASTRNN_TEXT_OF(FASTRNN_ISA)) == 0,
              "compiled for another instruction set than meant: do CFLAGS or CXXFLAGS name one?");
#endif

namespace fastrnn::FASTRNN_ISA {

// forward.cpp, backward.cpp, row_product.cpp and outer_product.cpp:
template <typename E>
void forward(const ForwardArgs<E>&, const Share<Compute<E>>&, int64_t s_begin, int64_t s_end);
template <typename E>
int64_t forward_scratch(const ForwardSizes&);
template <typename E>
void backward(const BackwardArgs<E>&, const Share<Compute<E>>&, int64_t s_begin, int64_t s_end);
template <typename E>
void row_product(const RowProductArgs<E>&, int64_t row_begin, int64_t row_end);
template <typename E>
int64_t row_product_scratch(int64_t k, int64_t columns, int64_t rows_in_place);
template <typename E>
void outer_product(const OuterProductArgs<E>&, int64_t j_begin, int64_t j_end);
template <typename E>
int64_t outer_product_scratch(int64_t a_columns, int64_t share, int64_t columns0, int64_t columns1,
                              int64_t rows);

template <typename E>
const Kernels<E>& kernel_table() {
  static constexpr Kernels<E> table = {.lanes = kLanes<Compute<E>>,
                                       .tile_rows = kTileRows,
                                       .depth = kDepth<E>,
                                       .parts = kParts<E>,
                                       .operand_unit = kOperandUnit,
                                       .reads_in_place = kIsOperand<E>,
                                       .reads_rows_in_place = reads_rows<E>,
                                       .forward = forward<E>,
                                       .forward_scratch = forward_scratch<E>,
                                       .backward = backward<E>,
                                       .row_product = row_product<E>,
                                       .row_product_scratch = row_product_scratch<E>,
                                       .outer_product = outer_product<E>,
                                       .outer_product_scratch = outer_product_scratch<E>,
                                       .pack_gates = pack_gates<E>,
                                       .pack_bias = pack_bias<E>,
                                       .pack_columns = pack_columns<E>};
  return table;
}

#define INSTANTIATE(E) template const Kernels<E>& kernel_table();
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
