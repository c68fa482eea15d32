// Layers of a stack that run at the same time, each a block of steps behind the one before it: the
// layer below or, in the backward pass, above. No torch header, as barrier.h.
#pragma once

#include <vector>

#include "barrier.h"

namespace fastrnn {

// Steps of a block: the fewest whose input makes a full tile of rows, even of one row a step. So a
// diagonal fills fast, and to hand a block over costs little beside it.
constexpr int64_t kDiagonalSteps = 6;

// Hands the blocks of the layers out to the members of a team, and has each wait for what it needs:
// the block before in its layer, and the same steps of the layer before.
class Diagonal {
 public:
  Diagonal(int64_t layers, int64_t blocks) : blocks_(blocks), done_(layers) {}

  // Every member calls this; run(layer, block) is called once for each block of each layer. Blocks
  // are claimed in an order in which none needs a later one, so that a team of any size gets on.
  template <typename Run>
  void work(const Run& run) {
    const int64_t layers = static_cast<int64_t>(done_.size());
    int64_t index = 0, claimed = next_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t wave = 0; wave < layers + blocks_ - 1; ++wave) {
      const int64_t last = std::min(wave, layers - 1);
      for (int64_t layer = std::max<int64_t>(0, wave - blocks_ + 1); layer <= last; ++layer) {
        if (index++ != claimed) continue;
        const int64_t block = wave - layer;
        wait_for(layer, block);
        if (layer > 0) wait_for(layer - 1, block + 1);
        run(layer, block);
        done_[layer].blocks.store(block + 1, std::memory_order_release);
        claimed = next_.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }

 private:
  struct alignas(64) Done {
    std::atomic<int64_t> blocks{0};
  };

  void wait_for(int64_t layer, int64_t blocks) const {
    wait_until([&] { return done_[layer].blocks.load(std::memory_order_acquire) >= blocks; });
  }

  const int64_t blocks_;
  std::vector<Done> done_;  // of each layer
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace fastrnn
