// Drives every launcher under the emulator over random shapes, in buffers of the exact size, and
// holds the results against plain loops in double precision.
//
//   gate FIRST_SEED COUNT [large] [mutant=K]     exits with 1 at the first wrong value
//
// large: hidden sizes whose weights take more than the 48 KB of shared memory that need no asking.
// mutant: the number of a planted fault, see csrc/cuda/device.cuh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "../../csrc/cuda/device.cuh"

fastrnn::cuda::Mutant fastrnn::cuda::mutant = fastrnn::cuda::Mutant::none;

namespace {

using namespace fastrnn;
using namespace fastrnn::cuda;

// An array of its exact size on the heap, so that AddressSanitizer sees one element too many.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size = 0) : size_(size), data_(new T[size]) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return size_; }
  void copy_from(const Array& other) const {
    for (int64_t i = 0; i < size_; ++i) data_[i] = other[i];
  }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "gate: %s\n", what);
  std::exit(1);
}
void succeed(int error) {
  if (error) fail(take_error(error));
}

struct Random {
  std::mt19937_64 engine;
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  }
  template <typename E>
  Array<E> array(int64_t size, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Array<E> result(size);
    for (int64_t i = 0; i < size; ++i) {
      result[i] = from_compute<E>(static_cast<Compute<E>>(uniform(engine)));
    }
    return result;
  }
};

template <typename E>
constexpr double kRounding = 1e-6;  // float: some dozen roundings of values near 1
template <>
constexpr double kRounding<double> = 1e-14;
template <>
constexpr double kRounding<__half> = 0x1p-11;
template <>
constexpr double kRounding<__nv_bfloat16> = 0x1p-8;

// What is compared went through at most so many roundings of the element type that can add up: one
// a step, whose effect later steps hold or shrink.
constexpr double kRoundings = 8;

template <typename E>
void expect_close(const char* what, const Array<E>& actual, const std::vector<double>& expected,
                  double rounding) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double a = static_cast<double>(to_compute(actual[i]));
    const double e = expected[i];
    if (std::abs(a - e) <= kRoundings * rounding * std::fmax(1, std::abs(e))) continue;
    std::fprintf(stderr, "gate: %s[%ld] is %.9g, expected %.9g\n", what, static_cast<long>(i), a,
                 e);
    std::exit(1);
  }
}

template <typename E>
std::vector<double> doubles(const Array<E>& array) {
  std::vector<double> result(array.size());
  for (int64_t i = 0; i < array.size(); ++i) result[i] = static_cast<double>(to_compute(array[i]));
  return result;
}

// As a kernel would store it.
template <typename E>
double rounded(double x) {
  return static_cast<double>(to_compute(from_compute<E>(static_cast<Compute<E>>(x))));
}

struct Shape {
  Cell cell;
  int64_t directions, steps, batch, hidden, rows;
  std::vector<int64_t> sizes, offsets;  // (T)
  bool packed;

  Shape(Random& random, Cell cell_drawn, bool large) : cell(cell_drawn) {
    directions = random.between(1, 2);
    steps = random.between(1, 4);
    batch = random.between(1, random.between(0, 3) ? 3 : 19);
    // Less than a warp, no multiple of a tile, or more chunks of K than there are warps.
    hidden = random.between(0, 3) ? random.between(1, 40) : random.between(65, 75);
    if (large) hidden = random.between(390, 400);
    packed = random.between(0, 1);
    rows = 0;
    int64_t size = batch;
    for (int64_t t = 0; t < steps; ++t) {
      if (packed && t > 0) size = random.between(1, size);
      sizes.push_back(size);
      offsets.push_back(rows);
      rows += size;
    }
  }
  int64_t gates() const { return gate_count(cell) * hidden; }
  // The s-th step of a direction's way.
  int64_t time(int64_t d, int64_t s, bool backward) const {
    return (d == 1) != backward ? steps - 1 - s : s;
  }
};

template <typename E, Cell cell>
class Trial {
 public:
  using C = Compute<E>;
  static constexpr int kGateCount = gate_count(cell);

