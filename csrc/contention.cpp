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

constexpr int kRest = 10;  // for so many times the loss
// No more counts: a process that was stopped for minutes found no other work on its cores.
constexpr Clock::duration kMostLoss = std::chrono::milliseconds(100);

// Until when cores count as contended, in the clock's ticks; 0 if they never were.
std::atomic<Clock::rep> contended_until{0};
std::atomic<bool> heeding{true};

Clock::duration used_by_thread() {
  timespec used{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
  return std::chrono::seconds(used.tv_sec) + std::chrono::nanoseconds(used.tv_nsec);
}

}  // namespace

bool cores_contended() {
  const Clock::rep until = contended_until.load(std::memory_order_relaxed);
  return until != 0 && heeding.load(std::memory_order_relaxed) &&
         Clock::now().time_since_epoch().count() < until;
}

void heed_contention(bool heeds) { heeding.store(heeds, std::memory_order_relaxed); }

ContentionWatch::ContentionWatch(Clock::time_point called)
    : called_(called), used_before_(used_by_thread()) {}

ContentionWatch::~ContentionWatch() {
  const Clock::time_point now = Clock::now();
  const Clock::duration passed = now - called_;
  if (passed < kLeastLoss) return;  // saves the system call
  const Clock::duration used = used_by_thread() - used_before_;
  if (used == Clock::duration::zero()) return;  // a clock of ticks longer than this
  const Clock::duration lost = passed - used;
  if (lost < kLeastLoss || lost < passed / kLeastShare) return;
  const Clock::duration counted = std::min(lost, kMostLoss);
  const Clock::rep until = (now + kRest * counted).time_since_epoch().count();
  Clock::rep known = contended_until.load(std::memory_order_relaxed);
  while (known < until && !contended_until.compare_exchange_weak(known, until)) {
  }
}

}  // namespace fastrnn
