// One direction of one layer through the kernels, forward and backward, as the drivers in
// csrc/run_forward.cpp and run_backward.cpp call them, but with odd strides, divisions and chunks;
// checked against naive.h.
#pragma once

#include <thread>

#include "../../csrc/barrier.h"
#include "naive.h"

namespace fastrnn::sanitize {

// Calls body(Member) on that many threads at the same time.
template <typename Body>
void run_team(int size, const Body& body) {
  Barrier everyone;
  std::vector<std::thread> others;
  for (int i = 1; i < size; ++i) {
    others.emplace_back([&, i] { body(Member{i, size, &everyone}); });
  }
  body(Member{0, size, &everyone});
  for (std::thread& thread : others) thread.join();
}

struct GroupBarrier {
  Barrier barrier;
  int size;

  static void wait(void* self) {
    auto* group = static_cast<GroupBarrier*>(self);
    if (planted_fault != "barrier") group->barrier.wait(group->size);
  }
};

// `parts` ranges that cover [0, count): where each ends. None is empty if `filled`.
inline std::vector<int64_t> random_ends(Draw& draw, int64_t count, int parts, bool filled) {
  std::vector<int64_t> ends(parts);
  const int64_t least = filled ? 1 : 0;
  int64_t end = 0;
  for (int i = 0; i < parts - 1; ++i) {
    ends[i] = end = draw.integer(end + least, count - (parts - 1 - i) * least);
  }
  ends[parts - 1] = count;
  return ends;
}

// The shares of a team: by rows, or by panels with a barrier a step.
template <typename C>
std::vector<Share<C>> random_shares(Draw& draw, const Shape& shape, int threads, int64_t panels,
                                    GroupBarrier& group, bool divides_units) {
  const bool by_panels = divides_units && panels >= threads && draw.one_in(2);
  const auto ends = random_ends(draw, by_panels ? panels : shape.N, threads, by_panels);
  std::vector<Share<C>> shares(threads);
  for (int i = 0; i < threads; ++i) {
    const int64_t begin = i > 0 && planted_fault != "overlap" ? ends[i - 1] : 0;
    shares[i] = {0, shape.N, 0, panels, nullptr, nullptr, nullptr};
    (by_panels ? shares[i].panel_begin : shares[i].row_begin) = begin;
    (by_panels ? shares[i].panel_end : shares[i].row_end) = ends[i];
    if (by_panels) {
      shares[i].sync = GroupBarrier::wait;
      shares[i].barrier = &group;
    }
  }
  group.size = threads;
  return shares;
}

// The rows of a sequence in an array of exactly the elements that its strides span.
template <typename E>
struct Rows {
  Array<E> array;
  int64_t step, row, width;

  // With `shares`, rows or steps may lie in one place, as those of an expanded tensor do.
  Rows(const char* name, Draw& draw, const Shape& shape, int64_t width, bool shares = false)
      : width(width) {
    const int64_t gap = draw.one_in(2) ? 0 : draw.integer(1, 9);
    row = width + gap;
    step = shape.N * row + (draw.one_in(2) ? 0 : draw.integer(1, 9));
    int64_t count = (shape.rows() - 1) * row + width;
    if (shape.sizes.empty()) {
      if (draw.one_in(3)) {  // batch first
        step = width + gap;
        row = shape.T * step + gap;
      }
      if (shares && draw.one_in(6)) (draw.one_in(2) ? step : row) = 0;
      count = (shape.T - 1) * step + (shape.N - 1) * row + width;
    }
    array = Array<E>(name, count, draw.one_in(3));
  }
  Sequence<E> sequence() const { return {array.data(), step, row}; }
  Sequence<const E> input() const { return {array.data(), step, row}; }

  void fill(Draw& draw, const Shape& shape) {
    each(shape, [&](E* at, int64_t) {
      for (int64_t i = 0; i < width; ++i) {
        if (at + i < array.data() + array.usable()) at[i] = draw.normal<E>();
      }
    });
  }
  Matrix matrix(const Shape& shape) const {
    Matrix result(shape.rows(), width);
    each(shape, [&](const E* at, int64_t index) {
      for (int64_t i = 0; i < width; ++i) result[index][i] = to_double(at[i]);
    });
    return result;
  }
  // Whether nothing was written between the rows.
  bool gaps_untouched(const Shape& shape) const {
    std::vector<bool> used(array.size());
    each(shape, [&](const E* at, int64_t) {
      std::fill_n(used.begin() + (at - array.data()), width, true);
    });
    for (int64_t i = 0; i < array.size(); ++i) {
      E untouched;
      std::memset(&untouched, 0xff, sizeof(E));
      if (!used[i] && std::memcmp(array.data() + i, &untouched, sizeof(E)) != 0) return false;
    }
    return true;
  }

 private:
  template <typename F>
  void each(const Shape& shape, F&& f) const {
    const Schedule schedule = shape.schedule();
    for (int64_t t = 0; t < shape.T; ++t) {
      for (int64_t n = 0; n < schedule.rows_at(t); ++n) {
        f(sequence().row(schedule, t, n), schedule.offset(t) + n);
      }
    }
  }
};

template <typename E>
Array<E> random_array(const char* name, Draw& draw, int64_t count, double scale = 1) {
  Array<E> array(name, count, draw.one_in(3));
  for (int64_t i = 0; i < array.usable(); ++i) array.data()[i] = draw.normal<E>(scale);
  return array;
}

// A state (N, width) or, with stride 0, one row for all.
template <typename E>
struct State {
  Array<E> array;
  int64_t stride;

  State(const char* name, Draw& draw, int64_t rows, int64_t width)
      : stride(draw.one_in(3) ? 0 : width) {
    array = random_array<E>(name, draw, stride == 0 ? width : rows * width);
  }
  Matrix matrix(int64_t rows, int64_t width) const {
    Matrix result(rows, width);
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t i = 0; i < width; ++i) result[n][i] = to_double(array.data()[n * stride + i]);
    }
    return result;
  }
};

// Prints and exits unless the results are near the naive ones.
inline void expect_near(const char* name, const Matrix& ours, const Matrix& naive,
                        double tolerance) {
  double largest = 1e-3, difference = 0;
  for (const double value : naive.data) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < naive.data.size(); ++i) {
    const double one = std::fabs(ours.data[i] - naive.data[i]);
    if (!(one <= difference)) difference = one;  // NaN too
  }
  if (difference <= tolerance * largest) return;
  std::fprintf(stderr, "%s differs by %g; the largest is %g\n", name, difference, largest);
  std::exit(1);
}

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

}  // namespace fastrnn::sanitize
