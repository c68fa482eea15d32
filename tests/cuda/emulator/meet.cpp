// Where threads meet: barriers, shuffles, tensor-core operations.
#include <algorithm>
#include <cstring>

#include "threads.h"

namespace fastrnn_emulator {
namespace {

void join(Meeting& meeting, Where where) {
  Thread* const t = current;
  t->waits = &meeting;
  t->where = where;
  t->next = nullptr;
  (meeting.first ? meeting.last->next : meeting.first) = t;
  meeting.last = t;
  ++meeting.arrived;
}

// Waits until the meeting is opened, or opens it for all who wait, as it is complete.
void wait(Meeting* meeting, bool complete, bool orders_memory) {
  if (orders_memory) release(meeting);
  if (complete) {
    meeting->leaving = meeting->arrived;
    for (Thread *t = meeting->first, *next; t; t = next) {
      next = t->next;
      t->waits = nullptr;
      residents->ready.push(t);
    }
  }
  run_next(false);
  if (orders_memory) acquire(meeting);
  if (--meeting->leaving == 0) delete meeting;
}

void require_named(const char* name, unsigned mask, Where where) {
  if (!(mask >> current->lane & 1)) {
    fail(where, "%s: lane %d calls it with mask 0x%08x, which does not name it", name,
         current->lane, mask);
  }
}

// The warp's meeting of these lanes for this operation; a new one for the first that arrives.
Meeting* find_meeting(const Operation& operation) {
  Warp& warp = *current->warp;
  if (operation.mask & warp.exited) {
    fail(operation.where, "%s: mask 0x%08x names lanes 0x%08x, which have left the kernel",
         operation.name, operation.mask, operation.mask & warp.exited);
  }
  for (Meeting* m : warp.meetings) {
    const Operation& o = m->operation;
    if (o.mask != operation.mask) continue;
    const bool same_place = o.where.line == operation.where.line &&
                            std::strcmp(o.where.file, operation.where.file) == 0;
    if (std::strcmp(o.name, operation.name) != 0 || (operation.aligned && !same_place)) {
      fail(operation.where, "lanes of a warp diverge: lane %d is at %s, lane %d at %s (%s:%d)",
           current->lane, operation.name, m->first->lane, o.name, o.where.file, o.where.line);
    }
    if (o.pointer != operation.pointer || o.stride != operation.stride) {
      fail(operation.where,
           "%s: lane %d has pointer %p and leading dimension %u, lane %d %p and %u", o.name,
           current->lane, operation.pointer, operation.stride, m->first->lane, o.pointer, o.stride);
    }
    return m;
  }
  warp.meetings.push_back(new Meeting(operation));
  return warp.meetings.back();
}

// Meets the other lanes; the last that comes calls finish() for all.
template <typename Finish>
void meet_lanes(const Operation& operation, bool orders_memory, Finish&& finish) {
  Meeting* const m = find_meeting(operation);
  join(*m, operation.where);
  Warp& warp = *current->warp;
  const unsigned expected = operation.mask & warp.existing;
  const bool complete = m->arrived == static_cast<size_t>(__builtin_popcount(expected));
  if (complete) {
    finish(*m);
    // Not erase, whose memmove ThreadSanitizer would see.
    *std::find(warp.meetings.begin(), warp.meetings.end(), m) = warp.meetings.back();
    warp.meetings.pop_back();
  }
  wait(m, complete, orders_memory);
}

// All threads of some blocks meet.
void gather(Gathering& gathering, const char* name, Where where) {
  if (gathering.exited > 0) fail(where, "%s: a thread of it has left the kernel", name);
  Meeting*& slot = gathering.meeting;
  if (!slot) slot = new Meeting({name, where, 0, nullptr, 0, false});
  Meeting* const m = slot;
  join(*m, where);
  const bool complete = m->arrived == gathering.threads;
  if (complete) slot = nullptr;
  wait(m, complete, true);
}

constexpr unsigned kAllLanes = 0xffffffffu;

void require_whole_warp(const char* name, Where where) {
  if (current->warp->existing != kAllLanes) {
    fail(where, "%s: the warp has lanes 0x%08x only", name, current->warp->existing);
  }
}

}  // namespace

unsigned char* shared_memory() { return current->block->shared; }
int lane() { return current->lane; }

void sync_threads(Where where) {
  constexpr const char* kName = "__syncthreads";
  Block& block = *current->block;
  if (block.exited > 0) fail(where, "%s: a thread of the block has left the kernel", kName);
  Meeting*& slot = block.meeting;
  if (!slot) slot = new Meeting({kName, where, 0, nullptr, 0, true});
  Meeting* const m = slot;
  if (m->operation.where.line != where.line ||
      std::strcmp(m->operation.where.file, where.file) != 0) {
    fail(where, "%s: other threads of the block are at that of %s:%d", kName,
         m->operation.where.file, m->operation.where.line);
  }
  join(*m, where);
  const bool complete = m->arrived == block.threads.size();
  if (complete) slot = nullptr;
  wait(m, complete, true);
}

void sync_cluster(Where where) { gather(*current->block->cluster, "cluster.sync", where); }

void sync_grid(Where where) {
  constexpr const char* kName = "grid.sync";
  if (!residents->grid.cooperative) fail(where, "%s: the launch was not cooperative", kName);
  gather(residents->all, kName, where);
}

void sync_warp(unsigned mask, Where where) {
  require_named("__syncwarp", mask, where);
  meet_lanes({"__syncwarp", where, mask, nullptr, 0, false}, true, [](Meeting&) {});
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, Where where) {
  static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                           "__shfl_xor_sync"};
  const char* const name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fail(where, "%s: width %d is no power of two up to 32", name, width);
  }
  require_named(name, mask, where);
  Thread& t = *current;
  const int first = t.lane & ~(width - 1), last = first + width - 1;
  int source = t.lane;
  switch (kind) {
    case Shuffle::index: source = first + (operand & (width - 1)); break;
    case Shuffle::up: source = operand > t.lane - first ? t.lane : t.lane - operand; break;
    case Shuffle::down: source = operand > last - t.lane ? t.lane : t.lane + operand; break;
    case Shuffle::exclusive_or: source = t.lane ^ (operand & (kWarp - 1)); break;
  }
  if (source > last) source = t.lane;
  if (!(mask & t.warp->existing & 1u << source)) {
    fail(where, "%s: lane %d reads lane %d, which mask 0x%08x does not name or which is not there",
         name, t.lane, source, mask);
  }
  t.bits = bits;
  t.source = source;
  meet_lanes({name, where, mask, nullptr, 0, false}, false, [](Meeting& m) {
    for (Thread* u = m.first; u; u = u->next) u->result = u->warp->lanes[u->source]->bits;
  });
  return t.result;
}

