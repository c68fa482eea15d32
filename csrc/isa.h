// The instruction set in use: the best that this processor and this build have, or what the
// environment asks for.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastrnn {

// Chosen once.
template <typename E>
const Kernels<E>& kernels();

// What products of float32 are computed from. The setting is torch's, read at each call: mkldnn's
// for RNNs if there is one, else that for matrix products, which set_float32_matmul_precision sets
// too. It counts where this processor has kernels that are faster for it.
enum class Float32Products { float32, two_bfloat16, one_bfloat16 };
Float32Products float32_products();

// The names that torch.set_float32_matmul_precision has for those, where they count.
std::vector<std::string> matmul_precisions();

// AVX512, AVX2 or DEFAULT, as ATEN_CPU_CAPABILITY names them.
std::string cpu_capability();

// The dtypes whose products run in a matrix unit.
std::vector<std::string> amx_dtypes();

}  // namespace fastrnn
