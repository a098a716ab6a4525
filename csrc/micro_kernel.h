// The two innermost loops: a few rows and columns of C held in registers while k runs.
// Included by gemm_kernels.h, once for each instruction set.
//
// tile_n (vectors along n). C is R rows x V registers. A step of k loads V registers of B and broadcasts R numbers of A
// straight from memory, for R*V multiply-adds. With 16 registers, 4 x 3 = 12 accumulators hide the latency of the
// multiply-add (4 cycles, two a cycle: 8 are enough) and cost 7 loads for 12 multiply-adds, under the two loads a cycle
// that the core can do; 6 x 2 and 8 x 1 serve the last columns (4 x 2 was a fifth slower: rows of B that straddle cache
// lines cost extra loads). Four rows rather than six by two also because rows of h are G*E apart, often a multiple of
// 4096 bytes: they compete for the same 8 ways of L1. With 32 registers (AVX-512), twice the rows.
//
// tile_k (vectors along k). C is R x V numbers, each a register of partial sums that is folded at the end: R + V loads
// for R*V multiply-adds. For products with few columns (J = 1: a batch of dot products), where vectors along n would be
// mostly empty.
#pragma once

#include "simd.h"

namespace mlhead::MLHEAD_ISA {

inline constexpr int kVectors = 3;
// The most rows of a tile V registers wide: AVX-512 has 32 registers, the others 16.
MLHEAD_INLINE constexpr int rows_of(int V) {
  return (V == 3 ? 4 : V == 2 ? 6 : 8) * (MLHEAD_VECTOR_BYTES == 64 ? 2 : 1);
}
inline constexpr int kDotRows = 4;
inline constexpr int kDotColumns = 3;

template <typename T>
struct Tile {
  int64_t K;
  const T* a;
  int64_t a_m, a_k;
  const void* b;  // numbers of T, or of S where the tile packs
  int64_t b_k;    // b_n is 1
  T* packed;      // where a tile that packs leaves B for those that follow
  T* c;
  int64_t c_m;         // c_n is 1
  int64_t begin, end;  // the columns of the tile that are written: all V * L, fewer at an edge
  const T* bias;       // added when the sum is complete; or null
  bool accumulate;     // C holds the sum over earlier blocks of k
  int64_t count;       // how many tiles, one below the other, are computed
};

// Writes only the columns from begin to end.
template <typename T>
static __attribute__((noinline)) void store_edge(const Tile<T>& t, T* first_c, int rows, int vectors,
                                                 const Vec<T>* acc) {
  constexpr int L = kLanes<T>;
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      T* c = first_c + r * t.c_m + v * L;
      const T* bias = t.bias ? t.bias + v * L : nullptr;
      Vec<T> sum = acc[r * vectors + v];
      const int64_t first = max(0, t.begin - v * L), last = min(L, t.end - v * L);
      if (first == 0 && last == L) {
        if (t.accumulate) sum += load(c);
        if (bias) sum += load(bias);
        store(c, sum);
        continue;
      }
      T lanes[L];
      store(lanes, sum);
      for (int64_t i = first; i < last; ++i) c[i] = lanes[i] + (t.accumulate ? c[i] : T(0)) + (bias ? bias[i] : T(0));
    }
}

