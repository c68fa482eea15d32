#include "contention.h"

#include <time.h>

#include <algorithm>
#include <mutex>

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

std::atomic<Clock::rep> contended_until{0};  // 0: they never were
std::atomic<bool> heeding{true};

// Guards what follows. A call that finds it taken notes nothing: what it would add is known, and a
// process that was forked meanwhile must not wait.
std::mutex noting;
Clock::time_point lost_until;                  // when the last call that lost ended
Clock::time_point shared_since, shared_until;  // calls whose threads shared a core

void count_as_contended(Clock::time_point until) {
  if (contended_until < ticks(until)) contended_until = ticks(until);
}

Clock::duration used_by_thread() {
  timespec used{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
}

// Notes a call that lost so much. It counts if another did shortly before, or cores were contended
// until then.
void note_loss(Clock::time_point called, Clock::time_point ended, Clock::duration lost) {
  const Clock::rep before = std::max(ticks(lost_until), contended_until.load());
  lost_until = ended;
  if (ticks(called - kAgain) > before) return;
  count_as_contended(ended + kRest * std::min(lost, kMostLoss));
}

// Notes a call whose threads started on one core. If calls have done so for longer than an idle
// core stays idle, others want the cores.
void note_shared_core(Clock::time_point called, Clock::time_point ended) {
  if (called - kPause > shared_until) shared_since = called;
  shared_until = ended;
  if (called - kShared > shared_since) count_as_contended(ended + kRest * kShared);
}

}  // namespace

bool cores_contended() {
  const Clock::rep until = contended_until.load(std::memory_order_relaxed);
  return until != 0 && heeding.load(std::memory_order_relaxed) && ticks(Clock::now()) < until;
}

void heed_contention(bool heeds) { heeding.store(heeds, std::memory_order_relaxed); }

ContentionWatch::Thread::Thread(ContentionWatch& watch)
    : watch_(watch), used_before_(used_by_thread()) {
  watch.cores_.note();
}

ContentionWatch::Thread::~Thread() {
  const Clock::duration passed = Clock::now() - watch_.called_;
  if (passed < kLeastLoss) return;  // saves the system call
  const Clock::duration used = used_by_thread() - used_before_;
  if (used == Clock::duration::zero()) return;  // a clock of ticks longer than this
  const Clock::duration lost = passed - used;
  if (lost < kLeastLoss || lost < passed / kLeastShare) return;
  Clock::rep most = watch_.lost_;
  while (most < lost.count() && !watch_.lost_.compare_exchange_weak(most, lost.count())) {
  }
}

ContentionWatch::~ContentionWatch() {
  const Clock::duration lost(lost_.load());
  if (lost == Clock::duration::zero() && !shares_core()) return;
  const std::unique_lock<std::mutex> lock(noting, std::try_to_lock);
  if (!lock) return;
  const Clock::time_point ended = Clock::now();
  if (shares_core()) note_shared_core(called_, ended);
  // Threads that take turns lose time to each other.
  const bool takes_turns = shares_core() && ended - called_ < kShared;
  if (lost > Clock::duration::zero() && !takes_turns) note_loss(called_, ended, lost);
}

}  // namespace fastrnn
