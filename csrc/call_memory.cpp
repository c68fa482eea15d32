#include "call_memory.h"

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstdint>
#include <utility>

namespace fastrnn {
namespace {

Block& kept() {
  static thread_local Block block;
  return block;
}

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

CallMemory::CallMemory(size_t bytes, bool keeps)
    : keeps_(keeps), block_(std::exchange(kept(), {})) {
  if (block_.bytes >= bytes) return;
  block_ = {};  // freed before there is another
  block_ = {c10::GetCPUAllocator()->allocate(bytes), bytes};
  ask_for_huge_pages(block_.data.get(), bytes);
}

CallMemory::~CallMemory() {
  if (keeps_ && block_.bytes <= kMostKept) kept() = std::move(block_);
}

void CallMemory::release() { kept() = {}; }

}  // namespace fastrnn
