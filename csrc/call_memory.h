// The working memory of a call on a CPU.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace fastrnn {

// Asks for huge pages: touching new memory in pages of 4 KB costs some 2 us a page in a virtual
// machine, more than the work done there.
void ask_for_huge_pages(void* data, size_t bytes);

struct Block {
  at::DataPtr data;
  size_t bytes = 0;
};

// Uninitialised memory. After inference the calling thread keeps it for its next call: memory new
// in each call would be touched for the first time there, and be in no cache. Not after a training
// pass, during whose backward pass much else is held. No call reads what another wrote.
class CallMemory {
 public:
  static constexpr size_t kMostKept = size_t{64} << 20;  // bytes, by a thread

  CallMemory(size_t bytes, bool keeps);
  ~CallMemory();
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  void* data() const { return block_.data.get(); }

  // Frees what this thread keeps.
  static void release();

 private:
  const bool keeps_;
  Block block_;
};

}  // namespace fastrnn
