// The table of kernels of each instruction set that this build has.
#include "kernels.h"

namespace fastrnn {

// Declares one set's kernels and gathers them in a table.
#define FASTRNN_KERNEL_TABLE(ISA, BYTES, ROWS)                                                  \
  namespace ISA {                                                                               \
  template <typename T>                                                                         \
  void forward(const ForwardArgs<T>&, const Share<T>&);                                         \
  template <typename T>                                                                         \
  int64_t forward_scratch(Cell, int64_t, int64_t, bool);                                        \
  template <typename T>                                                                         \
  void backward(const BackwardArgs<T>&, const Share<T>&, int64_t, int64_t);                     \
  template <typename T>                                                                         \
  void row_product(const RowProductArgs<T>&, int64_t, int64_t);                                 \
  template <typename T>                                                                         \
  void outer_product(const OuterProductArgs<T>&, int64_t, int64_t);                             \
  template <typename T>                                                                         \
  int64_t outer_product_scratch(int64_t);                                                       \
  template <typename T>                                                                         \
  void pack_weights(Cell, const T*, const T*, int64_t, int64_t, int64_t, T*, int64_t, int64_t); \
  template <typename T>                                                                         \
  void pack_bias(Cell, const T*, const T*, int64_t, T*, int64_t, int64_t);                      \
  template <typename T>                                                                         \
  void pack_rows(const T*, int64_t, int64_t, T*, int64_t, int64_t);                             \
  template <typename T>                                                                         \
  void pack_columns(const T*, int64_t, int64_t, T*, int64_t, int64_t);                          \
  template <typename T>                                                                         \
  constexpr Kernels<T> kernels = {                                                              \
      BYTES / sizeof(T), ROWS,           forward<T>,       forward_scratch<T>,                  \
      backward<T>,       row_product<T>, outer_product<T>, outer_product_scratch<T>,            \
      pack_weights<T>,   pack_bias<T>,   pack_rows<T>,     pack_columns<T>};                    \
  }

FASTRNN_KERNEL_TABLE(baseline, 16, 3)
#ifdef FASTRNN_X86
FASTRNN_KERNEL_TABLE(avx2, 32, 3)
FASTRNN_KERNEL_TABLE(avx512, 64, 6)
#endif

template <typename T>
const Kernels<T>* find_kernels(Isa isa) {
  switch (isa) {
    case Isa::baseline: return &baseline::kernels<T>;
#ifdef FASTRNN_X86
    case Isa::avx2: return &avx2::kernels<T>;
    case Isa::avx512: return &avx512::kernels<T>;
#endif
    default: return nullptr;
  }
}

template const Kernels<float>* find_kernels<float>(Isa);
template const Kernels<double>* find_kernels<double>(Isa);

}  // namespace fastrnn