  Trial(Random& random, Element element, bool large)
      : random_(random),
        element_(element),
        shape_(random, cell, large),
        d_(shape_.directions),
        n_(shape_.batch),
        h_(shape_.hidden),
        g_(shape_.gates()),
        sizes_(shape_.steps),
        offsets_(shape_.steps),
        w_{random.array<E>(g_ * h_, 1 / std::sqrt(double(h_))),
           random.array<E>(g_ * h_, 1 / std::sqrt(double(h_)))},
        h0_(random.array<E>(d_ * n_ * h_, 1)) {
    succeed(launch_fill_schedule(shape_.sizes.data(), shape_.steps, sizes_.get(), offsets_.get(),
                                 nullptr));
    for (int64_t t = 0; t < shape_.steps; ++t) {
      if (sizes_[t] != shape_.sizes[t] || offsets_[t] != shape_.offsets[t]) fail("wrong schedule");
    }
    schedule_ = {shape_.steps, n_, nullptr, nullptr};
    if (shape_.packed) {
      schedule_.sizes = sizes_.get();
      schedule_.offsets = offsets_.get();
    }
  }

  void run() {
    if (random_.between(0, 1)) {
      forward();
    } else {
      backward();
    }
    previous_h();
  }

 private:
  bool persists() const { return element_ != Element::f64 && random_.between(0, 2); }

  // count: forward_teams or backward_teams.
  Teams draw_teams(decltype(forward_teams) count) const {
    PersistentTile tile{16, 16};
    if (element_ == Element::f32) {
      const int rows[] = {1, 4, 8};
      const int units = (cell == Cell::lstm ? 8 : 16) << random_.between(0, 1);
      tile = {units, rows[random_.between(0, 2)]};
    }
    const auto slices = static_cast<int>(random_.between(1, 3));
    int teams = 0;
    succeed(count(element_, cell, h_, tile, /*clusters=*/true, &teams));
    return {tile, slices, teams > 0 && random_.between(0, 1)};
  }

