// A team of threads from torch's own pool that run together.
#pragma once

#include <ATen/Parallel.h>

#include <cfenv>

#include "barrier.h"
#include "contention.h"
#include "distance.h"

// A pool that keeps one caller's tasks waiting for another's would leave both teams incomplete.
#if !AT_PARALLEL_OPENMP
#error "fastrnn needs a torch whose threads are OpenMP's"
#endif

namespace fastrnn {

// Computes as another thread does, with its rounding and its handling of denormals: each thread has
// settings of its own, and those of a pool's are as old as the pool.
class FloatingPointOf {
 public:
  explicit FloatingPointOf(const std::fenv_t& other) {
    std::fegetenv(&own_);
    std::fesetenv(&other);
  }
  ~FloatingPointOf() { std::fesetenv(&own_); }
  FloatingPointOf(const FloatingPointOf&) = delete;
  FloatingPointOf& operator=(const FloatingPointOf&) = delete;

 private:
  std::fenv_t own_;
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
  std::fenv_t callers;
  std::fegetenv(&callers);
  ContentionWatch watch;
  const bool measures = distance_wanted(watch.called());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const ContentionWatch::Thread watched(watch);
    const FloatingPointOf caller(callers);
    members.fetch_add(1);
    seats.fetch_add(static_cast<int>(end - begin));
    wait_until([&] { return seats.load() >= threads; });
    // The same threads, on the same cores, get the same parts of one call after the other.
    const Member member{at::get_thread_num(), members.load(), &everyone};
    // How far apart threads are that take turns on a core is not known before they part.
    if (measures && !watch.shares_core()) measure_distance(member);
    body(member);
  });
}

}  // namespace fastrnn
