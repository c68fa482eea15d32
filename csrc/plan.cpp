#include "plan.h"

#include <ATen/Version.h>

#include <algorithm>

namespace fastrnn {
namespace {

// Work for which another thread pays: about 10 us of it, against a few to wake the thread.
constexpr double kFlopsPerThread = 1e6;

// Work of one step for which splitting its hidden units pays: it costs a barrier, below 1 us.
constexpr double kFlopsPerBarrier = 1.5e5;

// Rows of a thread below which tiles are so thin that splitting hidden units is better.
constexpr int64_t kRowsPerThread = 4;

}  // namespace

static Isa active_isa() {
  static const Isa isa = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0 && find_kernels<float>(Isa::avx512)) {
#if defined(__x86_64__)
      if (__builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
      return Isa::avx512;
    }
    if (capability.rfind("AVX", 0) == 0 && find_kernels<float>(Isa::avx2)) return Isa::avx2;
    return Isa::baseline;
  }();
  return isa;
}

std::string cpu_capability() {
  switch (active_isa()) {
    case Isa::avx512_bf16:
    case Isa::avx512: return "AVX512";
    case Isa::avx2: return "AVX2";
    default: return "DEFAULT";
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

int thread_count(double flops) {
  if (at::in_parallel_region()) return 1;
  return static_cast<int>(std::clamp<double>(flops / kFlopsPerThread, 1, at::get_num_threads()));
}

Plan make_plan(int threads, const Stack& stack, int64_t directions, int64_t panels) {
  if (threads == 1) return {1, 1, 1};
  // One step without a projection needs no barrier, and each weight is then one thread's to pack.
  const bool free_barrier = stack.steps == 1 && !stack.projected;
  if (!free_barrier && stack.batch >= kRowsPerThread * threads) return {1, threads, 1};
  if (directions == 2 && threads % 2 == 0) {
    Plan plan = make_plan(threads / 2, stack, 1, panels);
    plan.direction_groups = 2;
    return plan;
  }
  const double step_flops = 2. * stack.batch * stack.gates() * stack.width;
  if (!stack.projected && panels >= threads && (free_barrier || step_flops >= kFlopsPerBarrier)) {
    return {1, 1, threads};
  }
  return {1, static_cast<int>(std::min<int64_t>(threads, stack.batch)), 1};
}

std::pair<int64_t, int64_t> split_rows(const Stack& stack, int parts, int part) {
  if (!stack.packed) return {stack.batch * part / parts, stack.batch * (part + 1) / parts};
  int64_t t = stack.steps - 1, work = 0, begin = 0;
  int current = 0;  // the part that row n is in
  for (int64_t n = 0; n < stack.batch; ++n) {
    while (n >= stack.batch_sizes[t]) --t;
    work += t + 1;
    while (current < parts - 1 && work * parts >= stack.rows * (current + 1)) {
      if (current == part) return {begin, n + 1};
      begin = n + 1;
      ++current;
    }
  }
  return {current == part ? begin : stack.batch, stack.batch};
}

void GroupBarrier::wait(void* self) {
  auto* group = static_cast<GroupBarrier*>(self);
  group->barrier.wait(group->size);
}

}  // namespace fastrnn