  void forward() {
    const Array<C> input_products = random_.array<C>(d_ * shape_.rows * g_, 1);
    const bool biased = random_.between(0, 3);
    const Array<E> biases = random_.array<E>(biased ? 2 * d_ * g_ : 0, 0.5);
    const bool lstm = cell == Cell::lstm, keeps = lstm && random_.between(0, 1);
    const bool persistent = persists(), unprojected = !persistent && random_.between(0, 1);
    Array<C> c = random_.array<C>(lstm ? d_ * n_ * h_ : 0, 1);
    const std::vector<double> c0 = doubles(c);
    Array<E> h_n(d_ * n_ * h_), h(shape_.rows * d_ * h_);
    h_n.copy_from(h0_);
    std::vector<Array<E>> gates, c_all, apart;
    ForwardArgs args{};
    args.element = element_;
    args.cell = cell;
    args.directions = d_;
    args.schedule = schedule_;
    args.rows = shape_.rows;
    args.hidden = h_;
    args.input_products = input_products.get();
    args.c = lstm ? c.get() : nullptr;
    args.h_n = h_n.get();
    args.h = h.get();
    for (int64_t d = 0; d < d_; ++d) {
      gates.emplace_back(keeps ? shape_.rows * g_ : 0);
      c_all.emplace_back(keeps ? shape_.rows * h_ : 0);
      apart.emplace_back(unprojected ? shape_.rows * h_ : 0);
      args.b_ih[d] = biased ? biases.get() + d * g_ : nullptr;
      args.b_hh[d] = biased ? biases.get() + (d_ + d) * g_ : nullptr;
      args.gates[d] = keeps ? gates[d].get() : nullptr;
      args.c_all[d] = keeps ? c_all[d].get() : nullptr;
      args.unprojected[d] = unprojected ? apart[d].get() : nullptr;
    }
    if (persistent) {
      const void* w[] = {w_[0].get(), w_[1].get()};
      const Array<E> exchange(2 * d_ * n_ * h_);
      succeed(launch_persistent_forward(args, draw_teams(forward_teams), w, h0_.get(),
                                        exchange.get(), nullptr));
    } else {
      const Array<C> recurrent(d_ * n_ * g_);
      for (int64_t s = 0; s < shape_.steps; ++s) {
        each_row(s, false, [&](int64_t d, int64_t n, int64_t) {
          for (int64_t r = 0; r < g_; ++r) {
            recurrent[(d * n_ + n) * g_ + r] = C(product(d, r, &h_n[(d * n_ + n) * h_]));
          }
        });
        succeed(launch_pointwise_forward(args, recurrent.get(), s, nullptr));
        if (!unprojected) continue;
        each_row(s, false, [&](int64_t d, int64_t n, int64_t row) {
          for (int64_t j = 0; j < h_; ++j) {
            const E value = apart[d][row * h_ + j];
            h_n[(d * n_ + n) * h_ + j] = h[(row * d_ + d) * h_ + j] = value;
          }
        });
      }
    }

    std::vector<double> state = doubles(h0_), cell_state = c0, outputs(h.size());
    std::vector<double> gates_kept[2], c_all_kept[2];
    for (int64_t d = 0; d < d_; ++d) {
      gates_kept[d].resize(shape_.rows * g_);
      c_all_kept[d].resize(shape_.rows * h_);
    }
    for (int64_t s = 0; s < shape_.steps; ++s) {
      each_row(s, false, [&](int64_t d, int64_t n, int64_t row) {
        std::vector<double> pre(g_);
        for (int64_t r = 0; r < g_; ++r) {
          pre[r] = input_products[(d * shape_.rows + row) * g_ + r];
          for (int64_t i = 0; biased && i < 2; ++i) {
            pre[r] += to_compute(biases[(i * d_ + d) * g_ + r]);
          }
          for (int64_t k = 0; k < h_; ++k) pre[r] += weight(d, r, k) * state[(d * n_ + n) * h_ + k];
        }
        for (int64_t j = 0; j < h_; ++j) {
          double value = pre[j];
          if (lstm) {
            const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
            const double i = sigmoid(pre[j]), f = sigmoid(pre[h_ + j]);
            const double g = std::tanh(pre[2 * h_ + j]), o = sigmoid(pre[3 * h_ + j]);
            double& c_now = cell_state[(d * n_ + n) * h_ + j];
            c_now = f * c_now + i * g;
            value = o * std::tanh(c_now);
            const double all[] = {i, f, g, o};
            for (int64_t k = 0; k < 4; ++k) gates_kept[d][(row * 4 + k) * h_ + j] = all[k];
            c_all_kept[d][row * h_ + j] = c_now;
          } else {
            value = cell == Cell::rnn_tanh ? std::tanh(value) : std::fmax(value, 0);
          }
          outputs[(row * d_ + d) * h_ + j] = value;
        }
        for (int64_t j = 0; j < h_; ++j) {
          state[(d * n_ + n) * h_ + j] = rounded<E>(outputs[(row * d_ + d) * h_ + j]);
        }
      });
    }
    expect_close("h", h, outputs, kRounding<E>);
    expect_close("h_n", h_n, state, kRounding<E>);
    if (lstm) expect_close("c_n", c, cell_state, kRounding<E>);
    for (int64_t d = 0; keeps && d < d_; ++d) {
      expect_close("gates", gates[d], gates_kept[d], kRounding<E>);
      expect_close("c_all", c_all[d], c_all_kept[d], kRounding<E>);
    }
  }

