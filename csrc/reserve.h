// What a forward pass keeps for the backward pass: one tensor, the reserve, and its parts.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "buffers.h"
#include "stack.h"

namespace fastrnn {

// The parts of the reserve, in the order in which they lie there, as pointers or as tensors.
template <typename Part>
struct ReserveParts {
  struct StrandParts {
    Part gates, c_all, unprojected;
  };
  std::vector<StrandParts> parts;  // (L * D)
  std::vector<Part> outputs;  // (L), (rows, D * P) each; none of the last layer, whose output is y

  // take_at(offset, width): the part (rows, width) that lies `offset` elements from the start.
  template <typename TakeAt>
  ReserveParts(const Stack& stack, TakeAt&& take_at) {
    int64_t offset = 0;
    const auto take = [&](bool wanted, int64_t width) {
      if (!wanted) return Part{};
      const int64_t begin = offset;
      offset += stack.rows * width;
      return take_at(begin, width);
    };
    const bool lstm = stack.cell == Cell::lstm;
    for (int64_t layer = 0; layer < stack.layers; ++layer) {
      for (int64_t d = 0; d < stack.directions; ++d) {
        const Part gates = take(lstm, 4 * stack.hidden);
        const Part c_all = take(lstm, stack.hidden);
        parts.push_back({gates, c_all, take(stack.projected, stack.hidden)});
      }
      outputs.push_back(take(layer + 1 < stack.layers, stack.layer_width()));
    }
  }
};

template <typename E>
struct Reserve : ReserveParts<E*> {
  Reserve(const Stack& stack, E* first)
      : ReserveParts<E*>(stack, [&](int64_t offset, int64_t) { return first + offset; }) {}
};

// The part of a reserve, which may be of one of so many copies of each row, as all copies have it:
// (rows / copies, copies, width). It lies where that of all would, but for the number of copies.
inline at::Tensor reserve_part(const Stack& stack, const at::Tensor& reserve, int64_t copies,
                               int64_t offset, int64_t width) {
  const int64_t rows = stack.rows / copies;
  return reserve.narrow(0, offset / copies, rows * width)
      .view({rows, 1, width})
      .expand({rows, copies, width});
}

// Views of the reserve, or copies if samples share it; undefined where there is no such part.
inline ReserveParts<at::Tensor> reserve_views(const Stack& stack, const at::Tensor& reserve) {
  const int64_t given = reserve.sym_numel().guard_int(__FILE__, __LINE__);
  const int64_t copies = given > 0 ? stack.reserve_size() / given : 1;
  TORCH_CHECK(given * copies == stack.reserve_size(), "the reserve is of another run");
  return {stack, [&](int64_t offset, int64_t width) {
            return reserve_part(stack, reserve, copies, offset, width).reshape({stack.rows, width});
          }};
}

// The reserve of a batch whose rows were `copies` of each one of which the reserve is given.
inline at::Tensor repeat_rows(const Stack& stack, const at::Tensor& reserve, int64_t copies) {
  const at::Tensor repeated = empty_buffer(stack.reserve_size(), reserve.options());
  const ReserveParts<at::Tensor> parts(stack, [&](int64_t offset, int64_t width) {
    const at::Tensor part = repeated.narrow(0, offset, stack.rows * width);
    part.view({-1, copies, width}).copy_(reserve_part(stack, reserve, copies, offset, width));
    return part;
  });
  return repeated;
}

}  // namespace fastrnn
