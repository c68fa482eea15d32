#include "isa.h"

#include <ATen/Context.h>
#include <ATen/Version.h>

namespace fastrnn {
namespace {

Isa active_isa() {
  static const Isa isa = [] {
    // What torch says may be ATEN_CPU_CAPABILITY's word alone.
    const std::string capability = at::get_cpu_capability();
    const auto takes = [&](Isa isa, const char* name) {
      return capability.rfind(name, 0) == 0 && find_kernels<float>(isa) && processor_has(isa);
    };
    if (takes(Isa::avx512, "AVX512")) return find_avx512_extension();
    if (takes(Isa::avx2, "AVX")) return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
}

}  // namespace

Float32Products float32_products() {
  const at::Context& context = at::globalContext();
  const auto setting = [&](at::Float32Op op) {
    return context.float32Precision(at::Float32Backend::MKLDNN, op);
  };
  at::Float32Precision precision = setting(at::Float32Op::RNN);
  if (precision == at::Float32Precision::NONE) precision = setting(at::Float32Op::MATMUL);
  if (precision == at::Float32Precision::BF16 && find_kernels<MediumFloat>(active_isa())) {
    return Float32Products::one_bfloat16;
  }
  if (precision == at::Float32Precision::TF32 && find_kernels<HighFloat>(active_isa())) {
    return Float32Products::two_bfloat16;
  }
  return Float32Products::float32;
}

std::vector<std::string> matmul_precisions() {
  std::vector<std::string> names;
  if (find_kernels<HighFloat>(active_isa())) names.emplace_back("high");
  if (find_kernels<MediumFloat>(active_isa())) names.emplace_back("medium");
  return names;
}

std::string cpu_capability() {
  switch (active_isa()) {
    case Isa::baseline: return "DEFAULT";
    case Isa::avx2: return "AVX2";
    default: return "AVX512";
  }
}

std::vector<std::string> amx_dtypes() {
  if (active_isa() < Isa::amx) return {};
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
template const Kernels<HighFloat>& kernels<HighFloat>();
template const Kernels<MediumFloat>& kernels<MediumFloat>();

}  // namespace fastrnn