  void backward() {
    const bool lstm = cell == Cell::lstm, has_dy = random_.between(0, 1);
    const Array<E> dy = random_.array<E>(has_dy ? shape_.rows * d_ * h_ : 0, 1);
    const Array<E> h = random_.array<E>(shape_.rows * d_ * h_, 1);
    const Array<E> c0 = random_.array<E>(lstm ? d_ * n_ * h_ : 0, 1);
    Array<C> dh = random_.array<C>(d_ * n_ * h_, 1);
    Array<C> dc = random_.array<C>(lstm ? d_ * n_ * h_ : 0, 1);
    std::vector<double> dh_state = doubles(dh), dc_state = doubles(dc);
    const Array<E> dgates(d_ * shape_.rows * g_);
    std::vector<Array<E>> gates, c_all;
    BackwardArgs args{};
    args.element = element_;
    args.cell = cell;
    args.directions = d_;
    args.schedule = schedule_;
    args.rows = shape_.rows;
    args.hidden = h_;
    args.dy = has_dy ? dy.get() : nullptr;
    args.h = h.get();
    args.c0 = lstm ? c0.get() : nullptr;
    args.dh = dh.get();
    args.dc = lstm ? dc.get() : nullptr;
    args.dgates = dgates.get();
    for (int64_t d = 0; d < d_; ++d) {
      gates.push_back(random_.array<E>(lstm ? shape_.rows * g_ : 0, 1));
      c_all.push_back(random_.array<E>(lstm ? shape_.rows * h_ : 0, 1));
      args.gates[d] = gates[d].get();
      args.c_all[d] = c_all[d].get();
    }
    if (persists()) {
      const void* w[] = {w_[0].get(), w_[1].get()};
      succeed(launch_persistent_backward(args, draw_teams(backward_teams), w, nullptr));
    } else {
      for (int64_t s = 0; s < shape_.steps; ++s) {
        succeed(launch_pointwise_backward(args, s, nullptr));
        each_row(s, true, [&](int64_t d, int64_t n, int64_t row) {
          for (int64_t j = 0; j < h_; ++j) {
            double sum = 0;
            for (int64_t r = 0; r < g_; ++r) {
              sum += weight(d, r, j) * to_compute(dgates[(d * shape_.rows + row) * g_ + r]);
            }
            dh[(d * n_ + n) * h_ + j] = C(sum);
          }
        });
      }
    }

    std::vector<double> expected(dgates.size());
    for (int64_t s = 0; s < shape_.steps; ++s) {
      each_row(s, true, [&](int64_t d, int64_t n, int64_t row) {
        double* const out = &expected[(d * shape_.rows + row) * g_];
        for (int64_t j = 0; j < h_; ++j) {
          const int64_t state = (d * n_ + n) * h_ + j, column = (row * d_ + d) * h_ + j;
          const double dh_now = dh_state[state] + (has_dy ? double(to_compute(dy[column])) : 0);
          if (lstm) {
            const auto gate = [&](int64_t k) {
              return double(to_compute(gates[d][(row * 4 + k) * h_ + j]));
            };
            const double i = gate(0), f = gate(1), g = gate(2), o = gate(3);
            const double c = to_compute(c_all[d][row * h_ + j]);
            const int64_t before = s + 1 < shape_.steps ? shape_.time(d, s + 1, true) : -1;
            const bool first = before < 0 || n >= shape_.sizes[before];
            const double c_before =
                to_compute(first ? c0[state] : c_all[d][(shape_.offsets[before] + n) * h_ + j]);
            const double t = std::tanh(c);
            const double dc_now = dc_state[state] + dh_now * o * (1 - t * t);
            out[j] = dc_now * g * i * (1 - i);
            out[h_ + j] = dc_now * c_before * f * (1 - f);
            out[2 * h_ + j] = dc_now * i * (1 - g * g);
            out[3 * h_ + j] = dh_now * t * o * (1 - o);
            dc_state[state] = dc_now * f;
          } else {
            const double value = to_compute(h[column]);
            out[j] =
                cell == Cell::rnn_tanh ? dh_now * (1 - value * value) : (value > 0 ? dh_now : 0);
          }
        }
        for (int64_t j = 0; j < h_; ++j) {
          double sum = 0;
          for (int64_t r = 0; r < g_; ++r) sum += weight(d, r, j) * rounded<E>(out[r]);
          dh_state[(d * n_ + n) * h_ + j] = sum;
        }
      });
    }
    expect_close("dgates", dgates, expected, kRounding<E>);
    expect_close("dh", dh, dh_state, kRounding<E>);
    if (lstm) expect_close("dc", dc, dc_state, kRounding<E>);
  }

