// Layers on top of each other that run along the diagonal, drawn at random.
#pragma once

#include <deque>

#include "../../csrc/diagonal.h"
#include "forward.h"

namespace fastrnn::sanitize {

template <typename E>
struct StackRun {
  using C = Compute<E>;

  std::deque<Shape> shapes;
  std::deque<ForwardRun<E>> layers;
  const int64_t steps;  // of a block

  StackRun(const Kernels<E>& kernels, Shape shape, Draw& draw) : steps(draw.integer(1, shape.T)) {
    shape.reverse = false;
    for (int64_t layer = 0, count = draw.integer(2, 4); layer < count; ++layer) {
      shapes.push_back(shape);
      layers.emplace_back(kernels, shapes.back(), draw, draw.one_in(2));
      if (layer > 0) layers.back().input = &layers[layer - 1].h;
      shape.I = shape.P;
    }
  }

  void run(int threads) {
    const Shape& shape = shapes[0];
    const int64_t blocks = (shape.T + steps - 1) / steps;
    Diagonal diagonal(layers.size(), blocks);
    std::vector<ForwardArgs<E>> args;
    for (ForwardRun<E>& layer : layers) args.push_back(layer.arguments());
    run_team(threads, [&](const Member& member) {
      for (const ForwardRun<E>& layer : layers) layer.pack(member);
      member.wait();
      diagonal.work([&](int64_t layer, int64_t block) {
        // As if a layer did not wait for the one below.
        if (planted_fault == "ahead" && layer > 0) block = std::min(block + 1, blocks - 1);
        Share<C> share{0, shape.N, 0, layers[layer].panels(), nullptr, nullptr, nullptr};
        const Array<C> scratch = layers[layer].scratch_for(share);
        share.scratch = scratch.data();
        layers[layer].kernels.forward(args[layer], share, block * steps,
                                      std::min((block + 1) * steps, shape.T));
      });
    });
  }

  void check(double tolerance) {
    for (ForwardRun<E>& layer : layers) layer.check(tolerance);
  }
};

}  // namespace fastrnn::sanitize