// B holds numbers of the storage type S. With PACK the tile leaves a copy of B behind, contiguous and of type T: the
// stores hide under the multiply-adds, so packing costs nothing, and the tiles of the following rows read whole cache
// lines.
template <typename T, typename S, bool PACK, int R, int V>
static void tile_n(const Tile<T>& t) {
  constexpr int L = kLanes<T>;
  const int64_t K = t.K, a_m = t.a_m, a_k = t.a_k, b_k = t.b_k, c_m = t.c_m;
  const T* const bias = t.bias;
  const T* rows = t.a;
  T* c = t.c;
  for (int64_t i = t.count; i > 0; --i, rows += R * a_m, c += R * c_m) {
    Vec<T> acc[R][V] = {};
    const T* a = rows;
    const S* b = static_cast<const S*>(t.b);
    T* packed = t.packed;
    // Fewer branches: the end of a loop of a hundred of them is mispredicted.
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; ++k) {
      Vec<T> bv[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        bv[v] = load(b + v * L);
        if (PACK) store(packed + v * L, bv[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const T x = a[r * a_m];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += x * bv[v];
      }
      a += a_k;
      b += b_k;
      if (PACK) packed += V * L;
    }
    if (t.begin > 0 || t.end < V * L) {  // out of line: rare, and its code would be longer than all the rest
      Vec<T> edge[R * V];
#pragma GCC unroll 32
      for (int i = 0; i < R * V; ++i) edge[i] = acc[i / V][i % V];
      store_edge<T>(t, c, R, V, edge);
      continue;
    }
    if (bias) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T> x = load(bias + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][v] += x;
      }
    }
    if (t.accumulate) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] += load(c + r * c_m + v * L);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(c + r * c_m + v * L, acc[r][v]);
  }
}

// C(r, v) [+]= sum_k a(r, k) b(v, k), both with k contiguous.
template <typename T>
struct DotTile {
  int64_t K;
  const T* a;
  int64_t a_m;
  const T* b;
  int64_t b_n;
  T* c;
  int64_t c_m;  // c_n is 1
  bool accumulate;
};

template <typename T, int R, int V>
static void tile_k(const DotTile<T>& t) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V] = {};
  const int64_t whole = t.K - t.K % L;
  for (int64_t k = 0; k < whole; k += L) {
    Vec<T> bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bv[v] = load(t.b + v * t.b_n + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> av = load(t.a + r * t.a_m + k);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += av * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T sum = sum_of_lanes<T>(acc[r][v]);
      for (int64_t k = whole; k < t.K; ++k) sum += t.a[r * t.a_m + k] * t.b[v * t.b_n + k];
      T* c = t.c + r * t.c_m + v;
      *c = t.accumulate ? *c + sum : sum;
    }
}

// The functions above for every number of rows and columns.
template <typename T>
using TileFunction = void (*)(const Tile<T>&);
template <typename T>
using DotFunction = void (*)(const DotTile<T>&);

template <typename T, int V, int... R>
MLHEAD_INLINE void call_tile_n(int64_t rows, const Tile<T>& t, std::integer_sequence<int, R...>) {
  static constexpr TileFunction<T> functions[] = {tile_n<T, T, false, R + 1, V>...};
  functions[rows - 1](t);
}
// `rows` are rows_of(vectors) or, without packing, fewer.
template <typename T, typename S>
MLHEAD_INLINE void call_tile_n(int64_t rows, int64_t vectors, bool pack, const Tile<T>& t) {
  if (pack) {
    static constexpr TileFunction<T> packing[] = {tile_n<T, S, true, rows_of(1), 1>, tile_n<T, S, true, rows_of(2), 2>,
                                                  tile_n<T, S, true, rows_of(3), 3>};
    return packing[vectors - 1](t);
  }
  if (vectors == 3) return call_tile_n<T, 3>(rows, t, std::make_integer_sequence<int, rows_of(3)>());
  if (vectors == 2) return call_tile_n<T, 2>(rows, t, std::make_integer_sequence<int, rows_of(2)>());
  call_tile_n<T, 1>(rows, t, std::make_integer_sequence<int, rows_of(1)>());
}

template <typename T>
inline constexpr DotFunction<T> kDots[kDotRows][kDotColumns] = {
    {tile_k<T, 1, 1>, tile_k<T, 1, 2>, tile_k<T, 1, 3>},
    {tile_k<T, 2, 1>, tile_k<T, 2, 2>, tile_k<T, 2, 3>},
    {tile_k<T, 3, 1>, tile_k<T, 3, 2>, tile_k<T, 3, 3>},
    {tile_k<T, 4, 1>, tile_k<T, 4, 2>, tile_k<T, 4, 3>},
};

}  // namespace mlhead::MLHEAD_ISA
