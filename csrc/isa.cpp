#include "isa.h"

#include <ATen/Version.h>

#include <cstdlib>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrnn {
namespace {

// The best of those that go beyond AVX-512. FASTRNN_AMX=0 leaves the matrix unit alone.
Isa find_extension() {
#if defined(__x86_64__) && defined(__linux__)
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of edx, leaf 7
  constexpr unsigned kFloat16 = 1u << 21;                     // of eax, leaf 7, subleaf 1
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const char* const wish = std::getenv("FASTRNN_AMX");
  const bool wanted = !wish || std::string(wish) != "0";
  if (!wanted || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBFloat16) ||
      !(edx & kTile)) {
    return Isa::avx512_bf16;
  }
  // Linux gives a process the tiles' 8 KB of state when it asks for them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return Isa::avx512_bf16;
  const bool float16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kFloat16);
  return float16 ? Isa::amx_fp16 : Isa::amx;
#else
  return Isa::avx512;
#endif
}

Isa active_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0 && find_kernels<float>(Isa::avx512)) {
      return find_extension();
    }
    if (capability.rfind("AVX", 0) == 0 && find_kernels<float>(Isa::avx2)) return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
}

}  // namespace

std::string cpu_capability() {
  switch (active_isa()) {
    case Isa::baseline: return "DEFAULT";
    case Isa::avx2: return "AVX2";
    default: return "AVX512";
  }
}

template <typename E>
const Kernels<E>& kernels() {
  return *find_kernels<E>(active_isa());
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<Half>& kernels<Half>();
template const Kernels<BFloat16>& kernels<BFloat16>();

}  // namespace fastrnn
