// Other work on the cores of a team. A thread that shares its core is late by a turn of the other,
// milliseconds, and with it all that wait for it: where that may be at each step, one thread alone
// is faster. So teams watch for it.
#pragma once

#include <chrono>

namespace fastrnn {

// Whether teams have lately lost time to other work, two of them shortly one after the other, or
// had to share a core: for ten times as long as they lost, so that to find out whether it still is
// so costs a tenth at most; for a second at most, if nothing more is lost.
bool cores_contended();

// Whether calls heed that: they do, unless tests want several threads on a busy machine too.
void heed_contention(bool heeds);

// On a thread of a team, as long as it takes part: notes what the thread has lost to other work,
// if that is more than chance.
class ContentionWatch {
 public:
  using Clock = std::chrono::steady_clock;

  // called: when the team was called together.
  explicit ContentionWatch(Clock::time_point called);
  ~ContentionWatch();
  // Members of the team take turns on a core: what they lose to each other is not lost.
  void shares_core() { shares_core_ = true; }
  ContentionWatch(const ContentionWatch&) = delete;
  ContentionWatch& operator=(const ContentionWatch&) = delete;

 private:
  const Clock::time_point called_;
  const Clock::duration used_before_;  // of the processor, by this thread
  bool shares_core_ = false;
};

}  // namespace fastrnn
