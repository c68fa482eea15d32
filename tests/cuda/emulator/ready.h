// Threads that can run, and the schedule that picks the next.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator.h"

namespace fastrnn_emulator {

// splitmix64. Source: Steele, Lea & Flood (2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t below(uint64_t n) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
  }

 private:
  uint64_t state_;
};

// T has `T* next` for this queue's use, and numbers `block` and `warp` among all resident ones. The
// schedules other than the random one run what can run of a group (all, a block, a warp) in turn,
// before they go on to the next group.
template <typename T>
class Ready {
 public:
  Ready(Schedule schedule, Random& random, size_t blocks, size_t warps)
      : schedule_(schedule),
        random_(random),
        groups_(schedule == Schedule::block_first  ? blocks
                : schedule == Schedule::warp_first ? warps
                                                   : 1) {}

  // No push allocates after this.
  void reserve(size_t threads) { any_.reserve(threads); }

  void push(T* thread) {
    if (schedule_ == Schedule::random) {
      any_.push_back(thread);
      return;
    }
    Group& group = groups_[group_of(*thread)];
    thread->next = nullptr;
    (group.first ? group.last->next : group.first) = thread;
    group.last = thread;
    if (&group != running_ && !group.queued) {
      group.queued = true;
      group.next = nullptr;
      (first_ ? last_->next : first_) = &group;
      last_ = &group;
    }
  }

  // Null if none can run.
  T* pop() {
    if (schedule_ == Schedule::random) {
      if (any_.empty()) return nullptr;
      T*& chosen = any_[random_.below(any_.size())];
      T* const thread = chosen;
      chosen = any_.back();
      any_.pop_back();
      return thread;
    }
    while (!running_ || !running_->first) {
      running_ = first_;
      if (!running_) return nullptr;
      running_->queued = false;
      first_ = running_->next;
    }
    T* const thread = running_->first;
    running_->first = thread->next;
    return thread;
  }

 private:
  struct Group {
    T *first = nullptr, *last = nullptr;
    Group* next = nullptr;
    bool queued = false;  // among those that have threads and wait for their turn
  };

  size_t group_of(const T& thread) const {
    if (schedule_ == Schedule::block_first) return thread.block_number();
    if (schedule_ == Schedule::warp_first) return thread.warp_number();
    return 0;
  }

  const Schedule schedule_;
  Random& random_;
  std::vector<T*> any_;
  std::vector<Group> groups_;
  Group *running_ = nullptr, *first_ = nullptr, *last_ = nullptr;
};

}  // namespace fastrnn_emulator
