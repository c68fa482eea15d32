// Other work on the cores of a team. A thread that shares its core is late by a turn of the other,
// milliseconds, and with it all that wait for it: where that may be at each step, one thread alone
// is faster. So teams watch for it.
#pragma once

#include <atomic>
#include <chrono>

#include "cores.h"

namespace fastrnn {

// Whether teams have lately lost time to other work, two of them shortly one after the other, or
// had to share a core for long: for ten times as long as that, so that to find out whether it still
// is so costs a tenth at most; for a second at most, if nothing more is lost.
bool cores_contended();

// Whether calls heed that: they do, unless tests want several threads on a busy machine too.
void heed_contention(bool heeds);

// Of a team, from when it is called together until all have ended: notes what it has lost to other
// work, if that is more than chance.
class ContentionWatch {
 public:
  using Clock = std::chrono::steady_clock;

  // On a thread of the team, as long as it takes part.
  class Thread {
   public:
    explicit Thread(ContentionWatch& watch);
    ~Thread();
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;

   private:
    ContentionWatch& watch_;
    const Clock::duration used_before_;  // of the processor
  };

  ContentionWatch() = default;
  ~ContentionWatch();
  ContentionWatch(const ContentionWatch&) = delete;
  ContentionWatch& operator=(const ContentionWatch&) = delete;

  Clock::time_point called() const { return called_; }
  // Whether two threads started on one core, when all have.
  bool shares_core() const { return cores_.shared(); }

 private:
  const Clock::time_point called_ = Clock::now();
  StartingCores cores_;
  std::atomic<Clock::rep> lost_{0};  // the most of a thread, in the clock's ticks
};

}  // namespace fastrnn
