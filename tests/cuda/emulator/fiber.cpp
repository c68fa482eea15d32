// Compiled without ThreadSanitizer's instrumentation, like all of the emulator: what it does is no
// part of what a kernel does.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(FASTRNN_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(FASTRNN_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64"
#endif

extern "C" void fastrnn_emulator_swap(void** save, void* load);
// Saves what a function must leave as it was, takes the other stack, and returns into its function.
asm(R"(
  .text
  .globl fastrnn_emulator_swap
  .hidden fastrnn_emulator_swap
  .type fastrnn_emulator_swap, @function
fastrnn_emulator_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastrnn_emulator_swap, .-fastrnn_emulator_swap
)");

namespace fastrnn_emulator {
namespace {

constexpr size_t kPage = 4096;
#if defined(FASTRNN_EMULATOR_ASAN) || defined(FASTRNN_EMULATOR_TSAN)
constexpr size_t kStackSize = 256 * 1024;  // sanitizers make frames several times larger
#else
constexpr size_t kStackSize = 64 * 1024;
#endif

#if !defined(MADV_GUARD_INSTALL)
#define MADV_GUARD_INSTALL 102  // Linux 6.13
#endif

[[noreturn]] void out_of_memory(const char* what) {
  std::perror(what);
  std::fprintf(stderr, "fastrnn emulator: no memory for so many threads\n");
  std::abort();
}

void* map(size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) out_of_memory("mmap");
  return memory;
}

Fiber* previous = nullptr;  // of the last switch

// While it lives, TSan sees none of this fiber's reads and writes.
class Unseen {
 public:
#if defined(FASTRNN_EMULATOR_TSAN)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
};

#if defined(FASTRNN_EMULATOR_TSAN)
// Makes TSan forget who used a stack, which is another thread's now: mapping memory anew does so.
// Only the pages in use are mapped, as each costs TSan time.
void forget(Stack stack) {
  unsigned char resident[kStackSize / kPage];
  if (mincore(stack.bottom, stack.size, resident) != 0) out_of_memory("mincore");
  size_t page = 0;
  while (page < stack.size / kPage && !(resident[page] & 1)) ++page;
  const size_t bytes = stack.size - page * kPage;
  if (bytes == 0) return;
  void* const memory = mmap(stack.bottom + page * kPage, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (memory == MAP_FAILED) out_of_memory("mmap");
}
#endif

}  // namespace

Stack stack(size_t number) {
  constexpr size_t kSlot = kStackSize + kPage, kSlots = 256;  // mapped at a time
  static std::vector<char*> slabs;
  while (number >= slabs.size() * kSlots) {
    char* const slab = static_cast<char*>(map(kSlots * kSlot));
    for (size_t i = 0; i < kSlots; ++i) {
      // The first costs no memory area of the kernel's, of which a process may have some 65,000.
      if (madvise(slab + i * kSlot, kPage, MADV_GUARD_INSTALL) != 0 &&
          mprotect(slab + i * kSlot, kPage, PROT_NONE) != 0) {
        out_of_memory("mprotect");
      }
    }
    slabs.push_back(slab);
  }
  const Stack found{slabs[number / kSlots] + number % kSlots * kSlot + kPage, kStackSize};
#if defined(FASTRNN_EMULATOR_TSAN)
  forget(found);
#endif
  return found;
}

void create(Fiber& fiber, Stack stack, [[maybe_unused]] size_t number, void (*main)()) {
  fiber.stack = stack;
  // What fastrnn_emulator_swap pops, main's address, and main's return address: none.
  void** top = reinterpret_cast<void**>(stack.bottom + stack.size) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(main);
  fiber.stack_pointer = top;
#if defined(FASTRNN_EMULATOR_TSAN)
  static std::vector<void*> fibers;
  while (number >= fibers.size()) fibers.push_back(__tsan_create_fiber(0));
  fiber.sanitizer = fibers[number];
#else
  fiber.sanitizer = nullptr;
#endif
}

void adopt([[maybe_unused]] Fiber& fiber) {
#if defined(FASTRNN_EMULATOR_TSAN)
  fiber.sanitizer = __tsan_get_current_fiber();
#endif
}

void entered() {
#if defined(FASTRNN_EMULATOR_ASAN)
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &previous->stack.size);
  previous->stack.bottom = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends) {
  previous = &from;
#if defined(FASTRNN_EMULATOR_ASAN)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.sanitizer, to.stack.bottom,
                                 to.stack.size);
#elif defined(FASTRNN_EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  fastrnn_emulator_swap(&from.stack_pointer, to.stack_pointer);
#if defined(FASTRNN_EMULATOR_ASAN)
  __sanitizer_finish_switch_fiber(from.sanitizer, nullptr, nullptr);
#endif
}

void release([[maybe_unused]] void* object) {
#if defined(FASTRNN_EMULATOR_TSAN)
  __tsan_release(object);
#endif
}

void acquire([[maybe_unused]] void* object) {
#if defined(FASTRNN_EMULATOR_TSAN)
  __tsan_acquire(object);
#endif
}

void* allocate_unseen(size_t bytes) {
  const Unseen unseen;
  void* const memory = std::malloc(bytes);
  if (!memory) out_of_memory("malloc");
  return memory;
}

void free_unseen(void* memory) {
  const Unseen unseen;
  std::free(memory);
}

unsigned char* allocate_guarded(size_t bytes) {
  void* memory = nullptr;
#if defined(FASTRNN_EMULATOR_TSAN)
  memory = map(bytes + kPage);  // which TSan takes for memory no one has used, unlike malloc's
#else
  // Where none was asked for, some of which nothing may be touched.
  if (posix_memalign(&memory, 128, bytes > 0 ? bytes : 128) != 0) out_of_memory("posix_memalign");
#endif
#if defined(FASTRNN_EMULATOR_ASAN)
  if (bytes == 0) __asan_poison_memory_region(memory, 128);
#endif
  std::memset(memory, 0xff, bytes);
  return static_cast<unsigned char*>(memory);
}

void free_guarded(unsigned char* memory, [[maybe_unused]] size_t bytes) {
#if defined(FASTRNN_EMULATOR_TSAN)
  munmap(memory, bytes + kPage);
#else
#if defined(FASTRNN_EMULATOR_ASAN)
  if (bytes == 0) __asan_unpoison_memory_region(memory, 128);
#endif
  std::free(memory);
#endif
}

}  // namespace fastrnn_emulator
