// Which set's kernels serve an element type, and what a processor adds to AVX-512.
#include <cstdlib>
#include <string_view>
#include <type_traits>
#ifdef FASTRNN_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fastrnn {

// table.cpp, compiled for each.
#define DECLARE_TABLE(ISA)          \
  namespace ISA {                   \
  template <typename E>             \
  const Kernels<E>& kernel_table(); \
  }
DECLARE_TABLE(baseline)
#ifdef FASTRNN_X86
DECLARE_TABLE(avx2)
DECLARE_TABLE(avx512)
DECLARE_TABLE(avx512_bf16)
DECLARE_TABLE(amx)
DECLARE_TABLE(amx_fp16)
#endif
#undef DECLARE_TABLE

template <typename E>
const Kernels<E>* find_kernels(Isa isa) {
  switch (isa) {
    case Isa::baseline: return &baseline::kernel_table<E>();
#ifdef FASTRNN_X86
    case Isa::avx2: return &avx2::kernel_table<E>();
    case Isa::avx512: return &avx512::kernel_table<E>();
    // From here on only products of 16-bit numbers differ from avx512's.
    case Isa::avx512_bf16:
      if constexpr (std::is_same_v<E, BFloat16>) return &avx512_bf16::kernel_table<E>();
      return &avx512::kernel_table<E>();
    case Isa::amx:
      if constexpr (std::is_same_v<E, Half>) return &amx::kernel_table<E>();
      [[fallthrough]];
    case Isa::amx_fp16:
      if constexpr (std::is_same_v<E, BFloat16>) return &amx::kernel_table<E>();
      if constexpr (std::is_same_v<E, Half>) return &amx_fp16::kernel_table<E>();
      return &avx512::kernel_table<E>();
#endif
    default: return nullptr;
  }
}

template <>
const Kernels<HighFloat>* find_kernels([[maybe_unused]] Isa isa) {
#ifdef FASTRNN_X86
  if (isa >= Isa::amx) return &amx::kernel_table<HighFloat>();
#endif
  return nullptr;
}

template <>
const Kernels<MediumFloat>* find_kernels([[maybe_unused]] Isa isa) {
#ifdef FASTRNN_X86
  if (isa >= Isa::amx) return &amx::kernel_table<MediumFloat>();
  if (isa == Isa::avx512_bf16) return &avx512_bf16::kernel_table<MediumFloat>();
#endif
  return nullptr;
}

template const Kernels<float>* find_kernels<float>(Isa);
template const Kernels<double>* find_kernels<double>(Isa);
template const Kernels<Half>* find_kernels<Half>(Isa);
template const Kernels<BFloat16>* find_kernels<BFloat16>(Isa);

bool processor_has(Isa isa) {
#ifdef FASTRNN_X86
  if (isa == Isa::baseline) return true;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return isa == Isa::baseline;
#endif
}

Isa find_avx512_extension() {
#ifdef FASTRNN_X86
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
