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

// Calls f(Constant<value>) for 0 <= value < Count.
template <int Count, typename F>
FASTRNN_INLINE void with_each(F&& f) {
  if constexpr (Count > 0) {
    with_each<Count - 1>(f);
    f(Constant<Count - 1>{});
  }
}

template <typename C>
constexpr int64_t kLineElements = 64 / sizeof(C);  // of a cache line

// fetches: whether product.next is to be fetched.
template <typename M, int R, int V, bool fetches>
__attribute__((noinline)) void multiply(const TileProduct<Compute<M>>& product,
                                        Vec<Compute<M>>* sums) {
  using C = Compute<M>;
  constexpr int L = kLanes<C>;
  const C* a[R];
  for (int r = 0; r < R; ++r) a[r] = product.a[r];
  const C* w = product.w;
  const int64_t w_stride = product.w_stride;
  [[maybe_unused]] const C* next = product.next;
  const int64_t spans_end = product.interleaved ? product.k_count / kSpan * kSpan : 0;
  for (int64_t done = 0; done < product.k_count; done += kSumBlock) {
    const int64_t left = product.k_count - done;
    const int64_t count = left < kSumBlock ? left : kSumBlock;
    int64_t offset = done * product.a_stride, step = product.a_stride;
    if (done < spans_end) {
      offset = (done / kSpan * kSpan + done / kSumBlock % kInterleave) * product.a_stride;
      step *= kInterleave;
    }
    Vec<C> block[R][V] = {};
#pragma GCC unroll 2  // 2 to 10% on Granite Rapids
    for (int64_t k = 0; k < count; ++k) {
      Vec<C> weight[V];
      for (int v = 0; v < V; ++v) {
        weight[v] = load(w + v / kPanelVectors * product.panel_stride + v % kPanelVectors * L);
      }
      for (int r = 0; r < R; ++r) {
        const Vec<C> value = broadcast(a[r][offset]);
        for (int v = 0; v < V; ++v) block[r][v] = multiply_add<M>(value, weight[v], block[r][v]);
      }
      if constexpr (fetches) {
        __builtin_prefetch(next, 0, 2);
        next += kLineElements<C>;
      }
      w += w_stride;
      offset += step;
      // One index for all rows of a, not a pointer for each: 3 to 5% on Granite Rapids.
      asm("" : "+r"(offset));
    }
    if (done == 0 && !product.accumulate) {
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

// The product of R rows of a with one vector of a panel's columns, rows of w where they lie.
template <typename C, int R>
struct StripProduct {
  static constexpr int L = kLanes<C>;
  static constexpr int E = 16 / sizeof(C);  // of a quarter: 128 bits, whatever the vector
  static constexpr int64_t kColumns = L > 2 * E ? L : 2 * E;
  // Of each E rows, those that are read in one pass. A single row of a has time for few, and where
  // rows lie 4 KB apart all of them share one set of the L1 cache.
  static constexpr int kPassRows = R == 1 && E > 2 ? 2 : E;

  const C* const (&a)[R];
  const C* w;
  int64_t k_count;
  const PanelRows& panel;
  int v;

  // sums[r * stride] += the product.
  __attribute__((noinline)) void add_to(Vec<C>* sums, int stride) const {
    int64_t k = 0;
    for (; k + kSpan <= k_count; k += kSpan) add_span(k, sums, stride);
    for (; k < k_count; k += kSumBlock) add_block(k, sums, stride);
  }

 private:
  void add_span(int64_t k, Vec<C>* sums, int stride) const {
    const int64_t begin = v * L, last = begin + L - 1, first_row = panel.row(begin);
    if (last < panel.columns && panel.row(last) == first_row + L - 1) {
      add_rows(k, w + first_row * k_count + k, k_count, sums, stride);
      return;
    }
    C copy[L * kSpan];
    for (int64_t j = 0; j < L; ++j) {
      for (int64_t i = 0; i < kSpan; i += L) {
        const bool exists = begin + j < panel.columns;
        store(copy + j * kSpan + i,
              exists ? load(w + panel.row(begin + j) * k_count + k + i) : Vec<C>{});
      }
    }
    add_rows(k, copy, kSpan, sums, stride);
  }

  // As add_span, of L rows that lie ldw apart from `rows` on. A lane's sum is that of one block:
  // the neighbours of an operand, in the lanes beside it, belong to others.
  FASTRNN_INLINE void add_rows(int64_t k, const C* rows, int64_t ldw, Vec<C>* sums,
                               int stride) const {
    constexpr int G = kInterleave / E;
    Vec<C> blocks[R][G][E] = {};
    for (int first = 0; first < E; first += kPassRows) {
      for (int64_t column = 0; column < kSpan; column += kColumns) {
        for (int i = first; i < first + kPassRows; ++i) {
          for (int64_t c = column; c < column + kColumns; c += 2 * E) {
            Vec<C> pair[2];
            load_quarter_pairs(pair, rows + i * ldw + c, E * ldw);
            for (int q = 0; q < 2; ++q) {
              for (int r = 0; r < R; ++r) {
                const Vec<C> value = broadcast_quarter(a[r] + k + c + q * E);
                blocks[r][q % G][i] = fma<C>(value, pair[q], blocks[r][q % G][i]);
              }
            }
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) {
        Vec<C> block[E];
        transpose_quarters<C>(block, blocks[r][g]);
        for (int e = 0; e < E; ++e) sums[r * stride] += block[e];
      }
    }
  }

  // The block of neighbours from operand k on.
  void add_block(int64_t k, Vec<C>* sums, int stride) const {
    Vec<C> block[R] = {};
    const int64_t end = k_count - k < kSumBlock ? k_count : k + kSumBlock;
    for (; k < end; k += L) {
      Vec<C> square[L];
      load_square<C>(square, w + k, k_count, panel, v, end - k);
      for (int j = 0; j < L && k + j < end; ++j) {
        for (int r = 0; r < R; ++r) block[r] = fma<C>(broadcast(a[r][k + j]), square[j], block[r]);
      }
    }
    for (int r = 0; r < R; ++r) sums[r * stride] += block[r];
  }
};

#if defined(__AMX_BF16__)

// As multiply, V vectors of up to 16 rows in the matrix unit. Rows that do not exist have results
// too, in the room for a tile's sums, that no one reads.
template <typename M, int V>
__attribute__((noinline)) void multiply_in_matrix_unit(const TileProduct<float>& product, int rows,
                                                       Vec<float>* sums) {
  constexpr int kA = 4, kB = 5;  // tiles; sums are in the first four, weights in three
  constexpr int64_t K = kOperandUnit, stride_of_sums = V * sizeof(Vec<float>);
  with_each<V>([&](auto v) {
    constexpr int tile = decltype(v)::value;
    if (product.accumulate) {
      tile_load<tile>(sums + tile, stride_of_sums);
    } else {
      tile_zero<tile>();
    }
  });
  // Whether the rows of a lie as a tile's do.
  const float* const* a = product.a;
  bool regular = rows == kTileRows;
  for (int r = 2; regular && r < kTileRows; ++r) regular = a[r] - a[r - 1] == a[1] - a[0];
  alignas(64) float copy[kTileRows * K];
  const float* w = product.w;
  for (int64_t k = 0; k < product.k_count; k += K, w += K * product.w_stride) {
    if (regular) {
      tile_load<kA>(a[0] + k, (a[1] - a[0]) * sizeof(float));
    } else {
      for (int r = 0; r < rows; ++r) store(copy + r * K, load(a[r] + k));
      tile_load<kA>(copy, K * sizeof(float));
    }
    with_each<V>([&](auto v) {
      constexpr int tile = decltype(v)::value, b = kB + tile % 3;
      tile_load<b>(w + tile * K, product.w_stride * sizeof(float));
      tile_multiply<tile, kA, b>((M*)nullptr);
    });
  }
  with_each<V>([&](auto v) {
    constexpr int tile = decltype(v)::value;
    tile_store<tile>(sums + tile, stride_of_sums);
  });
}

#endif

}  // namespace

template <typename M>
void multiply_tile(const TileProduct<Compute<M>>& product, int rows, int vectors,
                   Vec<Compute<M>>* sums) {
#if defined(__AMX_BF16__)
  with_constant<kPanelVectors>(vectors, [&](auto v) {
    multiply_in_matrix_unit<M, decltype(v)::value>(product, rows, sums);
  });
#else
  if (vectors > kPanelVectors) {
    with_constant<kTwoPanelRows>(rows, [&](auto r) {
      multiply<M, decltype(r)::value, 2 * kPanelVectors, false>(product, sums);
    });
    return;
  }
  with_constant<kTileRows>(rows, [&](auto r) {
    with_constant<kPanelVectors>(vectors, [&](auto v) {
      constexpr int R = decltype(r)::value, V = decltype(v)::value;
      constexpr bool fetches = R > kTwoPanelRows && V == kPanelVectors;
      if (fetches && product.next) {
        multiply<M, R, V, fetches>(product, sums);
      } else {
        multiply<M, R, V, false>(product, sums);
      }
    });
  });
#endif
}

template <typename C>
void multiply_in_place(const C* const* a, const C* w, int64_t k_count, const PanelRows& panel,
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

#define INSTANTIATE(M) \
  template void multiply_tile<M>(const TileProduct<Compute<M>>&, int, int, Vec<Compute<M>>*);
#if defined(__AMX_BF16__)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#else
INSTANTIATE(float)
INSTANTIATE(double)
#if defined(__AVX512BF16__)
INSTANTIATE(BFloat16)
#endif
template void multiply_in_place(const float* const*, const float*, int64_t, const PanelRows&, int,
                                Vec<float>*);
template void multiply_in_place(const double* const*, const double*, int64_t, const PanelRows&, int,
                                Vec<double>*);
#endif
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
