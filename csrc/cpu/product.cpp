// The one inner loop of every kernel: a tile of output held in registers while K runs.
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <typename M>
FASTRNN_INLINE Vec<Compute<M>> multiply_add(Vec<Compute<M>> a, Vec<Compute<M>> b,
                                            Vec<Compute<M>> c) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<M> == 2) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
#endif
  return fma<Compute<M>>(a, b, c);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<value>) for 1 <= value <= Max.
template <int Max, typename F>
FASTRNN_INLINE void with_constant(int value, F&& f) {
  if constexpr (Max == 1) {
    f(Constant<1>{});
  } else if (value == Max) {
    f(Constant<Max>{});
  } else {
    with_constant<Max - 1>(value, static_cast<F&&>(f));
  }
}

template <typename C>
constexpr int64_t kLineElements = 64 / sizeof(C);  // of a cache line

template <typename M, int R, int V>
__attribute__((noinline)) void multiply(const TileProduct<Compute<M>>& product,
                                        Vec<Compute<M>>* sums) {
  using C = Compute<M>;
  constexpr int L = kLanes<C>;
  const C* a[R];
  for (int r = 0; r < R; ++r) a[r] = product.a[r];
  const C* w = product.w;
  const C* next = product.next ? product.next : w;
  for (int64_t left = product.k_count; left > 0; left -= kSumBlock) {
    const int64_t count = left < kSumBlock ? left : kSumBlock;
    Vec<C> block[R][V] = {};
    int64_t offset = 0;
    for (int64_t k = 0; k < count; ++k) {
      Vec<C> weight[V];
      for (int v = 0; v < V; ++v) {
        weight[v] = load(w + v / kPanelVectors * product.panel_stride + v % kPanelVectors * L);
      }
      for (int r = 0; r < R; ++r) {
        const Vec<C> value = broadcast(a[r][offset]);
        for (int v = 0; v < V; ++v) block[r][v] = multiply_add<M>(value, weight[v], block[r][v]);
      }
      if constexpr (R > kTwoPanelRows) {
        __builtin_prefetch(next, 0, 2);
        next += kLineElements<C>;
      }
      w += product.w_stride;
      offset += product.a_stride;
    }
    for (int r = 0; r < R; ++r) a[r] += offset;
    if (left == product.k_count && !product.accumulate) {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r * V + v] = Vec<C>{} + block[r][v];
      }
    } else {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r * V + v] += block[r][v];
      }
    }
  }
}

// The product of R rows with one vector of a panel of w, (rows, k), transposed on the way.
template <typename C, int R>
struct StripProduct {
  static constexpr int L = kLanes<C>;

  const C* const (&a)[R];
  const C* w;
  int64_t k_count;
  const PanelRows& panel;
  int v;

  // block[r] += sum over k .. k + columns - 1; columns is at most L.
  FASTRNN_INLINE void add_columns(Vec<C> (&block)[R], int64_t k, int64_t columns) const {
    Vec<C> square[L];
    load_square<C>(square, w + k, k_count, panel, v, columns);
    for (int j = 0; j < L && j < columns; ++j) {
      for (int r = 0; r < R; ++r) block[r] = fma<C>(broadcast(a[r][k + j]), square[j], block[r]);
    }
  }

  // As add_columns, of L rows that lie one behind the other from `strip` on.
  FASTRNN_INLINE void add_square(Vec<C> (&block)[R], const C* strip, int64_t k) const {
    Vec<C> square[L];
    load_transposed<C>(square, strip + k, k_count);
    for (int j = 0; j < L; ++j) {
      for (int r = 0; r < R; ++r) block[r] = fma<C>(broadcast(a[r][k + j]), square[j], block[r]);
    }
  }

  // sums[r * stride] += the product. Two blocks run side by side, so that neither waits for the
  // other's multiply-adds.
  __attribute__((noinline)) void add_to(Vec<C>* sums, int stride) const {
    int64_t k = 0;
    const int64_t last = (v + 1) * L - 1, first_row = panel.row(v * L);
    if (last < panel.columns && panel.row(last) == first_row + L - 1) {
      const C* strip = w + first_row * k_count;
      for (; k + 2 * kSumBlock <= k_count; k += 2 * kSumBlock) {
        Vec<C> block0[R] = {}, block1[R] = {};
        for (int64_t i = 0; i < kSumBlock; i += L) {
          add_square(block0, strip, k + i);
          add_square(block1, strip, k + kSumBlock + i);
        }
        for (int r = 0; r < R; ++r) sums[r * stride] = sums[r * stride] + block0[r] + block1[r];
      }
    }
    for (; k < k_count; k += kSumBlock) {
      Vec<C> block[R] = {};
      const int64_t end = k_count - k < kSumBlock ? k_count : k + kSumBlock;
      for (int64_t i = k; i < end; i += L) add_columns(block, i, end - i);
      for (int r = 0; r < R; ++r) sums[r * stride] += block[r];
    }
  }
};

}  // namespace

template <typename M>
void multiply_tile(const TileProduct<Compute<M>>& product, int rows, int vectors,
                   Vec<Compute<M>>* sums) {
  if (vectors > kPanelVectors) {
    with_constant<kTwoPanelRows>(
        rows, [&](auto r) { multiply<M, decltype(r)::value, 2 * kPanelVectors>(product, sums); });
    return;
  }
  with_constant<kTileRows>(rows, [&](auto r) {
    with_constant<kPanelVectors>(vectors, [&](auto v) {
      multiply<M, decltype(r)::value, decltype(v)::value>(product, sums);
    });
  });
}

template <typename C>
void multiply_transposed(const C* const* a, const C* w, int64_t k_count, const PanelRows& panel,
                         int rows, Vec<C>* sums) {
  with_constant<kTileRows>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    const C* row[R];
    for (int i = 0; i < R; ++i) row[i] = a[i];
    for (int v = 0; v < panel.vectors; ++v) {
      StripProduct<C, R>{row, w, k_count, panel, v}.add_to(sums + v, panel.vectors);
    }
  });
}

#define INSTANTIATE(C) \
  template void multiply_tile<C>(const TileProduct<Compute<C>>&, int, int, Vec<Compute<C>>*);
INSTANTIATE(float)
INSTANTIATE(double)
#if defined(__AVX512BF16__)
INSTANTIATE(BFloat16)
#endif
#undef INSTANTIATE
template void multiply_transposed(const float* const*, const float*, int64_t, const PanelRows&, int,
                                  Vec<float>*);
template void multiply_transposed(const double* const*, const double*, int64_t, const PanelRows&,
                                  int, Vec<double>*);

}  // namespace fastrnn::FASTRNN_ISA
