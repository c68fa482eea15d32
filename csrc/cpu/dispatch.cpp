// The table of kernels of each instruction set that this build has.
#include <type_traits>

#include "kernels.h"

namespace fastrnn {

// Declares one set's kernels and gathers them in a table.
#define FASTRNN_KERNEL_TABLE(ISA, BYTES, ROWS, UNIT)                                           \
  namespace ISA {                                                                              \
  template <typename E>                                                                        \
  void forward(const ForwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t);             \
  template <typename E>                                                                        \
  int64_t forward_scratch(const ForwardSizes&);                                                \
  template <typename E>                                                                        \
  void backward(const BackwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t);           \
  template <typename E>                                                                        \
  void row_product(const RowProductArgs<E>&, int64_t, int64_t);                                \
  template <typename E>                                                                        \
  int64_t row_product_scratch(int64_t, int64_t, bool);                                         \
  template <typename E>                                                                        \
  void outer_product(const OuterProductArgs<E>&, int64_t, int64_t);                            \
  template <typename E>                                                                        \
  int64_t outer_product_scratch(int64_t, int64_t, int64_t, int64_t);                           \
  template <typename E>                                                                        \
  void pack_weights(Cell, const E*, const E*, int64_t, int64_t, int64_t, Compute<E>*, int64_t, \
                    int64_t);                                                                  \
  template <typename E>                                                                        \
  void pack_bias(Cell, const E*, const E*, int64_t, Compute<E>*, int64_t, int64_t);            \
  template <typename E>                                                                        \
  void pack_rows(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);                   \
  template <typename E>                                                                        \
  void pack_columns(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);                \
  template <typename E, int depth>                                                             \
  constexpr Kernels<E> kernels = {BYTES / sizeof(Compute<E>),                                  \
                                  ROWS,                                                        \
                                  depth,                                                       \
                                  UNIT,                                                        \
                                  kIsComputed<E>,                                              \
                                  forward<E>,                                                  \
                                  forward_scratch<E>,                                          \
                                  backward<E>,                                                 \
                                  row_product<E>,                                              \
                                  row_product_scratch<E>,                                      \
                                  outer_product<E>,                                            \
                                  outer_product_scratch<E>,                                    \
                                  pack_weights<E>,                                             \
                                  pack_bias<E>,                                                \
                                  pack_rows<E>,                                                \
                                  pack_columns<E>};                                            \
  }

FASTRNN_KERNEL_TABLE(baseline, 16, 3, 1)
#ifdef FASTRNN_X86
FASTRNN_KERNEL_TABLE(avx2, 32, 3, 1)
FASTRNN_KERNEL_TABLE(avx512, 64, 6, 1)
FASTRNN_KERNEL_TABLE(avx512_bf16, 64, 6, 1)
FASTRNN_KERNEL_TABLE(amx, 64, 16, 16)
#endif

template <typename E>
const Kernels<E>* find_kernels(Isa isa) {
  switch (isa) {
    case Isa::baseline: return &baseline::kernels<E, 1>;
#ifdef FASTRNN_X86
    case Isa::avx2: return &avx2::kernels<E, 1>;
    case Isa::avx512: return &avx512::kernels<E, 1>;
    // From here on only products of 16-bit types differ from avx512's.
    case Isa::avx512_bf16:
      if constexpr (std::is_same_v<E, BFloat16>) return &avx512_bf16::kernels<E, 2>;
      return &avx512::kernels<E, 1>;
    case Isa::amx:
      if constexpr (std::is_same_v<E, BFloat16>) return &amx::kernels<E, 2>;
      return &avx512::kernels<E, 1>;
    case Isa::amx_fp16:
      if constexpr (!kIsComputed<E>) return &amx::kernels<E, 2>;
      return &avx512::kernels<E, 1>;
#endif
    default: return nullptr;
  }
}

template const Kernels<float>* find_kernels<float>(Isa);
template const Kernels<double>* find_kernels<double>(Isa);
template const Kernels<Half>* find_kernels<Half>(Isa);
template const Kernels<BFloat16>* find_kernels<BFloat16>(Isa);

}  // namespace fastrnn
