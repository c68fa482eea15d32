// The threads, warps and blocks that run now.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "ready.h"

namespace fastrnn_emulator {

struct Thread;
struct Block;

// What a thread waits in.
struct Operation {
  const char* name;
  Where where;
  unsigned mask;        // of a warp's operation
  const void* pointer;  // and what else all lanes have to agree on
  unsigned stride;
  bool aligned;  // whether all have to be at the same place of the source
};

// Threads that wait for each other. Its address stands for the order of memory that it makes.
struct Meeting {
  Operation operation;
  Thread *first = nullptr, *last = nullptr;
  size_t arrived = 0, leaving = 0;

  explicit Meeting(const Operation& o) : operation(o) {}
  static void* operator new(size_t bytes) { return allocate_unseen(bytes); }
  static void operator delete(void* memory) { free_unseen(memory); }
};

struct Warp {
  size_t number = 0;
  Thread* lanes[kWarp] = {};
  unsigned existing = 0, exited = 0;
  std::vector<Meeting*> meetings;
};

struct Thread {
  Fiber fiber;
  Index index{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  Thread* next = nullptr;  // in Ready or in a Meeting
  const Meeting* waits = nullptr;
  Where where{};                                         // it waits
  uint64_t bits = 0, result = 0;                         // of a shuffle
  int source = 0;                                        // lane
  const float *a = nullptr, *b = nullptr, *c = nullptr;  // of a product
  float* d = nullptr;

  size_t block_number() const;
  size_t warp_number() const { return warp->number; }
};

// Threads of blocks that may all meet.
struct Gathering {
  size_t threads = 0, exited = 0;
  Meeting* meeting = nullptr;
};

struct Block {
  size_t number = 0;  // among the resident ones
  Gathering* cluster = nullptr;
  Index index{};
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  size_t exited = 0;
  Meeting* meeting = nullptr;
};

inline size_t Thread::block_number() const { return block->number; }

// The blocks that run now.
struct Residents {
  const Grid& grid;
  Ready<Thread> ready;
  std::vector<Block> blocks;
  std::vector<Gathering> clusters;
  Gathering all;
  Fiber host;
};

extern Residents* residents;
extern Thread* current;

// Goes on with the next thread that can run; returns when it is this one's turn again.
void run_next(bool current_ends);

// Reports that all threads wait.
[[noreturn]] void deadlock();

}  // namespace fastrnn_emulator