  void previous_h() {
    const int64_t width = random_.between(1, 20);
    const Array<E> h = random_.array<E>(shape_.rows * d_ * width, 1);
    const Array<E> h0 = random_.array<E>(n_ * width, 1);
    for (int64_t d = 0; d < d_; ++d) {
      const Array<E> previous(shape_.rows * width);
      succeed(launch_previous_h(
          {element_, d, d_, schedule_, width, h.get(), h0.get(), previous.get()}, nullptr));
      std::vector<double> expected(previous.size());
      for (int64_t s = 0; s < shape_.steps; ++s) {
        const int64_t t = shape_.time(d, s, false);
        const int64_t before = s > 0 ? shape_.time(d, s - 1, false) : -1;
        for (int64_t n = 0; n < shape_.sizes[t]; ++n) {
          const bool first = before < 0 || n >= shape_.sizes[before];
          for (int64_t j = 0; j < width; ++j) {
            const E value =
                first ? h0[n * width + j] : h[((shape_.offsets[before] + n) * d_ + d) * width + j];
            expected[(shape_.offsets[t] + n) * width + j] = to_compute(value);
          }
        }
      }
      expect_close("previous", previous, expected, 0);
    }
  }

  double weight(int64_t d, int64_t r, int64_t k) const {
    return static_cast<double>(to_compute(w_[d][r * h_ + k]));
  }
  double product(int64_t d, int64_t r, const E* h) const {
    double sum = 0;
    for (int64_t k = 0; k < h_; ++k) sum += weight(d, r, k) * to_compute(h[k]);
    return sum;
  }
  // Calls f(d, n, row) for the rows of the s-th step.
  template <typename F>
  void each_row(int64_t s, bool backward, F&& f) const {
    for (int64_t d = 0; d < d_; ++d) {
      const int64_t t = shape_.time(d, s, backward);
      for (int64_t n = 0; n < shape_.sizes[t]; ++n) f(d, n, shape_.offsets[t] + n);
    }
  }

  Random& random_;
  const Element element_;
  const Shape shape_;
  const int64_t d_, n_, h_, g_;
  Array<int64_t> sizes_, offsets_;
  const Array<E> w_[2];
  const Array<E> h0_;
  Schedule schedule_;
};

// A launch that fails says so, and leaves no error for whoever asks CUDA next.
int fail_to_launch() {
  BackwardArgs args{};
  args.element = Element::f32;
  args.cell = Cell::lstm;
  args.directions = 1;
  args.hidden = 100000;  // more weights than shared memory
  const void* w[kDirections] = {};
  const int error = launch_persistent_backward(args, {{8, 1}, 1, false}, w, nullptr);
  const bool kept = cudaPeekAtLastError() == error;
  std::printf("%s\n", take_error(error));
  return error != 0 && kept && cudaPeekAtLastError() == cudaSuccess ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "fail") return fail_to_launch();
  const long first = argc > 1 ? std::atol(argv[1]) : 0;
  const long count = argc > 2 ? std::atol(argv[2]) : 1;
  bool large = false;
  for (int i = 3; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "large") large = true;
    if (option.substr(0, 7) == "mutant=") mutant = static_cast<Mutant>(std::atoi(argv[i] + 7));
  }
  for (long seed = first; seed < first + count; ++seed) {
    Random random{std::mt19937_64(static_cast<uint64_t>(seed))};
    const auto element = static_cast<Element>(random.between(0, 3));
    const auto cell = static_cast<Cell>(random.between(0, 2));
    std::fprintf(stderr, "seed %ld\n", seed);
    with_element(element, [&](auto e) {
      return with_cell(cell, [&]([[maybe_unused]] auto c) {
        Trial<decltype(e), decltype(c)::value>(random, element, large).run();
        return 0;
      });
    });
  }
  return 0;
}
