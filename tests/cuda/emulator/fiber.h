// Fibers: stacks, and switches between them that the sanitizers know of.
#pragma once

#include <cstddef>

#if defined(FASTRNN_EMULATOR_ASAN) && defined(FASTRNN_EMULATOR_TSAN)
#error "one sanitizer at a time"
#endif

namespace fastrnn_emulator {

struct Stack {
  char* bottom;
  size_t size;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Stack stack{};
  void* sanitizer = nullptr;  // ASan: its fake stack; TSan: its fiber
};

// A stack, the same for the same number. Kept for ever: it is for the next grid, too.
Stack stack(size_t number);

// A fiber that starts in main at the first switch to it. main must first call `entered`, and never
// returns. ThreadSanitizer takes fibers of the same number for one thread.
void create(Fiber& fiber, Stack stack, size_t number, void (*main)());
void entered();
// ThreadSanitizer can tell 8,128 threads apart, and each costs 1 ms (once) and 0.8 MB.
constexpr size_t kDistinctThreads = 2048;

// What the operating system's thread runs on, now.
void adopt(Fiber& fiber);

// Orders nothing for ThreadSanitizer. A fiber that ends is never switched to again.
void switch_fiber(Fiber& from, Fiber& to, bool from_ends);

// What happened before `release` happened before what follows `acquire` of the same object, for
// ThreadSanitizer; its address is forgotten when it is freed.
void release(void* object);
void acquire(void* object);

// Memory of the emulator's own, which any fiber may allocate and free unseen by ThreadSanitizer.
void* allocate_unseen(size_t bytes);
void free_unseen(void* memory);

// Memory filled with 0xFF whose end AddressSanitizer guards; aligned to 128 bytes.
unsigned char* allocate_guarded(size_t bytes);
void free_guarded(unsigned char* memory, size_t bytes);

}  // namespace fastrnn_emulator
