// The one inner loop of every kernel: a tile of output held in registers while K runs.
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
template <typename Part, int R, int V, bool fetches>
__attribute__((noinline)) void multiply(const TileProduct<Compute<Part>>& product,
                                        Vec<Compute<Part>>* sums) {
  using C = Compute<Part>;
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
        for (int v = 0; v < V; ++v) block[r][v] = multiply_add<Part>(value, weight[v], block[r][v]);
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

// As multiply, V vectors of up to 16 rows in the matrix unit. Where it is set up for more rows than
// exist, these have results too, in the room for a tile's sums, that no one reads.
template <typename Part, int parts, int V>
__attribute__((noinline)) void multiply_in_matrix_unit(const TileProduct<float>& product, int rows,
                                                       Vec<float>* sums) {
  constexpr int kA = kTilesOfSums, kB = kA + parts, kTilesOfB = 8 - kB;
  constexpr int64_t K = kOperandUnit, stride_of_sums = V * sizeof(Vec<float>);
  const int64_t size = product.k_count / parts;
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
  const int64_t a_stride = rows > 1 ? a[1] - a[0] : 0;
  bool regular = rows == product.unit_rows;
  for (int r = 2; regular && r < rows; ++r) regular = a[r] - a[r - 1] == a_stride;
  alignas(64) float copy[kTileRows * K];
  const int64_t w_part = size * product.w_stride;
  const float* w = product.w;
  for (int64_t k = 0; k < size; k += K, w += K * product.w_stride) {
    with_each<parts>([&](auto p) {
      constexpr int part = decltype(p)::value, tile = kA + part;
      const int64_t offset = part * size + k;
      if (regular) {
        tile_load<tile>(a[0] + offset, a_stride * sizeof(float));
      } else {
        for (int r = 0; r < rows; ++r) store(copy + r * K, load(a[r] + offset));
        tile_load<tile>(copy, K * sizeof(float));
      }
    });
    if constexpr (parts == 1) {
      with_each<V>([&](auto v) {
        constexpr int tile = decltype(v)::value, b = kB + tile % kTilesOfB;
        tile_load<b>(w + tile * K, product.w_stride * sizeof(float));
        tile_multiply<tile, kA, b>((Part*)nullptr);
      });
    } else {
      // Vectors by twos, so that no product waits for the one before it.
      with_each<parts*((V + 1) / 2)>([&](auto i) {
        constexpr int part = decltype(i)::value / ((V + 1) / 2);
        constexpr int first = decltype(i)::value % ((V + 1) / 2) * 2, last = first + 1;
        const float* const from = w + part * w_part;
        tile_load<kB>(from + first * K, product.w_stride * sizeof(float));
        if constexpr (last < V)
          tile_load<kB + 1>(from + last * K, product.w_stride * sizeof(float));
        with_each<parts - part>([&](auto a_part) {
          constexpr int a_tile = kA + decltype(a_part)::value;
          tile_multiply<first, a_tile, kB>((Part*)nullptr);
          if constexpr (last < V) tile_multiply<last, a_tile, kB + 1>((Part*)nullptr);
        });
      });
    }
  }
  with_each<V>([&](auto v) {
    constexpr int tile = decltype(v)::value;
    tile_store<tile>(sums + tile, stride_of_sums);
  });
}

// The product of V vectors of a panel's rows of w, where they lie, with the columns of a.
template <typename E, int V>
struct LeftProduct {
  static constexpr int kA = kTilesOfSums, kB = kA + kParts<E>, kTilesOfB = 8 - kB;
  static constexpr int L = kLanes<float>, kElements = kOperandUnit * kDepth<E>;  // of a tile's rows
  using Square = float[L * L];
  using Copy = Square[kParts<E>];  // of a vector's rows, as operands

  const float* a;
  const E* w;
  int64_t k_count;
  const PanelRows& panel;
  int rows;
  const E* first_rows[V];  // of the vectors' rows, if those lie one behind the other; else null

  LeftProduct(const float* a, const E* w, int64_t k_count, const PanelRows& panel, int rows)
      : a(a), w(w), k_count(k_count), panel(panel), rows(rows) {
    for (int64_t v = 0; v < V; ++v) {
      const int64_t first = panel.row(v * L), last = v * L + L - 1;
      const bool neighbours = last < panel.columns && panel.row(last) == first + L - 1;
      first_rows[v] = neighbours ? w + first * k_count : nullptr;
    }
  }

  void add_to(Vec<float>* sums, bool accumulate) const {
    with_each<V>([&](auto v) { begin<decltype(v)::value>(sums, accumulate); });
    alignas(64) Copy copies[2][V];
    for (int v = 0; v < V; ++v) copy(0, v, copies[0][v]);
    const int64_t size = part_operands<E>(k_count);
    for (int64_t k = 0, i = 0; k < size; k += kOperandUnit, i ^= 1) {
      with_each<kParts<E>>([&](auto part) {
        constexpr int p = decltype(part)::value;
        tile_load<kA + p>(a + (p * size + k) * rows, rows * sizeof(float));
      });
      with_each<V>([&](auto vector) {
        constexpr int v = decltype(vector)::value;
        // Copied long before a tile is loaded from it, which would wait for the stores.
        if (k + kOperandUnit < size) copy((k + kOperandUnit) * kDepth<E>, v, copies[i ^ 1][v]);
        multiply_by<v>(k * kDepth<E>, copies[i][v]);
      });
    }
    with_each<V>([&](auto v) { finish<decltype(v)::value>(sums); });
  }

 private:
  // Whether a tile can be loaded from the rows of a vector, element k and on, as they lie.
  bool lies(int64_t k, int v) const {
    return kIsHalfOperand<E> && first_rows[v] && k_count - k >= kElements;
  }
  FASTRNN_INLINE void copy(int64_t k, int v, Copy& out) const {
    if (lies(k, v)) return;
    if (first_rows[v] && k_count - k >= kElements) {
      for (int j = 0; j < L; ++j) copy_row(first_rows[v] + j * k_count + k, kElements, j, out);
    } else {
      for (int j = 0; j < L; ++j) {
        const bool exists = v * L + j < panel.columns;
        const E* const row = exists ? w + panel.row(v * L + j) * k_count + k : nullptr;
        copy_row(row, k_count - k, j, out);
      }
    }
  }
  static FASTRNN_INLINE void copy_row(const E* row, int64_t count, int j, Copy& out) {
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value;
      store(out[p] + j * L, row ? row_operands<E, p>(row, count) : Vec<float>{});
    });
  }
  template <int v>
  FASTRNN_INLINE void multiply_by(int64_t k, const Copy& copied) const {
    for_parts<E>([&](auto part) {
      constexpr int p = decltype(part)::value, b = kB + (p * V + v) % kTilesOfB;
      if (lies(k, v)) {
        tile_load<b>(first_rows[v] + k, k_count * sizeof(E));
      } else {
        tile_load<b>(copied[p], L * sizeof(float));
      }
      with_each<kParts<E> - p>([&](auto a_part) {
        tile_multiply<v, b, kA + decltype(a_part)::value>((Part<E>*)nullptr);
      });
    });
  }

  // A tile has a row of sums for each lane of the vector.
  template <int v>
  FASTRNN_INLINE void begin(const Vec<float>* sums, bool accumulate) const {
    if (!accumulate) return tile_zero<v>();
    if (rows == 1) return tile_load<v>(sums + v, sizeof(float));
    alignas(64) Square square;
    for (int r = 0; r < rows; ++r) store(square + r * L, sums[r * V + v]);
    transpose(square);
    tile_load<v>(square, L * sizeof(float));
  }
  template <int v>
  FASTRNN_INLINE void finish(Vec<float>* sums) const {
    if (rows == 1) return tile_store<v>(sums + v, sizeof(float));
    alignas(64) Square square;
    tile_store<v>(square, L * sizeof(float));
    transpose(square);
    for (int r = 0; r < rows; ++r) sums[r * V + v] = load(square + r * L);
  }
  static FASTRNN_INLINE void transpose(Square& square) {
    Vec<float> columns[L];
    load_transposed<float>(columns, square, L);
    for (int j = 0; j < L; ++j) store(square + j * L, columns[j]);
  }
};

#endif

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
      if (fetches && product.next) {
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
template void multiply_in_place(const float* const*, const float*, int64_t, const PanelRows&, int,
                                Vec<float>*);
template void multiply_in_place(const double* const*, const double*, int64_t, const PanelRows&, int,
                                Vec<double>*);
#endif
#undef INSTANTIATE

}  // namespace fastrnn::FASTRNN_ISA
