// Threads that run together and wait for each other; no torch header, so that tests can run the
// kernels without torch.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "sizes.h"

namespace fastrnn {

// Spins briefly, then yields, then sleeps, until the condition holds: on a machine with more
// threads than cores a wait is slower, never stuck. A thread of real-time priority yields to its
// like alone, so unless it slept, one that it waits for might never run.
template <typename Condition>
void wait_until(const Condition& holds) {
  constexpr int kSpins = 2000;    // some 20 us on a Zen 4
  constexpr int kYields = 20000;  // 5 to 10 ms: to wake from a sleep takes longer than most waits
  for (int i = 0; !holds(); ++i) {
    if (i < kSpins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else if (i < kSpins + kYields) {
      sched_yield();
    } else {
      const timespec while_others_run{0, 50'000};
      nanosleep(&while_others_run, nullptr);
      i = kSpins + kYields;  // a long wait does not overflow it
    }
  }
}

class Barrier {
 public:
  // Returns once `size` threads wait; all pass the same size.
  void wait(int size) {
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// One thread of a team.
struct Member {
  int index, size;
  Barrier* everyone;

  void wait() const {
    if (size > 1) everyone->wait(size);
  }

  // This member's part of [0, count), in multiples of `unit`.
  std::pair<int64_t, int64_t> part(int64_t count, int64_t unit = 1) const {
    const int64_t units = divide_up(count, unit);
    return {std::min(count, units * index / size * unit),
            std::min(count, units * (index + 1) / size * unit)};
  }
};

}  // namespace fastrnn
