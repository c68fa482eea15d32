// Runs the blocks of a grid, a fiber for each of their threads.
#include <algorithm>
#include <numeric>

#include "emulated_device.h"
#include "threads.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastrnn_emulator {

Residents* residents = nullptr;
Thread* current = nullptr;

namespace {

// Their addresses stand for the order between the host and a grid.
char start_of_grid, end_of_grid;

// Checks whom the thread that leaves lets down, then runs another. Never returns.
void leave() {
  Thread& t = *current;
  release(&end_of_grid);
  t.warp->exited |= 1u << t.lane;
  ++t.block->exited;
  ++t.block->cluster->exited;
  ++residents->all.exited;
  for (const Meeting* m : t.warp->meetings) {
    if (m->operation.mask >> t.lane & 1) {
      fail(m->first->where, "%s: lane %d, which mask 0x%08x names, has left the kernel",
           m->operation.name, t.lane, m->operation.mask);
    }
  }
  for (const Meeting* m : {t.block->meeting, t.block->cluster->meeting, residents->all.meeting}) {
    if (m) fail(m->first->where, "%s: a thread has left the kernel", m->operation.name);
  }
  if (residents->all.exited == residents->all.threads) {
    switch_fiber(t.fiber, residents->host, true);
  }
  run_next(true);
}

void thread_main() {
  entered();
  acquire(&start_of_grid);
  residents->grid.run(residents->grid.context);
  leave();
}

// number: among the blocks that run now; first_thread: the number of its first fiber.
void set_up(Block& block, size_t number, Index index, size_t first_thread, const Grid& grid) {
  const size_t size = static_cast<size_t>(grid.threads.x) * grid.threads.y * grid.threads.z;
  block.number = number;
  block.index = index;
  block.shared = allocate_guarded(grid.shared_bytes);
  block.threads.resize(size);
  block.warps.resize((size + kWarp - 1) / kWarp);
  for (Warp& warp : block.warps) warp.meetings.reserve(kWarp);  // no fiber allocates later
  for (size_t i = 0; i < size; ++i) {
    Thread& t = block.threads[i];
    const unsigned n = static_cast<unsigned>(i);
    t.index = {n % grid.threads.x, n / grid.threads.x % grid.threads.y,
               n / (grid.threads.x * grid.threads.y)};
    t.block = &block;
    t.lane = static_cast<int>(i % kWarp);
    t.warp = &block.warps[i / kWarp];
    t.warp->number = number * block.warps.size() + i / kWarp;
    t.warp->lanes[t.lane] = &t;
    t.warp->existing |= 1u << t.lane;
    const size_t limit = std::max(kDistinctThreads, residents->all.threads);
    create(t.fiber, stack(number * size + i), (first_thread + i) % limit, thread_main);
    residents->ready.push(&t);
  }
}

// Runs `count` blocks, whose place in the grid `numbers` says, to their end.
void run_blocks(const Grid& grid, const size_t* numbers, size_t count, size_t first_thread,
                Random& random) {
  const size_t threads = static_cast<size_t>(grid.threads.x) * grid.threads.y * grid.threads.z;
  const size_t warps = (threads + kWarp - 1) / kWarp;
  Residents all{grid, {settings().schedule, random, count, count * warps}, {}, {}, {}, {}};
  residents = &all;
  all.all.threads = count * threads;
  all.ready.reserve(all.all.threads);
  all.blocks.resize(count);
  all.clusters.resize(count / grid.cluster);
  for (Gathering& cluster : all.clusters) cluster.threads = grid.cluster * threads;
  adopt(all.host);
  for (size_t i = 0; i < count; ++i) {
    const size_t n = numbers[i], x = grid.blocks.x, y = grid.blocks.y;
    const Index index{static_cast<unsigned>(n % x), static_cast<unsigned>(n / x % y),
                      static_cast<unsigned>(n / (x * y))};
    all.blocks[i].cluster = &all.clusters[i / grid.cluster];
    set_up(all.blocks[i], i, index, first_thread + i * threads, grid);
  }
  release(&start_of_grid);
  current = all.ready.pop();
  threadIdx = current->index;
  blockIdx = current->block->index;
  switch_fiber(all.host, current->fiber, false);
  current = nullptr;
  for (const Block& block : all.blocks) free_guarded(block.shared, grid.shared_bytes);
  residents = nullptr;
}

}  // namespace

void run_next(bool current_ends) {
  Thread* const from = current;
  Thread* const to = residents->ready.pop();
  if (!to) deadlock();
  if (to == from) return;
  current = to;
  threadIdx = to->index;
  blockIdx = to->block->index;
  switch_fiber(from->fiber, to->fiber, current_ends);
}

void run_grid(const Grid& grid) {
  blockDim = {grid.threads.x, grid.threads.y, grid.threads.z};
  gridDim = {grid.blocks.x, grid.blocks.y, grid.blocks.z};
  const bool random_order = settings().schedule == Schedule::random;
  Random random(static_cast<uint64_t>(settings().seed));
  std::vector<size_t> numbers(static_cast<size_t>(grid.blocks.x) * grid.blocks.y * grid.blocks.z);
  std::iota(numbers.begin(), numbers.end(), size_t{0});
  if (random_order) {
    for (size_t i = numbers.size() / grid.cluster; i > 1; --i) {
      const auto cluster = [&](size_t k) { return numbers.begin() + k * grid.cluster; };
      std::swap_ranges(cluster(i - 1), cluster(i), cluster(random.below(i)));
    }
  }
  size_t resident = static_cast<size_t>(settings().resident);
  if (resident == 0) resident = random_order ? 4 : 1;
  resident = grid.cooperative ? numbers.size() : resident * grid.cluster;
  const size_t threads = static_cast<size_t>(grid.threads.x) * grid.threads.y * grid.threads.z;
  for (size_t i = 0; i < numbers.size(); i += resident) {
    const size_t count = std::min(resident, numbers.size() - i);
    run_blocks(grid, numbers.data() + i, count, i * threads, random);
  }
  acquire(&end_of_grid);
}

}  // namespace fastrnn_emulator
