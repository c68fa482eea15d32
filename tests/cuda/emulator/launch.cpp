// The host side: what a device of these limits accepts, and CUDA's error codes for the rest.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "cuda_runtime.h"

namespace fastrnn_emulator {
namespace {

constexpr long long kSharedByDefault = 48 * 1024;
constexpr long long kThreadsPerBlock = 1024, kThreadsPerMultiprocessor = 2048;
constexpr long long kBlocksPerMultiprocessor = 32;
constexpr long long kSharedOfSystem = 1024;  // of each block, on sm_80 and later
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

constexpr const char* kSchedules[] = {"round_robin", "block_first", "warp_first", "random"};

bool set(Settings& s, const std::string& name, const std::string& value) {
  if (name == "schedule") {
    for (int i = 0; i < 4; ++i) {
      if (value != kSchedules[i]) continue;
      s.schedule = static_cast<Schedule>(i);
      return true;
    }
    return false;
  }
  const std::map<std::string, long long*> numbers = {{"sms", &s.sms},
                                                     {"shared", &s.shared},
                                                     {"capability", &s.capability},
                                                     {"seed", &s.seed},
                                                     {"resident", &s.resident},
                                                     {"cooperative", &s.cooperative},
                                                     {"load_error", &s.load_error}};
  const auto found = numbers.find(name);
  char* end = nullptr;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  if (found == numbers.end() || value.empty() || *end != '\0' || number < 0) return false;
  *found->second = number;
  return true;
}

Settings from_environment() {
  Settings s;
  for (const std::string name : {"sms", "shared", "capability", "cooperative", "load_error",
                                 "schedule", "seed", "resident"}) {
    std::string variable = "FASTRNN_EMULATED_";
    for (const char c : name) variable += static_cast<char>(std::toupper(c));
    const char* const value = std::getenv(variable.c_str());
    if (!value || set(s, name, value)) continue;
    std::fprintf(stderr, "fastrnn emulator: error: %s=%s\n", variable.c_str(), value);
    std::abort();
  }
  return s;
}

std::mutex mutex;  // one launch at a time
std::map<const void*, long long> shared_of_kernels;
std::set<const void*> kernels_with_large_clusters;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

long long shared_limit(const void* kernel) {
  const auto found = shared_of_kernels.find(kernel);
  const long long limit = found == shared_of_kernels.end() ? 0 : found->second;
  return std::min(settings().shared, std::max(limit, kSharedByDefault));
}

long long resident_blocks(long long threads, long long shared_bytes) {
  const long long warps = (threads + kWarp - 1) / kWarp;
  const long long by_shared =
      (settings().shared + kSharedOfSystem) / (shared_bytes + kSharedOfSystem);
  return std::min(
      {kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / (warps * kWarp), by_shared});
}

bool has_clusters() { return settings().capability >= 90; }

// What a launch's attributes say.
struct Together {
  unsigned cluster = 1;  // blocks along x
  bool cooperative = false;
};
cudaError_t read_attributes(const cudaLaunchConfig_t& config, const void* kernel, Together* out) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      out->cooperative = attribute.val.cooperative != 0;
    } else if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& size = attribute.val.clusterDim;
      if (!has_clusters() || size.y != 1 || size.z != 1) return cudaErrorNotSupported;
      const bool large = kernels_with_large_clusters.count(kernel) > 0;
      const unsigned limit = large ? kLargestCluster : kPortableCluster;
      if (size.x == 0 || size.x > limit || config.gridDim.x % size.x != 0) {
        return cudaErrorInvalidClusterSize;
      }
      out->cluster = size.x;
    } else if (attribute.id != cudaLaunchAttributeIgnore) {
      return cudaErrorNotSupported;
    }
  }
  return cudaSuccess;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, bool cooperative) {
  if (!kernel) return cudaErrorInvalidDeviceFunction;
  const dim3 g = config.gridDim, b = config.blockDim;
  const auto within = [](unsigned n, unsigned limit) { return n > 0 && n <= limit; };
  const bool fits = within(g.x, 0x7fffffffu) && within(g.y, 65535) && within(g.z, 65535) &&
                    within(b.x, 1024) && within(b.y, 1024) && within(b.z, 64);
  const long long threads = static_cast<long long>(b.x) * b.y * b.z;
  if (!fits || threads > kThreadsPerBlock) return cudaErrorInvalidConfiguration;
  const auto shared_bytes = static_cast<long long>(config.dynamicSmemBytes);
  if (shared_bytes < 0 || shared_bytes > shared_limit(kernel)) return cudaErrorInvalidValue;
  if (cooperative) {
    if (!settings().cooperative) return cudaErrorNotSupported;
    const auto blocks = static_cast<double>(g.x) * g.y * g.z;
    if (blocks > static_cast<double>(settings().sms * resident_blocks(threads, shared_bytes))) {
      return cudaErrorCooperativeLaunchTooLarge;
    }
  }
  return cudaSuccess;
}

}  // namespace

Settings& settings() {
  static Settings s = from_environment();
  return s;
}

cudaError_t find_code() { return keep(static_cast<cudaError_t>(settings().load_error)); }

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!kernel) return keep(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (!has_clusters()) return keep(cudaErrorNotSupported);
    if (value) {
      kernels_with_large_clusters.insert(kernel);
    } else {
      kernels_with_large_clusters.erase(kernel);
    }
    return cudaSuccess;
  }
  const bool known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (!known || value < 0 || value > settings().shared) return keep(cudaErrorInvalidValue);
  shared_of_kernels[kernel] = value;
  return cudaSuccess;
}

