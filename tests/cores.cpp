// Prints for each of some series of calls whether cores count as contended after it, and for how
// many calls they count as distant once that was measured. Built and run by test_cores.py.
#include "../csrc/contention.h"

#include <sched.h>

#include <cstdio>
#include <functional>
#include <thread>

#include "../csrc/distance.h"

namespace {

using namespace fastrnn;
using namespace std::chrono_literals;
using Clock = ContentionWatch::Clock;
using Duration = Clock::duration;

void rest(Duration duration) { std::this_thread::sleep_for(duration); }

void compute(Duration duration) {
  for (const auto begin = Clock::now(); Clock::now() - begin < duration;) {
  }
}

// A call on one thread, which other work keeps from its core.
void call_that_loses(Duration lost) {
  ContentionWatch watch;
  const ContentionWatch::Thread watched(watch);
  compute(100us);
  rest(lost);
}

// Runs body(member) on two threads of one core.
void run_on_one_core(const std::function<void(const Member&)>& body) {
  cpu_set_t allowed, one;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof(one), &one);  // which the thread inherits
  Barrier barrier;
  std::thread other([&] { body({1, 2, &barrier}); });
  body({0, 2, &barrier});
  other.join();
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

// A call whose threads start on one core.
void call_on_one_core(const std::function<void()>& work) {
  ContentionWatch watch;
  run_on_one_core([&](const Member& member) {
    const ContentionWatch::Thread watched(watch);
    member.wait();
    work();
  });
}

void print_contended(const char* name, const std::function<void()>& calls) {
  while (cores_contended()) rest(5ms);
  rest(50ms);
  calls();
  std::printf("%s %d\n", name, cores_contended());
}

void print_distant() {
  run_on_one_core([](const Member& member) { measure_distance(member); });
  rest(50ms);  // until it is no longer known
  int calls = 0;
  while (cores_distant()) ++calls;
  std::printf("calls_that_heed_distance %d\n", calls);
}

}  // namespace

int main() {
  print_contended("one_loss", [] { call_that_loses(5ms); });
  print_contended("losses_in_a_row", [] {
    call_that_loses(5ms);
    call_that_loses(5ms);
  });
  print_contended("losses_apart", [] {
    call_that_loses(5ms);
    rest(30ms);
    call_that_loses(5ms);
  });
  print_contended("one_call_on_one_core", [] { call_on_one_core([] { compute(15ms); }); });
  print_contended("short_calls_on_one_core", [] {
    for (int i = 0; i < 200; ++i) call_on_one_core([] { compute(100us); });
  });
  print_contended("losses_on_one_core", [] {
    call_on_one_core([] { compute(100us), rest(15ms); });
    rest(4ms);
    call_on_one_core([] { compute(100us), rest(15ms); });
  });
  print_distant();
}
