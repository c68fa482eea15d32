// Working memory of a run, in parts.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include "barrier.h"
#include "call_memory.h"
#include "sizes.h"

namespace fastrnn {

// Hands out parts of one allocation, a guard behind each: what a kernel needs is worked out apart
// from the kernel, and a write past it would otherwise be found, if ever, by another library.
template <typename T>
class Arena {
 public:
  struct Part {
    T** pointer;
    int64_t elements;
  };
  using Parts = c10::SmallVector<Part, 16>;

  // Leaves each part's memory in its pointer.
  Arena(const Parts& parts, bool keeps) : memory_(bytes(parts), keeps) {
    T* next = static_cast<T*>(memory_.data());
    for (const Part& part : parts) {
      *part.pointer = next;
      next += padded(part.elements);
      guards_.push_back(reinterpret_cast<uint64_t*>(next));
      *guards_.back() = kGuard;
      next += kLine;
    }
  }
  // Raises c10::Error if a guard was overwritten.
  void check() const {
    for (const uint64_t* guard : guards_) {
      TORCH_INTERNAL_ASSERT(*guard == kGuard, "fastrnn: a kernel wrote past its working memory");
    }
  }
  // Parts start on cache lines.
  static constexpr int64_t padded(int64_t elements) { return round_up(elements, kLine); }
  // A member's own of a part that the team shares out, of whatever size the team is.
  static T* share_of(const Member& member, T* part, int64_t elements) {
    return part + member.index * (elements / member.size / kLine * kLine);
  }

 private:
  static size_t bytes(const Parts& parts) {
    int64_t total = 0;
    for (const Part& part : parts) total += padded(part.elements) + kLine;
    return static_cast<size_t>(total) * sizeof(T);
  }

  static constexpr int64_t kLine = 16;  // elements: a cache line of floats, two of doubles
  static constexpr uint64_t kGuard = 0x7ff4f00dfeedbeef;
  CallMemory memory_;
  c10::SmallVector<uint64_t*, 16> guards_;
};

}  // namespace fastrnn
