// The table of kernels of each instruction set that this build has, and what a processor adds to
// AVX-512.
#include <cstdlib>
#include <string_view>
#include <type_traits>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fastrnn {

// Declares one set's kernels and gathers them in a table.
#define FASTRNN_KERNEL_TABLE(ISA, BYTES, ROWS, UNIT)                                 \
  namespace ISA {                                                                    \
  template <typename E>                                                              \
  void forward(const ForwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t);   \
  template <typename E>                                                              \
  int64_t forward_scratch(const ForwardSizes&);                                      \
  template <typename E>                                                              \
  void backward(const BackwardArgs<E>&, const Share<Compute<E>>&, int64_t, int64_t); \
  template <typename E>                                                              \
  void row_product(const RowProductArgs<E>&, int64_t, int64_t);                      \
  template <typename E>                                                              \
  int64_t row_product_scratch(int64_t, int64_t, int64_t);                            \
  template <typename E>                                                              \
  void outer_product(const OuterProductArgs<E>&, int64_t, int64_t);                  \
  template <typename E>                                                              \
  int64_t outer_product_scratch(int64_t, int64_t, int64_t, int64_t);                 \
  template <typename E>                                                              \
  void pack_gates(Cell, const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);  \
  template <typename E>                                                              \
  void pack_bias(Cell, const E*, const E*, int64_t, Compute<E>*, int64_t, int64_t);  \
  template <typename E>                                                              \
  void pack_columns(const E*, int64_t, int64_t, Compute<E>*, int64_t, int64_t);      \
  template <typename E, int depth, int parts = 1>                                    \
  constexpr Kernels<E> kernels = {BYTES / sizeof(Compute<E>),                        \
                                  ROWS,                                              \
                                  depth,                                             \
                                  parts,                                             \
                                  UNIT,                                              \
                                  kIsComputed<E> && depth == 1,                      \
                                  forward<E>,                                        \
                                  forward_scratch<E>,                                \
                                  backward<E>,                                       \
                                  row_product<E>,                                    \
                                  row_product_scratch<E>,                            \
                                  outer_product<E>,                                  \
                                  outer_product_scratch<E>,                          \
                                  pack_gates<E>,                                     \
                                  pack_bias<E>,                                      \
                                  pack_columns<E>};                                  \
  }

#if defined(__aarch64__)
FASTRNN_KERNEL_TABLE(baseline, 16, 6, 1)
#else
FASTRNN_KERNEL_TABLE(baseline, 16, 3, 1)
#endif
#ifdef FASTRNN_X86
FASTRNN_KERNEL_TABLE(avx2, 32, 3, 1)
FASTRNN_KERNEL_TABLE(avx512, 64, 6, 1)
FASTRNN_KERNEL_TABLE(avx512_bf16, 64, 6, 1)
FASTRNN_KERNEL_TABLE(amx, 64, 16, 16)
FASTRNN_KERNEL_TABLE(amx_fp16, 64, 16, 16)
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
      if constexpr (std::is_same_v<E, Half>) return &amx::kernels<E, 2, 2>;
      [[fallthrough]];
    case Isa::amx_fp16:
      if constexpr (std::is_same_v<E, BFloat16>) return &amx::kernels<E, 2>;
      if constexpr (std::is_same_v<E, Half>) return &amx_fp16::kernels<E, 2>;
      return &avx512::kernels<E, 1>;
#endif
    default: return nullptr;
  }
}

template <>
const Kernels<HighFloat>* find_kernels([[maybe_unused]] Isa isa) {
#ifdef FASTRNN_X86
  if (isa >= Isa::amx) return &amx::kernels<HighFloat, 2, 2>;
#endif
  return nullptr;
}

template <>
const Kernels<MediumFloat>* find_kernels([[maybe_unused]] Isa isa) {
#ifdef FASTRNN_X86
  if (isa >= Isa::amx) return &amx::kernels<MediumFloat, 2>;
  if (isa == Isa::avx512_bf16) return &avx512_bf16::kernels<MediumFloat, 2>;
#endif
  return nullptr;
}

template const Kernels<float>* find_kernels<float>(Isa);
template const Kernels<double>* find_kernels<double>(Isa);
template const Kernels<Half>* find_kernels<Half>(Isa);
template const Kernels<BFloat16>* find_kernels<BFloat16>(Isa);

Isa find_avx512_extension() {
#if defined(__x86_64__) && defined(__linux__)
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of edx, leaf 7
  constexpr unsigned kFloat16 = 1u << 21;                     // of eax, leaf 7, subleaf 1
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const char* const wish = std::getenv("FASTRNN_AMX");
  if (wish && std::string_view(wish) == "0") return Isa::avx512_bf16;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::avx512_bf16;
  if (!(edx & kBFloat16) || !(edx & kTile)) return Isa::avx512_bf16;
  // Linux gives a process the tiles' 8 KB of state when it asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return Isa::avx512_bf16;
  const bool float16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kFloat16);
  return float16 ? Isa::amx_fp16 : Isa::amx;
#else
  return Isa::avx512;
#endif
}

}  // namespace fastrnn
