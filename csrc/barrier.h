// Threads that run together and wait for each other; no torch header, so that tests can run the
// kernels without torch.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <utility>

#include "sizes.h"

namespace fastrnn {

constexpr int kSpins = 2000;  // 20 us on a Zen 4, 46 on a Zen 5

// for_a_turn: until the thread that it waited for had had its turn on this core.
enum class Waited { spinning, for_a_turn, for_long };

// Spins briefly, then yields, then sleeps, until the condition holds: on a machine with more
// threads than cores a wait is slower, never stuck. A thread of real-time priority yields to its
// like alone, so unless it slept, one that it waits for might never run. Returns how it waited.
template <typename Condition>
Waited wait_until(const Condition& holds, int spins = kSpins) {
  constexpr int kYields = 20000;  // 5 to 10 ms: to wake from a sleep takes longer than most waits
  // Other work than what is waited for takes milliseconds, each time.
  constexpr int kYieldsOfTurn = 2;
  constexpr auto kTurn = std::chrono::microseconds(300);
  for (int i = 0; i < spins; ++i) {
    if (holds()) return Waited::spinning;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const auto begin = std::chrono::steady_clock::now();
  int yields = 0;
  while (!holds()) {
    if (yields < kYields) {
      sched_yield();
      ++yields;
    } else {
      const timespec while_others_run{0, 50'000};
      nanosleep(&while_others_run, nullptr);
    }
  }
  const bool turn = yields <= kYieldsOfTurn && std::chrono::steady_clock::now() - begin < kTurn;
  return turn ? Waited::for_a_turn : Waited::for_long;
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
    const bool turns = takes_turns_.load(std::memory_order_relaxed);
    const Waited waited =
        wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; },
                   turns ? kSpinsOfTurns : kSpins);
    if (waited != Waited::spinning && (waited == Waited::for_a_turn) != turns) {
      takes_turns_.store(!turns, std::memory_order_relaxed);
    }
  }

 private:
  // Threads that take turns on a core, as they may for some milliseconds after they woke, wait for
  // what cannot happen while they spin.
  static constexpr int kSpinsOfTurns = 50;

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  std::atomic<bool> takes_turns_{false};
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
