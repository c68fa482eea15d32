// A team of threads from torch's own pool that run together and can wait for each other.
#pragma once

#include <ATen/Parallel.h>
#include <sched.h>

#include <atomic>

namespace fastrnn {

// Spins briefly, then yields: on a machine with more threads than cores a wait is slower, never
// stuck.
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
    for (int i = 0; generation_.load(std::memory_order_acquire) == generation; ++i) {
      if (i < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int kSpins = 2000;  // some 20 us on the reference machine

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
    const int64_t units = (count + unit - 1) / unit;
    return {std::min(count, units * index / size * unit),
            std::min(count, units * (index + 1) / size * unit)};
  }
};

// Calls body(Member) on at most `threads` threads at the same time. The pool may give fewer, so the
// size of the team is known only inside; body must not throw.
template <typename Body>
void run_team(int threads, const Body& body) {
  if (threads <= 1) {
    body(Member{0, 1, nullptr});
    return;
  }
  Barrier everyone;
  std::atomic<int> seats{0}, members{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int index = members.fetch_add(1);
    seats.fetch_add(static_cast<int>(end - begin));
    for (int i = 0; seats.load() < threads; ++i) {
      if (i < Barrier::kSpins) {
        Barrier::pause();
      } else {
        sched_yield();
      }
    }
    body(Member{index, members.load(), &everyone});
  });
}

}  // namespace fastrnn
