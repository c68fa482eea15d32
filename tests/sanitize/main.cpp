// Drives the CPU kernels, without torch, over random shapes, strides, schedules and divisions among
// threads, and holds the results against plain loops. Built with sanitizers; see sanitize.py.
//
//   program ISA DTYPE [--first SEED] [--count CASES] [--plant FAULT]
//
// FAULT is an array's name, whose array is then one element too short; or overflow, barrier,
// overlap, ahead, value.
#include "backward.h"
#include "stack.h"

namespace fastrnn::sanitize {
namespace {

constexpr Cell kCells[] = {Cell::lstm, Cell::lstm, Cell::rnn_tanh, Cell::rnn_relu};

// Ends rows early.
void pack(Draw& draw, Shape& shape) {
  int64_t size = shape.N, total = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    shape.sizes.push_back(size);
    shape.offsets.push_back(total);
    total += size;
    if (draw.one_in(2)) size = draw.integer(1, size);
  }
}

Shape random_shape(Draw& draw) {
  constexpr int64_t kWidths[] = {1,  2,  3,  4,  5,  7,  8,  9,  15, 16,
                                 17, 31, 32, 33, 48, 63, 64, 65, 100};
  constexpr int64_t kWide[] = {65, 96, 127, 128, 130, 192, 193, 257};
  Shape shape{};
  shape.cell = draw.choice(kCells);
  shape.reverse = draw.one_in(3);
  shape.projected = shape.cell == Cell::lstm && draw.one_in(3);
  shape.T = draw.one_in(4) ? 1 : draw.integer(2, 6);
  shape.N = draw.one_in(4) ? 1 : draw.integer(2, 14);
  shape.I = draw.choice(kWidths);
  shape.H = draw.choice(kWidths);
  if (draw.one_in(4)) {  // several panels
    (draw.one_in(3) ? shape.I : shape.H) = draw.choice(kWide);
    if (draw.one_in(2)) {  // and more than are small
      shape.cell = Cell::lstm;
      shape.I = shape.H = draw.choice(kWide);
    }
    shape.T = draw.integer(1, 3);
  } else if (draw.one_in(4)) {  // more rows than are hoisted, or than a block of a sum has
    shape.T = draw.integer(30, 70);
    shape.I = draw.integer(1, 9);
    shape.H = draw.integer(1, 9);
  }
  shape.P = shape.projected ? draw.integer(1, std::max<int64_t>(1, shape.H - 1)) : shape.H;
  if (draw.one_in(3)) pack(draw, shape);
  return shape;
}

// What takes many columns: whole spans of pairs of 16-bit numbers, weights whose gradient is
// written some columns at a time, panels that are multiplied by parts.
Shape random_wide_shape(Draw& draw) {
  constexpr int64_t kInputs[] = {256, 512, 520, 521, 1030};
  constexpr int64_t kHidden[] = {256, 512, 520};
  Shape shape{};
  shape.cell = draw.choice(kCells);
  shape.reverse = draw.one_in(3);
  shape.I = draw.choice(kInputs);
  const bool many_rows = draw.one_in(2);
  shape.T = many_rows ? draw.integer(30, 70) : draw.one_in(3) ? 2 : 1;
  shape.N = many_rows ? draw.integer(4, 9) : draw.integer(1, 2);
  shape.P = shape.H = many_rows ? draw.integer(1, 9) : draw.choice(kHidden);
  if (draw.one_in(3)) {  // so many gate gradients that they are not multiplied all at once
    shape.cell = Cell::lstm;
    shape.T = 2;
    shape.N = draw.integer(7, 9);
    shape.I = draw.integer(1, 9);
    shape.P = shape.H = draw.integer(258, 270);
  }
  if (draw.one_in(3)) pack(draw, shape);
  return shape;
}

// Whether results are compared. A relu's may grow from step to step, and with them the roundings of
// the factors of products, where these have fewer bits than h.
template <typename E>
bool is_checked(Cell cell) {
  const bool rounds_factors = std::is_same_v<E, HighFloat> || std::is_same_v<E, MediumFloat>;
  return checks_results() && !(rounds_factors && cell == Cell::rnn_relu);
}

template <typename E>
void run_case(const Kernels<E>& kernels, uint64_t seed) {
  Draw draw(seed);
  const Shape shape = seed % 20 == 19 ? random_wide_shape(draw) : random_shape(draw);
  const bool checked = is_checked<E>(shape.cell);
  const int threads = draw.one_in(3) ? 1 : static_cast<int>(draw.integer(2, 3));
  const bool trains = draw.one_in(2);
  // Of the largest result: some 100 roundings in sums; or, where h or the factors of products are
  // rounded to fewer bits at each step, a few of those.
  const double tolerance = (Format<E>::epsilon < 1e-6 ? 400 : 4) * Format<E>::epsilon;
  ForwardRun<E> forward(kernels, shape, draw, trains);
  forward.run(threads);
  if (checked) forward.check(tolerance);
  if (seed % 4 == 0) {
    StackRun<E> stack(kernels, shape, draw);
    stack.run(threads);
    if (checked) stack.check(tolerance);
  }
  if (!trains) return;
  BackwardRun<E> backward(forward);
  backward.run(threads);
  if (checked) backward.check(tolerance);
}

bool supported(const std::string& isa) {
  if (isa == "baseline") return true;
  if (isa == "avx2") return processor_has(Isa::avx2);
  if (!processor_has(Isa::avx512)) return false;
  if (isa == "avx512") return true;
  const Isa extension = find_avx512_extension();
  if (isa == "avx512_bf16") return extension >= Isa::avx512_bf16;
  if (isa == "amx") return extension >= Isa::amx;
  if (isa == "amx_fp16") return extension >= Isa::amx_fp16;
  return false;
}

Isa parse_isa(const std::string& name) {
  if (name == "avx2") return Isa::avx2;
  if (name == "avx512") return Isa::avx512;
  if (name == "avx512_bf16") return Isa::avx512_bf16;
  if (name == "amx") return Isa::amx;
  if (name == "amx_fp16") return Isa::amx_fp16;
  return Isa::baseline;
}

template <typename E>
int run_cases(const std::string& isa, uint64_t first, uint64_t count) {
  const Kernels<E>* kernels = find_kernels<E>(parse_isa(isa));
  for (uint64_t seed = first; seed < first + count; ++seed) {
    // Kept on the screen by a crash; a later line takes its place.
    std::fprintf(stderr, "\rseed %lu ", static_cast<unsigned long>(seed));
    run_case(*kernels, seed);
  }
  std::fprintf(stderr, "\n");
  return 0;
}

constexpr int kUnsupported = 77;

int main_with(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string isa = argv[1], dtype = argv[2];
  uint64_t first = 0, count = 100;
  for (int i = 3; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--first") first = std::stoull(argv[i + 1]);
    if (option == "--count") count = std::stoull(argv[i + 1]);
    if (option == "--plant") planted_fault = argv[i + 1];
  }
  if (!supported(isa)) return kUnsupported;
  if (dtype == "float32") return run_cases<float>(isa, first, count);
  if (dtype == "float64") return run_cases<double>(isa, first, count);
  if (dtype == "float16") return run_cases<Half>(isa, first, count);
  if (dtype == "bfloat16") return run_cases<BFloat16>(isa, first, count);
  if (dtype == "high") return run_cases<HighFloat>(isa, first, count);
  if (dtype == "medium") return run_cases<MediumFloat>(isa, first, count);
  return 2;
}

}  // namespace
}  // namespace fastrnn::sanitize

int main(int argc, char** argv) { return fastrnn::sanitize::main_with(argc, argv); }
