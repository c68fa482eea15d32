// On which cores the members of a team start. A system may wake a thread on the core of the one
// that called it, and moves it to an idle one only some milliseconds later: until then they take
// turns.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

namespace fastrnn {

class StartingCores {
 public:
  // Called by each member as it starts.
  void note() {
    const int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) return;
    const uint64_t bit = uint64_t{1} << core % 64;
    if (taken_[core / 64].fetch_or(bit, std::memory_order_relaxed) & bit) {
      shared_.store(true, std::memory_order_relaxed);
    }
  }

  // Whether two have the same, when all have noted theirs.
  bool shared() const { return shared_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> taken_[CPU_SETSIZE / 64] = {};
  std::atomic<bool> shared_{false};
};

}  // namespace fastrnn
