// The CUDA kernels' interface: raw pointers to device memory, sizes and a stream; no tensor, no
// header of torch's or CUDA's.
//
// Dimensions: D directions, T time, N batch, H hidden, P width of h (the projection, else H), G
// gate rows (4H for LSTM, H for Elman); "rows" is all steps' rows together, step after step. All
// arrays are contiguous. E is the element type; C is what sums, c and their gradients are kept in:
// double for float64, else float.
//
// Every launcher returns 0 or a cudaError_t, which take_error names; none waits for the device.
#pragma once

#include <cstdint>

#include "../cell_math.h"
#include "../schedule.h"

struct CUstream_st;  // *CUstream_st is CUDA's cudaStream_t

namespace fastrnn::cuda {

using Stream = CUstream_st*;

enum class Element : int { f32, f64, f16, bf16 };

constexpr int kDirections = 2;  // at most

// One layer, all its directions, forward. The input projection is computed before.
struct ForwardArgs {
  Element element;
  Cell cell;
  int64_t directions;
  Schedule schedule;  // sizes and offsets in device memory
  int64_t rows;       // of all steps together
  int64_t hidden;
  const void* input_products;     // (D, rows, G) of C: w_ih . x
  const void* b_ih[kDirections];  // (G) of E, or null: no biases
  const void* b_hh[kDirections];
  void* c;  // (D, N, H) of C, in: c0; out: c_n; LSTM only
  // Unused when projected:
  void* h_n;  // (D, N, H) of E, out; step-wise it is also the running h, in: h0
  void* h;    // (rows, D * H) of E, out
  // Kept for the backward pass, of E; null in inference:
  void* gates[kDirections];        // (rows, 4, H) activations, LSTM only
  void* c_all[kDirections];        // (rows, H), LSTM only
  void* unprojected[kDirections];  // (rows, H) o * tanh(c), projection only, in inference too
};

// One layer, all its directions, backward through time.
struct BackwardArgs {
  Element element;
  Cell cell;
  int64_t directions;
  Schedule schedule;
  int64_t rows;
  int64_t hidden;
  const void* dy;  // (rows, D * H) of E, or null: none, or projected
  const void* h;   // (rows, D * H) of E, Elman only
  const void* gates[kDirections];
  const void* c_all[kDirections];
  const void* c0;  // (D, N, H) of E, LSTM only
  void* dh;        // (D, N, H) of C, in: gradient of h_n; out: of h0; the running one step-wise
  void* dc;        // (D, N, H) of C, likewise, LSTM only
  void* dgates;    // (D, rows, G) of E, gradients of the pre-activations, out
};

// Step-wise: the cells of one step of all directions, after the product of the running h, and
// before that of dgates.
//
// recurrent: (D, N, G) of C, w_hh . h.
int launch_pointwise_forward(const ForwardArgs& args, const void* recurrent, int64_t step,
                             Stream stream);
int launch_pointwise_backward(const BackwardArgs& args, int64_t step, Stream stream);

// The whole sequence in one launch (float32, float16, bfloat16; no projection).
//
// A block owns `units` hidden units of one direction, keeps their weights in shared memory and
// computes tiles of `rows` batch rows. A team is as many blocks as own all units; tiles are dealt
// in turn to `slices` teams of each direction. After a step the blocks of a team meet: as a
// cluster, or at the barrier of the grid, where all blocks have to run at once.
struct PersistentTile {
  int units, rows;
};
struct Teams {
  PersistentTile tile;
  int slices;
  bool clusters;
};
// The device as the choice of a path sees it.
struct DeviceLimits {
  int device;
  int multiprocessors;
  int64_t shared_bytes;  // of a block, at most
  bool cooperative, clusters;
  bool compiled;   // whether the library has code that runs there, or PTX that its driver takes
  int capability;  // 80 for 8.0
};
int query_device(DeviceLimits* limits);

// Teams that the device runs at once: 0 where their blocks do not fit, or cannot be a cluster.
int forward_teams(Element element, Cell cell, int64_t hidden, PersistentTile tile, bool clusters,
                  int* teams);
int backward_teams(Element element, Cell cell, int64_t hidden, PersistentTile tile, bool clusters,
                   int* teams);

// w_hh: (G, H) of E, by direction; h0: (D, N, H) of E; exchange: (2, D, N, H) of E, scratch.
int launch_persistent_forward(const ForwardArgs& args, const Teams& teams,
                              const void* const w_hh[kDirections], const void* h0, void* exchange,
                              Stream stream);
int launch_persistent_backward(const BackwardArgs& args, const Teams& teams,
                               const void* const w_hh[kDirections], Stream stream);

// Writes sizes and offsets (T each, device memory) from sizes in host memory. They travel as kernel
// parameters, so that a graph which captures this keeps its own copy.
int launch_fill_schedule(const int64_t* host_sizes, int64_t steps, int64_t* sizes, int64_t* offsets,
                         Stream stream);

// The h that each row's step started from: previous (rows, P) of E, from h (rows, D * P) and h0
// (N, P) of one direction.
struct PreviousArgs {
  Element element;
  int64_t direction, directions;
  Schedule schedule;
  int64_t width;
  const void *h, *h0;
  void* previous;
};
int launch_previous_h(const PreviousArgs& args, Stream stream);

// The name of a launcher's error, which CUDA then no longer keeps as its last one: torch's next
// look at that would blame another kernel.
const char* take_error(int error);

// Whether a launcher's error says that the device does not run as many blocks at once as it said it
// would, as where it has been divided since. Nothing was started then.
bool is_too_large(int error);

}  // namespace fastrnn::cuda
