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

// AVX512, AVX2 or DEFAULT, as ATEN_CPU_CAPABILITY names them.
std::string cpu_capability();

// The dtypes whose products run in a matrix unit.
std::vector<std::string> amx_dtypes();

}  // namespace fastrnn
