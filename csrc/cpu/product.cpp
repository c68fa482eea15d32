// The inner loops over packed weights and over weights in place: a tile of output in registers
// while K runs.
#include "matrix_unit.h"
#include "pack.h"

namespace fastrnn::FASTRNN_ISA {
namespace {

template <typename Part>
FASTRNN_INLINE Vec<Compute<Part>> multiply_add(Vec<Compute<Part>> a, Vec<Compute<Part>> b,
                                               Vec<Compute<Part>> c) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<Part> == 2) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
#endif
  return fma<Compute<Part>>(a, b, c);
}

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

// fetches: whether product.ahead is to be fetched.
template <typename Part, int R, int V, bool fetches>
__attribute__((noinline)) void multiply(const TileProduct<Compute<Part>>& product,
                                        Vec<Compute<Part>>* sums) {
  using C = Compute<Part>;
  constexpr int L = kLanes<C>;
  const C* a[R];
  for (int r = 0; r < R; ++r) a[r] = product.a[r];
  const C* w = product.w;
  const int64_t w_stride = product.w_stride;
  [[maybe_unused]] const C* next = product.ahead.next;
  // With 32 registers always a vector (fetching_blocks), and one variable less in them.
  [[maybe_unused]] const int64_t next_step = FASTRNN_REGISTERS == 32 ? L : product.ahead.step;
  // Whether all weights of a k are held, and one element of a row after the other; or else all
  // elements, and one weight. One register too many would put a sum into memory at every k.
  constexpr bool holds_weights = R * V + V + 1 <= FASTRNN_REGISTERS;
  const int64_t spans_end = product.interleaved ? whole_spans(product.k_count) : 0;
  for (int64_t done = 0; done < product.k_count; done += kSumBlock) {
    const int64_t left = product.k_count - done;
    const int64_t count = left < kSumBlock ? left : kSumBlock;
    int64_t offset = done * product.a_stride, step = product.a_stride;
    if (done < spans_end) {
      offset = (whole_spans(done) + done / kSumBlock % kSpanBlocks) * product.a_stride;
      step *= kSpanBlocks;
    }
    Vec<C> block[R][V] = {};
#pragma GCC unroll 2  // 2 to 10% on Granite Rapids
    for (int64_t k = 0; k < count; ++k) {
      const auto weight = [&](int v) {
        return load(w + v / kPanelVectors * product.panel_stride + v % kPanelVectors * L);
      };
      const auto value = [&](int r) { return broadcast(a[r][offset]); };
      if constexpr (holds_weights) {
        Vec<C> weights[V];
        for (int v = 0; v < V; ++v) weights[v] = weight(v);
        for (int r = 0; r < R; ++r) {
          const Vec<C> one = value(r);
          for (int v = 0; v < V; ++v) {
            block[r][v] = multiply_add<Part>(one, weights[v], block[r][v]);
          }
        }
      } else {
        Vec<C> values[R];
        for (int r = 0; r < R; ++r) values[r] = value(r);
        for (int v = 0; v < V; ++v) {
          const Vec<C> one = weight(v);
          for (int r = 0; r < R; ++r) block[r][v] = multiply_add<Part>(values[r], one, block[r][v]);
        }
      }
      if constexpr (fetches) {
        __builtin_prefetch(next, 0, 2);
        next += next_step;
      }
      w += w_stride;
      offset += step;
      // One index for all rows of a, not a pointer for each: 3 to 5% on Granite Rapids.
      asm("" : "+r"(offset));
    }
    if (done == 0 && !product.accumulate) {
      for (int r = 0; r < R; ++r) {
        // 0 +: sums in place start from zero, and make 0 of -0.
        for (int v = 0; v < V; ++v) sums[r * V + v] = Vec<C>{} + block[r][v];
      }
    } else {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r * V + v] += block[r][v];
      }
    }
  }
}

// The product of R rows of a with vectors of a panel's columns, rows of w where they lie.
// E: an element of w that becomes an operand of type Part.
template <typename E, typename Part, int R>
struct StripProduct {
  using C = Compute<E>;
  using Rows = VectorRows<C>;
  static constexpr int L = kLanes<C>;
  static constexpr int Q = 16 / sizeof(C);  // of a quarter: 128 bits, whatever the vector
  static constexpr int64_t kColumns = L > 2 * Q ? L : 2 * Q;
  // Of each Q rows, those that are read in one pass, eight of w's at most for a single row of a:
  // where they lie 4 KB apart all of them share one set of the L1 cache.
  static constexpr int kPassRows = R == 1 && L > 8 && Q > 2 ? 2 : Q;
  // Vectors whose sums grow side by side after the last span: the multiply-adds of one, or of two,
  // would wait for each other for longer than the weights take to transpose.
  static constexpr int kVectors = R <= 2 ? 2 : 1;

