// Small kernels about rows and steps, and questions to the device.
#include <algorithm>

#include "device.cuh"

namespace fastrnn::cuda {
namespace {

constexpr int kThreads = 256;

// Sizes that travel as a kernel's parameter, of which there may be 4 KB.
constexpr int kChunkSizes = 480;
struct SizeChunk {
  int64_t begin, count, rows_before;
  int64_t sizes[kChunkSizes];
};

// One block. Offsets are summed by each thread for itself: a chunk is short.
__global__ void __launch_bounds__(kThreads)
    fill_schedule_kernel(SizeChunk chunk, int64_t* sizes, int64_t* offsets) {
  for (int64_t i = threadIdx.x; i < chunk.count + is(Mutant::size_past_end); i += blockDim.x) {
    int64_t before = chunk.rows_before;
    for (int64_t k = 0; k < i; ++k) before += chunk.sizes[k];
    sizes[chunk.begin + i] = chunk.sizes[i];
    offsets[chunk.begin + i] = before;
  }
}

// Steps along x, the elements of a step along y.
template <typename E>
__global__ void __launch_bounds__(kThreads) previous_h_kernel(PreviousArgs args) {
  const Walk walk(args.schedule, static_cast<int>(args.direction), /*backward=*/false);
  const E* const h = static_cast<const E*>(args.h);
  const int64_t stride = args.directions * args.width;
  for (int64_t s = blockIdx.x; s < args.schedule.steps; s += gridDim.x) {
    const int64_t count = walk.rows(s) * args.width;
    E* const out = static_cast<E*>(args.previous) + walk.first_row(s) * args.width;
    const int64_t running = walk.rows(s - 1);
    const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    for (int64_t i = first; i < count; i += static_cast<int64_t>(gridDim.y) * blockDim.x) {
      const int64_t n = i / args.width, j = i % args.width;
      out[i] = n < running + is(Mutant::previous_row_past_end)
                   ? h[(walk.first_row(s - 1) + n) * stride + args.direction * args.width + j]
                   : static_cast<const E*>(args.h0)[i];
    }
  }
}

// Whether the error says that a kernel was not compiled for the device, nor can be by its driver.
bool has_no_code(int error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion || error == cudaErrorJitCompilerNotFound ||
         error == cudaErrorJitCompilationDisabled;
}

}  // namespace

int launch_fill_schedule(const int64_t* host_sizes, int64_t steps, int64_t* sizes, int64_t* offsets,
                         Stream stream) {
  int64_t rows = 0;
  for (int64_t begin = 0; begin < steps; begin += kChunkSizes) {
    SizeChunk chunk{begin, std::min<int64_t>(kChunkSizes, steps - begin), rows, {}};
    for (int64_t i = 0; i < chunk.count; ++i) {
      chunk.sizes[i] = host_sizes[begin + i];
      rows += chunk.sizes[i];
    }
    const int error =
        launch(fill_schedule_kernel, dim3(1), kThreads, stream, chunk, sizes, offsets);
    if (error) return error;
  }
  return cudaSuccess;
}

int launch_previous_h(const PreviousArgs& args, Stream stream) {
  constexpr int64_t kMaxBlocks = 65535;  // along y
  const int64_t blocks = divide_up(args.schedule.rows * args.width, kThreads);
  const dim3 grid(static_cast<unsigned>(std::min(args.schedule.steps, kMaxBlocks)),
                  static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  return with_element(args.element, [&](auto element) {
    return launch(previous_h_kernel<decltype(element)>, grid, kThreads, stream, args);
  });
}

int query_device(DeviceLimits* limits) {
  int device = 0, shared = 0, cooperative = 0, clusters = 0, major = 0, minor = 0;
  int error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (!error) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  limits->device = device;
  ask(&limits->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&cooperative, cudaDevAttrCooperativeLaunch);
  ask(&clusters, cudaDevAttrClusterLaunch);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  limits->shared_bytes = shared;
  limits->cooperative = cooperative != 0;
  limits->clusters = clusters != 0;
  limits->capability = 10 * major + minor;
  if (error) return error;
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, fill_schedule_kernel);
  limits->compiled = error == cudaSuccess;
  if (!has_no_code(error)) return error;
  take_error(error);
  return cudaSuccess;
}

bool is_too_large(int error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize;
}

const char* take_error(int error) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fastrnn::cuda
