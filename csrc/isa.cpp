#include "isa.h"

#include <ATen/Version.h>

namespace fastrnn {
namespace {

Isa active_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0 && find_kernels<float>(Isa::avx512)) {
      return find_avx512_extension();
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

std::vector<std::string> amx_dtypes() {
  if (active_isa() < Isa::amx) return {};
  if (active_isa() == Isa::amx) return {"bfloat16"};
  return {"bfloat16", "float16"};
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
