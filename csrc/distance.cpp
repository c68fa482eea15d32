#include "distance.h"

#include <algorithm>
#include <atomic>

#include "contention.h"

namespace fastrnn {
namespace {

using Clock = std::chrono::steady_clock;

// Cores are distant if a barrier takes longer than this for each member. One of two takes 50 to 60
// ns where they are near, 290 to 330 where they are not (Zen 5).
constexpr Clock::duration kDistant = std::chrono::nanoseconds(100);
constexpr int kMeasurements = 3;  // the fastest counts, as anything may delay a thread
constexpr int kBarriers = 3;

// What was measured counts for so long. One takes two threads 0.5 us, 3 where cores are distant.
constexpr Clock::duration kKnown = std::chrono::milliseconds(20);
// If it was that cores are distant, it also counts for so many calls after that: a caller who comes
// seldom would else measure each time, and never heed it.
constexpr int kCalls = 16;

std::atomic<bool> distant{false};
std::atomic<Clock::rep> measured{0};  // when, in the clock's ticks
std::atomic<int> calls{0};            // that heeded it since it was no longer known
std::atomic<int> assumed{-1};         // 0 or 1, if it is not to count

bool is_known(Clock::time_point now) {
  return now.time_since_epoch() <
         Clock::duration(measured.load(std::memory_order_relaxed)) + kKnown;
}

}  // namespace

bool cores_distant() {
  const int instead = assumed.load(std::memory_order_relaxed);
  if (instead >= 0) return instead;
  return distant.load(std::memory_order_relaxed) &&
         (is_known(Clock::now()) || calls.fetch_add(1, std::memory_order_relaxed) < kCalls);
}

std::optional<bool> measured_distant() {
  if (!is_known(Clock::now())) return std::nullopt;
  return distant.load(std::memory_order_relaxed);
}

void assume_distant(std::optional<bool> value) {
  assumed.store(value.has_value() ? *value : -1, std::memory_order_relaxed);
}

bool distance_wanted(Clock::time_point now) { return !is_known(now) && !cores_contended(); }

void measure_distance(const Member& member) {
  if (member.size == 1) return;
  // A barrier alone takes who comes last no time, so several in turn are one measurement.
  Clock::duration fastest = Clock::duration::max();
  member.wait();
  for (int i = 0; i < kMeasurements; ++i) {
    const Clock::time_point begin = Clock::now();
    for (int j = 0; j < kBarriers; ++j) member.wait();
    fastest = std::min(fastest, (Clock::now() - begin) / kBarriers);
  }
  if (member.index > 0) return;
  distant.store(fastest > member.size * kDistant, std::memory_order_relaxed);
  measured.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  calls.store(0, std::memory_order_relaxed);
}

}  // namespace fastrnn
