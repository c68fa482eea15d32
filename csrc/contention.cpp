#include "contention.h"

#include <time.h>

#include <algorithm>
#include <atomic>

namespace fastrnn {
namespace {

using Clock = ContentionWatch::Clock;

// Less is lost now and then on any machine.
constexpr Clock::duration kLeastLoss = std::chrono::milliseconds(1);
constexpr int kLeastShare = 8;  // of the time, one part of so many

// One call may lose a tick of the system's clock, to a thread that has yet to wake. Who shares a
// core with other work loses one every few milliseconds.
constexpr Clock::duration kAgain = std::chrono::milliseconds(10);

constexpr int kRest = 10;  // for so many times the loss
// No more counts: a process that was stopped for minutes found no other work on its cores.
constexpr Clock::duration kMostLoss = std::chrono::milliseconds(100);

// Threads that woke on one core are 4 to 8 ms later on two, if there is an idle one.
constexpr Clock::duration kShared = std::chrono::milliseconds(12);
// Calls further apart than this may each wake their threads.
constexpr Clock::duration kPause = std::chrono::milliseconds(2);

// Times are in the clock's ticks.
Clock::rep ticks(Clock::time_point time) { return time.time_since_epoch().count(); }

std::atomic<Clock::rep> contended_until{0};                // 0: they never were
std::atomic<Clock::rep> lost_called{0}, lost_ended{0};     // the last call that lost
std::atomic<Clock::rep> shared_since{0}, shared_until{0};  // calls whose members shared a core
std::atomic<bool> heeding{true};

void count_as_contended(Clock::time_point until) {
  Clock::rep known = contended_until.load(std::memory_order_relaxed);
  while (known < ticks(until) && !contended_until.compare_exchange_weak(known, ticks(until))) {
  }
}

Clock::duration used_by_thread() {
  timespec used{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
}

// Notes a call that lost. Whether another did shortly before, or cores were contended until then.
bool lost_again(Clock::time_point called, Clock::time_point ended) {
  const Clock::rep other = lost_called.exchange(ticks(called));
  const Clock::rep before = std::max(lost_ended.exchange(ticks(ended)), contended_until.load());
  return other != ticks(called) && ticks(called - kAgain) < before;
}

// Notes a call whose members shared a core. If calls do so for longer than an idle core stays idle,
// others want the cores.
void note_shared_core(Clock::time_point called, Clock::time_point ended) {
  const Clock::rep before = shared_until.exchange(ticks(ended));
  if (ticks(called - kPause) > before) shared_since = ticks(called);
  if (ticks(ended - kShared) > shared_since) count_as_contended(ended + kRest * kShared);
}

}  // namespace

bool cores_contended() {
  const Clock::rep until = contended_until.load(std::memory_order_relaxed);
  return until != 0 && heeding.load(std::memory_order_relaxed) && ticks(Clock::now()) < until;
}

void heed_contention(bool heeds) { heeding.store(heeds, std::memory_order_relaxed); }

ContentionWatch::ContentionWatch(Clock::time_point called)
    : called_(called), used_before_(used_by_thread()) {}

ContentionWatch::~ContentionWatch() {
  const Clock::time_point now = Clock::now();
  if (shares_core_) {
    note_shared_core(called_, now);
    return;
  }
  const Clock::duration passed = now - called_;
  if (passed < kLeastLoss) return;  // saves the system call
  const Clock::duration used = used_by_thread() - used_before_;
  if (used == Clock::duration::zero()) return;  // a clock of ticks longer than this
  const Clock::duration lost = passed - used;
  if (lost < kLeastLoss || lost < passed / kLeastShare) return;
  if (!lost_again(called_, now)) return;
  const Clock::duration counted = std::min(lost, kMostLoss);
  count_as_contended(now + kRest * counted);
}

}  // namespace fastrnn