cudaError_t count_blocks(int* blocks, const void* kernel, int threads, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!kernel) return keep(cudaErrorInvalidDeviceFunction);
  if (!blocks || threads <= 0) return keep(cudaErrorInvalidValue);
  const auto bytes = static_cast<long long>(shared_bytes);
  const bool fits = threads <= kThreadsPerBlock && bytes <= shared_limit(kernel);
  *blocks = fits ? static_cast<int>(resident_blocks(threads, bytes)) : 0;
  return cudaSuccess;
}

cudaError_t count_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!clusters || !config) return keep(cudaErrorInvalidValue);
  Together together;
  cudaError_t error = read_attributes(*config, kernel, &together);
  if (error == cudaSuccess) error = check(*config, kernel, false);
  if (error != cudaSuccess) return keep(error);
  const dim3 b = config->blockDim;
  const long long blocks = resident_blocks(static_cast<long long>(b.x) * b.y * b.z,
                                           static_cast<long long>(config->dynamicSmemBytes));
  *clusters = static_cast<int>(settings().sms * blocks / together.cluster);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel,
                   void (*run)(const void* context), const void* context) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!config) return keep(cudaErrorInvalidValue);
  Together together;
  cudaError_t error = read_attributes(*config, kernel, &together);
  if (error == cudaSuccess) error = check(*config, kernel, together.cooperative);
  if (error != cudaSuccess) return keep(error);
  const dim3 g = config->gridDim, b = config->blockDim;
  run_grid({{g.x, g.y, g.z},
            {b.x, b.y, b.z},
            config->dynamicSmemBytes,
            together.cluster,
            together.cooperative,
            run,
            context});
  return cudaSuccess;
}

}  // namespace fastrnn_emulator

using fastrnn_emulator::keep;
using fastrnn_emulator::settings;

int fastrnn_emulator_set(const char* name, const char* value) {
  const std::lock_guard<std::mutex> lock(fastrnn_emulator::mutex);
  return fastrnn_emulator::set(settings(), name, value) ? 0 : -1;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = fastrnn_emulator::last_error;
  fastrnn_emulator::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return fastrnn_emulator::last_error; }

cudaError_t cudaGetDevice(int* device) {
  if (!device) return keep(cudaErrorInvalidValue);
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!value) return keep(cudaErrorInvalidValue);
  if (device != 0) return keep(cudaErrorInvalidDevice);
  const auto answer = [&](long long n) {
    *value = static_cast<int>(n);
    return cudaSuccess;
  };
  namespace emulator = fastrnn_emulator;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return answer(emulator::kThreadsPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlock: return answer(emulator::kSharedByDefault);
    case cudaDevAttrWarpSize: return answer(emulator::kWarp);
    case cudaDevAttrMultiProcessorCount: return answer(settings().sms);
    case cudaDevAttrMaxThreadsPerMultiProcessor: return answer(emulator::kThreadsPerMultiprocessor);
    case cudaDevAttrComputeCapabilityMajor: return answer(settings().capability / 10);
    case cudaDevAttrComputeCapabilityMinor: return answer(settings().capability % 10);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return answer(settings().shared + emulator::kSharedOfSystem);
    case cudaDevAttrCooperativeLaunch: return answer(settings().cooperative != 0);
    case cudaDevAttrClusterLaunch: return answer(emulator::has_clusters());
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return answer(settings().shared);
  }
  return keep(cudaErrorInvalidValue);
}

const char* cudaGetErrorName(cudaError_t error) {
#define FASTRNN_NAME(name) \
  case name: return #name;
  switch (error) {
    FASTRNN_NAME(cudaSuccess)
    FASTRNN_NAME(cudaErrorInvalidValue)
    FASTRNN_NAME(cudaErrorMemoryAllocation)
    FASTRNN_NAME(cudaErrorInvalidConfiguration)
    FASTRNN_NAME(cudaErrorInsufficientDriver)
    FASTRNN_NAME(cudaErrorInvalidDeviceFunction)
    FASTRNN_NAME(cudaErrorNoDevice)
    FASTRNN_NAME(cudaErrorInvalidDevice)
    FASTRNN_NAME(cudaErrorNoKernelImageForDevice)
    FASTRNN_NAME(cudaErrorJitCompilerNotFound)
    FASTRNN_NAME(cudaErrorUnsupportedPtxVersion)
    FASTRNN_NAME(cudaErrorJitCompilationDisabled)
    FASTRNN_NAME(cudaErrorInvalidResourceHandle)
    FASTRNN_NAME(cudaErrorIllegalAddress)
    FASTRNN_NAME(cudaErrorLaunchOutOfResources)
    FASTRNN_NAME(cudaErrorMisalignedAddress)
    FASTRNN_NAME(cudaErrorLaunchFailure)
    FASTRNN_NAME(cudaErrorCooperativeLaunchTooLarge)
    FASTRNN_NAME(cudaErrorNotPermitted)
    FASTRNN_NAME(cudaErrorNotSupported)
    FASTRNN_NAME(cudaErrorInvalidClusterSize)
    FASTRNN_NAME(cudaErrorUnknown)
  }
#undef FASTRNN_NAME
  return "unrecognized error code";
}

// CUDA's has sentences; the names say as much.
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