void converge(const char* operation, const void* pointer, unsigned stride, Where where) {
  require_whole_warp(operation, where);
  meet_lanes({operation, where, kAllLanes, pointer, stride, true}, false, [](Meeting&) {});
}

void multiply_tiles(float* d, const float* a, const float* b, const float* c, Where where) {
  constexpr const char* kName = "mma_sync";
  require_whole_warp(kName, where);
  Thread& t = *current;
  t.a = a;
  t.b = b;
  t.c = c;
  t.d = d;
  meet_lanes({kName, where, kAllLanes, nullptr, 0, true}, false, [](Meeting& m) {
    float tile_a[kTile][kTile], tile_b[kTile][kTile], sums[kTile][kTile];
    for (const Thread* u = m.first; u; u = u->next) {
      for (int i = 0; i < kTileElements; ++i) {
        const int row = element_row(u->lane, i), column = element_column(u->lane, i);
        tile_a[row][column] = u->a[i];
        tile_b[row][column] = u->b[i];
        sums[row][column] = u->c[i];
      }
    }
    for (int i = 0; i < kTile; ++i) {
      for (int k = 0; k < kTile; ++k) {
        for (int j = 0; j < kTile; ++j) sums[i][j] += tile_a[i][k] * tile_b[k][j];
      }
    }
    for (const Thread* u = m.first; u; u = u->next) {
      for (int i = 0; i < kTileElements; ++i) {
        u->d[i] = sums[element_row(u->lane, i)][element_column(u->lane, i)];
      }
    }
  });
}

}  // namespace fastrnn_emulator
