// Arrays of exactly the size that the kernels' contract names, with something that notices one
// element too many beside them; and numbers of every element type.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "../../csrc/cpu/kernels.h"

namespace fastrnn::sanitize {

// What the program is asked to do wrong, so that the sanitizer shows that it would be seen: the
// name of the array to make one element too short, or a fault that driver.h names.
inline std::string planted_fault;

// Whether results are compared: a fault should be seen in the kernels, before.
inline bool checks_results() { return planted_fault.empty() || planted_fault == "value"; }

// Under a sanitizer memory comes from its malloc, which watches what lies around. Else it ends
// where a page that cannot be touched begins, or begins where one ends: the processor itself then
// stops the masked accesses of AVX-512 that no sanitizer sees.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kGuardPages = false;
#else
constexpr bool kGuardPages = true;
#endif

template <typename T>
class Array {
 public:
  Array() = default;
  // The bytes are all ones: NaN in every type, so that what should have been written first is seen.
  Array(const char* name, int64_t count, bool guard_front = false)
      : count_(count), usable_(planted_fault == name && count > 0 ? count - 1 : count) {
    const size_t bytes = usable_ * sizeof(T);
    // At the front, a page guards what lies before, and not what lies behind.
    guard_front &= planted_fault.empty();
    if (kGuardPages) {
      map(bytes, guard_front);
    } else {
      memory_ = std::malloc(bytes);
      data_ = static_cast<T*>(memory_);
    }
    std::memset(static_cast<void*>(data_), 0xff, bytes);
  }
  Array(Array&& other) noexcept { swap(other); }
  Array& operator=(Array&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Array() {
    if (kGuardPages) {
      if (memory_) munmap(memory_, mapped_);
    } else {
      std::free(memory_);
    }
  }

  T* data() const { return data_; }
  int64_t size() const { return count_; }  // promised
  int64_t usable() const {
    return usable_;
  }  // as many, or one less where that is the planted fault

 private:
  void map(size_t bytes, bool guard_front) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    memory_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) std::abort();
    char* const begin = static_cast<char*>(memory_) + page;
    if (inner > 0 && mprotect(begin, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(guard_front ? begin : begin + inner - bytes);
  }
  void swap(Array& other) {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    std::swap(usable_, other.usable_);
    std::swap(memory_, other.memory_);
    std::swap(mapped_, other.mapped_);
  }

  T* data_ = nullptr;
  int64_t count_ = 0, usable_ = 0;
  void* memory_ = nullptr;
  size_t mapped_ = 0;
};

// The distance from 1 to the next number; bits of the fraction, and the exponent of the smallest
// normal number.
template <typename E>
struct Format;
template <>
struct Format<float> {
  static constexpr double epsilon = 0x1p-23;
};
template <>
struct Format<HighFloat> {
  static constexpr double epsilon = 0x1p-13;  // of a product, which may be larger than the sum
};
template <>
struct Format<MediumFloat> {
  static constexpr double epsilon = 0x1p-6;
};
template <>
struct Format<double> {
  static constexpr double epsilon = 0x1p-52;
};
template <>
struct Format<Half> {
  static constexpr int fraction = 10, lowest = -14;
  static constexpr double epsilon = 0x1p-10;
};
template <>
struct Format<BFloat16> {
  static constexpr int fraction = 7, lowest = -126;
  static constexpr double epsilon = 0x1p-7;
};

inline double to_double(float x) { return x; }
inline double to_double(double x) { return x; }
inline double to_double(HighFloat x) { return x.value; }
inline double to_double(MediumFloat x) { return x.value; }
template <typename E>
double to_double(E x) {
  const int fraction = Format<E>::fraction;
  const int exponent = (x.bits & 0x7fff) >> fraction, rest = x.bits & ((1 << fraction) - 1);
  if (exponent == 0x7fff >> fraction) return rest ? NAN : INFINITY;
  const double magnitude = exponent == 0 ? rest : rest + (1 << fraction);
  const int scale = (exponent == 0 ? 1 : exponent) - 1 + Format<E>::lowest - fraction;
  return (x.bits & 0x8000 ? -1 : 1) * std::ldexp(magnitude, scale);
}

// Rounded to nearest, ties to even; for values of ordinary size.
template <typename E>
E from_double(double x) {
  if constexpr (kIsComputed<E>) {
    return E{static_cast<Compute<E>>(x)};
  } else {
    const int fraction = Format<E>::fraction;
    const int exponent = std::max(x == 0 ? -1000 : std::ilogb(x), Format<E>::lowest);
    const double steps = std::nearbyint(std::ldexp(std::fabs(x), fraction - exponent));
    const int bits = static_cast<int>(steps) + ((exponent - Format<E>::lowest) << fraction);
    return {static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0))};
  }
}

template <typename E>
double rounded(double x) {
  return to_double(from_double<E>(x));
}

// A source of sizes and numbers.
class Draw {
 public:
  explicit Draw(uint64_t seed) : engine_(seed) {}
  int64_t integer(int64_t least, int64_t most) {
    return std::uniform_int_distribution<int64_t>(least, most)(engine_);
  }
  bool one_in(int64_t n) { return integer(1, n) == 1; }
  template <typename T, size_t n>
  T choice(const T (&values)[n]) {
    return values[integer(0, n - 1)];
  }
  template <typename E>
  E normal(double scale = 1) {
    return from_double<E>(std::normal_distribution<double>(0, scale)(engine_));
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace fastrnn::sanitize
