// What the emulator's CUDA headers call: the device as a kernel sees it, and the launch of a
// kernel.
//
// One fiber a CUDA thread. A fiber runs until it has to wait for others (a barrier, a shuffle, a
// tensor-core operation); then the schedule picks the next. Faults of a kernel are reported on
// stderr with the place in its source, and abort the process.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn_emulator {

constexpr int kWarp = 32;

struct Index {
  unsigned x, y, z;
};

// Where in the kernel's source an operation stands: Where::here() as a default argument is the
// place of the call.
struct Where {
  const char* file;
  int line;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The dynamic shared memory of the current thread's block: as many bytes as were asked for, aligned
// to 128 bytes, filled with NaNs.
unsigned char* shared_memory();

// Barriers. They alone order memory.
void sync_threads(Where where);
void sync_warp(unsigned mask, Where where);
void sync_cluster(Where where);
void sync_grid(Where where);

// Value of a lane of the warp. kind says what `operand` is: a lane, or a distance from one's own.
enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Where where);

// All lanes of the warp meet, at the same operation on the same memory.
void converge(const char* operation, const void* pointer, unsigned stride, Where where);

// d = a b + c for tiles of 16 x 16, spread over the lanes as element_row and element_column say.
void multiply_tiles(float* d, const float* a, const float* b, const float* c, Where where);
constexpr int kTile = 16;
constexpr int kTileElements = kTile * kTile / kWarp;  // of one lane
// The layout of an m16n8 accumulator on hardware, twice.
constexpr int element_row(int lane, int i) { return lane / 4 + 8 * (i / 4); }
constexpr int element_column(int lane, int i) { return lane % 4 * 2 + 8 * (i / 2 % 2) + i % 2; }
int lane();

[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Runs run(context) for every thread of a grid, whose limits have been checked.
struct Grid {
  Index blocks, threads;
  size_t shared_bytes;
  size_t cluster;  // blocks along x that are one; 1: none
  bool cooperative;
  void (*run)(const void* context);
  const void* context;
};
void run_grid(const Grid& grid);

// The emulated device, by default an H100, and how it runs. Each is set by an environment variable,
// FASTRNN_EMULATED_ and its name in capitals, or by fastrnn_emulator_set.
enum class Schedule {
  round_robin,  // threads in turn, across all blocks
  block_first,  // a block as far as it gets
  warp_first,   // a warp as far as it gets
  random        // any thread, any order of blocks, by `seed`
};
struct Settings {
  long long sms = 132;
  long long shared = 227 * 1024;  // bytes that a block may ask for
  long long capability = 90;
  long long cooperative = 1;  // whether the device can
  long long load_error = 0;   // what loading a kernel's code gives, a cudaError
  Schedule schedule = Schedule::round_robin;
  long long seed = 0;
  // Clusters (or blocks) that run at the same time where the launch is not cooperative; 0: 4 under
  // the random schedule, else 1.
  long long resident = 0;
};
Settings& settings();

}  // namespace fastrnn_emulator

// Sets what `name` says, as in FASTRNN_EMULATED_SMS=4 or ..._SCHEDULE=random; 0, or -1 if there is
// no such name or value.
extern "C" int fastrnn_emulator_set(const char* name, const char* value);