  const C* const (&a)[R];
  const E* w;
  int64_t k_count;

  // sums[r * stride] += the product over whole spans.
  // fetches: whether the rows that are read after those, from `next` on, are fetched meanwhile.
  template <bool fetches>
  __attribute__((noinline)) void add_spans(const Rows& rows, const E* next, Vec<C>* sums,
                                           int stride) const {
    for (int64_t k = 0; k + kSpan <= k_count; k += kSpan) {
      add_span<fetches>(rows, next, k, sums, stride);
    }
  }

  // sums[r * stride + n] += the product over the rest with vector n of N.
  template <int N>
  __attribute__((noinline)) void add_rest(const Rows* rows, Vec<C>* sums, int stride) const {
    for (int64_t k = k_count / kSpan * kSpan; k < k_count; k += kSumBlock) {
      add_block<N>(rows, k, sums, stride);
    }
  }

 private:
  template <bool fetches>
  FASTRNN_INLINE void add_span(const Rows& rows, const E* next, int64_t k, Vec<C>* sums,
                               int stride) const {
    if constexpr (kLoadsQuarters<E>) {
      if (rows.neighbours) {
        const E* const first = w + rows.first * k_count + k;
        add_rows<fetches>(first, k_count, next, k, sums, stride);
        return;
      }
    }
    C copy[L * kSpan];
    for (int64_t j = 0; j < L; ++j) {
      const E* const row = rows.exists(j) ? w + rows.row(j) * k_count + k : nullptr;
      for (int64_t i = 0; i < kSpan; i += L) {
        store(copy + j * kSpan + i, row ? load_as(row + i) : Vec<C>{});
      }
    }
    add_rows<fetches>(copy, kSpan, next, k, sums, stride);
  }

  // As add_span, of L rows that lie ldw apart from `rows` on. A lane's sum is that of one block:
  // the neighbours of an operand, in the lanes beside it, belong to others.
  template <bool fetches, typename T>
  FASTRNN_INLINE void add_rows(const T* rows, int64_t ldw, [[maybe_unused]] const E* next,
                               int64_t k, Vec<C>* sums, int stride) const {
    constexpr int G = kSpanBlocks / Q;
    constexpr int64_t kReads = Q / kPassRows * (kSpan / kColumns);
    Vec<C> blocks[R][G][Q];
    [[maybe_unused]] Fetcher following{next + k * L};
    for (int first = 0; first < Q; first += kPassRows) {
      Vec<C> pass[R][G][kPassRows] = {};
      for (int64_t column = 0; column < kSpan; column += kColumns) {
        if constexpr (fetches) following.fetch(L * kSpan / kReads * sizeof(E));
        for (int i = 0; i < kPassRows; ++i) {
          for (int64_t c = column; c < column + kColumns; c += 2 * Q) {
            Vec<C> pair[2];
            load_quarter_pairs(pair, rows + (first + i) * ldw + c, Q * ldw);
            for (int q = 0; q < 2; ++q) {
              for (int r = 0; r < R; ++r) {
                const Vec<C> value = broadcast_quarter(a[r] + k + c + q * Q);
                Vec<C>& sum = pass[r][q % G][i];
                sum = multiply_add<Part>(value, pair[q], sum);
              }
            }
          }
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int g = 0; g < G; ++g) {
          for (int i = 0; i < kPassRows; ++i) blocks[r][g][first + i] = pass[r][g][i];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < G; ++g) {
        Vec<C> block[Q];
        transpose_quarters<C>(block, blocks[r][g]);
        for (int e = 0; e < Q; ++e) sums[r * stride] += block[e];
      }
    }
  }

  // The block of neighbours from operand k on.
  template <int N>
  FASTRNN_INLINE void add_block(const Rows* rows, int64_t k, Vec<C>* sums, int stride) const {
    Vec<C> block[N][R] = {};
    const int64_t end = k_count - k < kSumBlock ? k_count : k + kSumBlock;
    for (; k < end; k += L) {
#pragma GCC unroll 2  // or the sums would lie in memory
      for (int n = 0; n < N; ++n) {
        Vec<C> square[L];
        load_operands<E, 0>(square, w + k, k_count, rows[n], end - k);
        for (int j = 0; j < L && k + j < end; ++j) {
          for (int r = 0; r < R; ++r) {
            block[n][r] = multiply_add<Part>(broadcast(a[r][k + j]), square[j], block[n][r]);
          }
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int r = 0; r < R; ++r) sums[r * stride + n] += block[n][r];
    }
  }
};

}  // namespace

template <typename Part, int parts>
void multiply_tile(const TileProduct<Compute<Part>>& product, int rows, int vectors,
                   Vec<Compute<Part>>* sums) {
#if defined(__AMX_BF16__)
  with_constant<kPanelVectors>(vectors, [&](auto v) {
    multiply_in_matrix_unit<Part, parts, decltype(v)::value>(product, rows, sums);
  });
#else
  if (vectors > kPanelVectors) {
    with_constant<kTwoPanelRows>(rows, [&](auto r) {
      multiply<Part, decltype(r)::value, 2 * kPanelVectors, false>(product, sums);
    });
    return;
  }
  with_constant<kTileRows>(rows, [&](auto r) {
    with_constant<kPanelVectors>(vectors, [&](auto v) {
      constexpr int R = decltype(r)::value, V = decltype(v)::value;
      constexpr bool fetches = R > kTwoPanelRows && V == kPanelVectors;
      if (fetches && product.ahead.next) {
        multiply<Part, R, V, fetches>(product, sums);
      } else {
        multiply<Part, R, V, false>(product, sums);
      }
    });
  });
#endif
}

#if defined(__AMX_BF16__)

template <typename E>
void multiply_left_weights(const float* a, const E* w, int64_t k_count, const PanelRows& panel,
                           int rows, bool accumulate, Vec<float>* sums) {
  with_constant<kPanelVectors>(panel.vectors, [&](auto v) {
    LeftProduct<E, decltype(v)::value>{a, w, k_count, panel, rows}.add_to(sums, accumulate);
  });
}

#define INSTANTIATE(E)                                                                           \
  template void multiply_left_weights<E>(const float*, const E*, int64_t, const PanelRows&, int, \
                                         bool, Vec<float>*);
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#undef INSTANTIATE

#else

template <typename E>
void multiply_in_place(const Compute<E>* const* a, const E* w, int64_t k_count,
                       const PanelRows& panel, int rows, Vec<Compute<E>>* sums, const E* next) {
  // Where an operand is two elements, rows of them lie there as w's.
  using C = Compute<E>;
  using In = std::conditional_t<kIsHalfOperand<E>, C, E>;
  const In* const in = reinterpret_cast<const In*>(w);
  const int64_t size = operands<E>(k_count);
  with_constant<kTileRows>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    const C* row[R];
    for (int i = 0; i < R; ++i) row[i] = a[i];
    using Strip = StripProduct<In, Part<E>, R>;
    const Strip strip{row, in, size};
    const auto add_spans = [&](const VectorRows<C>& rows_of_w, int v) {
      const In* following = in + following_row<C>(panel, v) * size;
      if (next && v + 1 == panel.vectors) following = reinterpret_cast<const In*>(next);
      // The hardware foresees stretches of a span, but not those of half the bytes.
      if (!kIsComputed<In> || (R == 1 && next)) {
        strip.template add_spans<!kIsComputed<In> || R == 1>(rows_of_w, following, sums + v,
                                                             panel.vectors);
      } else {
        strip.template add_spans<!kIsComputed<In>>(rows_of_w, following, sums + v, panel.vectors);
      }
    };
    const auto add = [&](auto count, int v) {
      constexpr int N = decltype(count)::value;
      const VectorRows<C> rows_of_w[] = {{panel, v}, {panel, v + N - 1}};
      for (int n = 0; n < N; ++n) add_spans(rows_of_w[n], v + n);
      strip.template add_rest<N>(rows_of_w, sums + v, panel.vectors);
    };
    int v = 0;
    for (; v + Strip::kVectors <= panel.vectors; v += Strip::kVectors) {
      add(Constant<Strip::kVectors>{}, v);
    }
    for (; v < panel.vectors; ++v) add(Constant<1>{}, v);
  });
}

#define INSTANTIATE(E)                                                                           \
  template void multiply_in_place(const Compute<E>* const*, const E*, int64_t, const PanelRows&, \
                                  int, Vec<Compute<E>>*, const E*);
#if defined(__AVX512BF16__)
INSTANTIATE(BFloat16)
#else
FASTRNN_FOR_ELEMENTS(INSTANTIATE)
#endif
#undef INSTANTIATE

#endif

#define INSTANTIATE(Part, parts)                                                        \
  template void multiply_tile<Part, parts>(const TileProduct<Compute<Part>>&, int, int, \
                                           Vec<Compute<Part>>*);
#if defined(FASTRNN_AMX_FP16)
INSTANTIATE(Half, 1)
#elif defined(__AMX_BF16__)
INSTANTIATE(BFloat16, 1)
INSTANTIATE(BFloat16, 2)
#else
INSTANTIATE(float, 1)
INSTANTIATE(double, 1)
#if defined(__AVX512BF16__)
INSTANTIATE(BFloat16, 1)
#endif
#endif
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
