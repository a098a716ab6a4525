// The body of one instruction set: compiled as gemm_baseline.cpp, gemm_avx2.cpp and gemm_avx512.cpp.
//
// Blocking of a tile, vectors along n (numbers for fp32 and AVX2):
//   * a pass over block_k (<= 256) values of k: a panel of B, 256 x 24 numbers, is 24 KiB and stays in L1;
//   * the panel meets the rows of A four at a time; block_m rows of A x block_k stay in L2;
//   * B is read in place if its rows are contiguous and close together; a ragged last panel, 16-bit storage, a
//   transposed B and rows far apart
//     (one page each: the TLB would miss at every step) are copied to scratch first, zero-padded to whole registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "class_loss_kernels.h"
#include "gemm.h"
#include "micro_kernel.h"
#include "pack.h"
#include "pool_kernels.h"
#include "rows_kernels.h"

namespace mlhead::MLHEAD_ISA {

inline constexpr int kFewColumns = 3;

// Three parts of the thread's scratch block, each aligned to a cache line.
template <typename T>
struct Scratch {
  T* part[3];
  Scratch(int64_t count0, int64_t count1, int64_t count2, int block = kProductScratch) {
    constexpr int64_t line = 64 / int64_t(sizeof(T));
    const int64_t begin1 = divide_up(count0, line) * line, begin2 = begin1 + divide_up(count1, line) * line;
    part[0] = static_cast<T*>(thread_scratch((begin2 + count2) * int64_t(sizeof(T)), block));
    part[1] = part[0] + begin1;
    part[2] = part[0] + begin2;
  }
};

// The registers of a row of B, shared out evenly over panels: 5 make 3 + 2, never 3 + 1 + 1, for a tile of one register
// is bound by its loads.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t vectors_) : vectors(vectors_), count(divide_up(vectors_, kVectors)) {}
  int64_t first(int64_t p) const { return divide_up(p * vectors, count); }
  int64_t width(int64_t p) const { return first(p + 1) - first(p); }
};

// Copies K rows of B to panels of contiguous numbers, zero-padded to whole registers.
template <typename S, typename T>
static void pack_panels(int64_t K, const S* b, int64_t b_k, int64_t b_n, int64_t columns, const Panels& panels,
                        T* packed, int64_t block_k) {
  constexpr int L = kLanes<T>;
  const int64_t some = panels.count == 1 ? K : 2 * L;  // rows at a time over all panels: a row is fetched once
  for (int64_t k0 = 0; k0 < K; k0 += some)
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t v0 = panels.first(p), w = panels.width(p) * L;
      const int64_t rows = min(some, K - k0), valid = min(w, columns - v0 * L);
      T* to = packed + v0 * L * block_k + k0 * w;
      const S* from = b + k0 * b_k + v0 * L * b_n;
      if (b_n == 1 && valid == w) {
        if (w == 3 * L) copy_rows<S, T, 3>(rows, from, b_k, to);
        if (w == 2 * L) copy_rows<S, T, 2>(rows, from, b_k, to);
        if (w == L) copy_rows<S, T, 1>(rows, from, b_k, to);
        continue;
      }
      if (b_n == 1 && b_k >= 0) {
        copy_padded<S, T>(rows, valid, w, from, b_k, to);
        continue;
      }
      copy_block<S, T>(rows, valid, from, b_k, b_n, to, w);
      for (int64_t k = 0; k < rows; ++k)
        for (int64_t i = valid; i < w; ++i) to[k * w + i] = 0;
    }
}

// One block of A as the micro-kernels see it: in place or packed, of type T in any case.
template <typename T>
struct BlockA {
  const T* data;
  int64_t rows, m, k;  // strides m and k
};

template <typename S, typename T>
static BlockA<T> block_of_a(const Gemm& g, bool pack, int64_t m0, int64_t rows, int64_t k0, int64_t K, T* packed) {
  const S* from = static_cast<const S*>(g.a) + m0 * g.a_m + k0 * g.a_k;
  if (!pack) return {reinterpret_cast<const T*>(from), rows, g.a_m, g.a_k};  // S is T
  if (g.a_m == 1) {                                                          // along the axis that is contiguous
    copy_block<S, T>(K, rows, from, g.a_k, 1, packed, rows);
    return {packed, rows, 1, rows};
  }
  copy_block<S, T>(rows, K, from, g.a_m, g.a_k, packed, K);
  return {packed, rows, K, 1};
}

// One column of C, for the one to three that would leave a register almost empty (J = 97 is 12 registers and one
// column): dot products along k, or sums of scaled columns of A, whichever way A is contiguous. `b` is the column of B.
template <typename T>
static void run_column(const BlockA<T>& a, int64_t K, const T* b, T* c, int64_t c_m, bool accumulate, T bias) {
  constexpr int64_t some = 4 * kVectors * kLanes<T>;
  T sums[some];
  for (int64_t m0 = 0; m0 < a.rows; m0 += some) {
    const int64_t rows = min(some, a.rows - m0);
    const T* from = a.data + m0 * a.m;
    if (a.k == 1) {
      for (int64_t m = 0; m < rows; m += kDotRows) {
        const DotTile<T> t{K, from + m * a.m, a.m, b, 0, sums + m, 1, false};
        kDots<T>[min(kDotRows, rows - m) - 1][0](t);
      }
    } else {
      const int64_t whole = a.m == 1 ? rows - rows % kLanes<T> : 0;
      for (int64_t m = 0; m < whole; m += kVectors * kLanes<T>) {
        const int64_t vectors = min(kVectors, (whole - m) / kLanes<T>);
        const Tile<T> t{K, b, 0, 1, from + m, a.k, nullptr, sums + m, 0, 0, vectors * kLanes<T>, nullptr, false, 1};
        call_tile_n<T, T>(1, vectors, false, t);
      }
      for (int64_t m = whole; m < rows; ++m) {
        sums[m] = 0;
        for (int64_t k = 0; k < K; ++k) sums[m] += from[m * a.m + k * a.k] * b[k];
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      T& out = c[(m0 + m) * c_m];
      out = sums[m] + (accumulate ? out : T(0)) + bias;
    }
  }
}

template <typename S, typename T>
static void run_n(const Gemm& g, const Plan& plan, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int L = kLanes<T>;
  const int64_t rows = m1 - m0, columns = n1 - n0;
  const int64_t few = columns > L && columns % L <= kFewColumns ? columns % L : 0;  // computed by run_column
  const Panels panels(divide_up(columns - few, L));
  const int64_t width = panels.vectors * L;
  const int64_t blocks_k = max(1, divide_up(g.K, plan.block_k));
  const int64_t block_k = divide_up(g.K, blocks_k);
  const int64_t block_m = divide_up(rows, divide_up(rows, plan.block_m));
  // A block of so few rows reads B once and would never pack it, which 16-bit elements need.
  const int64_t last_rows = rows - (divide_up(rows, block_m) - 1) * block_m;
  const bool pack_b =
      plan.pack_b || columns < panels.width(panels.count - 1) * L || (!std::is_same_v<S, T> && last_rows <= rows_of(1));
  const int64_t c_width = width + few, c_rows = plan.scratch_c ? (blocks_k == 1 ? block_m : rows) : 0;

  Scratch<T> scratch(block_k * ((pack_b ? width : kVectors * L) + few), plan.pack_a ? block_m * block_k : 0,
                     c_rows * c_width);
  T *packed_b = scratch.part[0], *packed_a = scratch.part[1], *scratch_c = scratch.part[2];
  T* const b_columns = packed_b + block_k * (pack_b ? width : kVectors * L);

  const S* b_all = static_cast<const S*>(g.b) + n0 * g.b_n;
  for (int64_t kb = 0; kb < blocks_k; ++kb) {
    const int64_t k0 = kb * block_k, K = min(block_k, g.K - k0);
    const bool last = kb == blocks_k - 1;
    const S* b = b_all + k0 * g.b_k;
    const T* bias = g.bias && last ? static_cast<const T*>(g.bias) + n0 : nullptr;
    if (pack_b) pack_panels<S, T>(K, b, g.b_k, g.b_n, columns - few, panels, packed_b, block_k);
    if (few) copy_block<S, T>(few, K, b + (columns - few) * g.b_n, g.b_n, g.b_k, b_columns, K);

    for (int64_t mb = 0; mb < rows; mb += block_m) {
      const BlockA<T> a = block_of_a<S, T>(g, plan.pack_a, m0 + mb, min(block_m, rows - mb), k0, K, packed_a);
      T* c = plan.scratch_c ? scratch_c + (blocks_k == 1 ? 0 : mb * c_width)
                            : static_cast<T*>(g.c) + (m0 + mb) * g.c_m + n0;
      const int64_t c_m = plan.scratch_c ? c_width : g.c_m;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t v0 = panels.first(p), vectors = panels.width(p), w = vectors * L;
        // In place, the last panel is pushed back to end with the last column, and skips what its neighbour computed.
        const int64_t n = pack_b ? v0 * L : min(v0 * L, columns - few - w);
        Tile<T> t;
        t.K = K;
        t.a_m = a.m;
        t.a_k = a.k;
        t.packed = packed_b;
        t.c_m = c_m;
        t.begin = v0 * L - n;
        t.end = min(w, columns - few - n);
        t.bias = bias ? bias + n : nullptr;
        t.accumulate = kb > 0 || g.accumulate;
        const int64_t step = rows_of(int(vectors));
        for (int64_t m = 0; m < a.rows; m += step * t.count) {
          const bool first = m == 0 && !pack_b;  // reads B in place, and packs it if more rows follow
          t.count = first ? 1 : max(1, (a.rows - m) / step);
          t.b = first ? static_cast<const void*>(b + n) : packed_b + (pack_b ? v0 * L * block_k : 0);
          t.b_k = first ? g.b_k : w;
          t.a = a.data + m * a.m;
          t.c = c + m * c_m + n;
          call_tile_n<T, S>(min(step, a.rows - m), vectors, first && a.rows > step, t);
        }
      }
      for (int64_t n = columns - few, i = 0; n < columns; ++n, ++i)
        run_column<T>(a, K, b_columns + i * K, c + n, c_m, kb > 0 || g.accumulate, bias ? bias[n] : T(0));
      if (plan.scratch_c && last)
        write_block<T, S>(a.rows, columns, c, c_width, static_cast<S*>(g.c) + (m0 + mb) * g.c_m + n0 * g.c_n, g.c_m,
                          g.c_n);
    }
  }
}

template <typename S, typename T>
static void run_k(const Gemm& g, const Plan& plan, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t rows = m1 - m0, columns = n1 - n0;
  const int64_t blocks_k = max(1, divide_up(g.K, plan.block_k));
  const int64_t block_k = divide_up(g.K, blocks_k);
  const int64_t block_m = min(plan.block_m, rows);

  Scratch<T> scratch(columns * rows, plan.pack_b ? columns * block_k : 0, plan.pack_a ? block_m * block_k : 0);
  T *sums = scratch.part[0], *packed_b = scratch.part[1], *packed_a = scratch.part[2];

  for (int64_t kb = 0; kb < blocks_k; ++kb) {
    const int64_t k0 = kb * block_k;
    const int64_t K = min(block_k, g.K - k0);
    const S* b_from = static_cast<const S*>(g.b) + n0 * g.b_n + k0 * g.b_k;
    if (plan.pack_b) copy_block<S, T>(columns, K, b_from, g.b_n, g.b_k, packed_b, block_k);
    const T* b = plan.pack_b ? packed_b : reinterpret_cast<const T*>(b_from);
    const int64_t b_n = plan.pack_b ? block_k : g.b_n;
    for (int64_t mb = 0; mb < rows; mb += block_m) {
      const int64_t here = min(block_m, rows - mb);
      const S* a_from = static_cast<const S*>(g.a) + (m0 + mb) * g.a_m + k0 * g.a_k;
      if (plan.pack_a) copy_block<S, T>(here, K, a_from, g.a_m, g.a_k, packed_a, block_k);
      const T* a = plan.pack_a ? packed_a : reinterpret_cast<const T*>(a_from);
      const int64_t a_m = plan.pack_a ? block_k : g.a_m;
      for (int64_t m = 0; m < here; m += kDotRows)
        for (int64_t n = 0; n < columns; n += kDotColumns) {
          const DotTile<T> t{K, a + m * a_m, a_m, b + n * b_n, b_n, sums + (mb + m) * columns + n, columns, kb > 0};
          kDots<T>[min(kDotRows, here - m) - 1][min(kDotColumns, columns - n) - 1](t);
        }
    }
  }
  if (g.bias)
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < columns; ++n) sums[m * columns + n] += static_cast<const T*>(g.bias)[n0 + n];
  write_block<T, S>(rows, columns, sums, columns, static_cast<S*>(g.c) + m0 * g.c_m + n0 * g.c_n, g.c_m, g.c_n);
}

template <typename S>
static void run_tile(const Gemm& gemm, const Plan& plan, int64_t tile) {
  using T = typename Accumulate<S>::type;
  const Gemm g = plan.axis == VectorAxis::m ? exchanged(gemm) : gemm;
  const int64_t m0 = tile / plan.tiles_n * plan.tile_m, n0 = tile % plan.tiles_n * plan.tile_n;
  const int64_t m1 = min(m0 + plan.tile_m, g.M), n1 = min(n0 + plan.tile_n, g.N);
  if (m0 >= m1 || n0 >= n1) return;  // a ragged group has fewer columns than the plan was made for
  if (plan.axis == VectorAxis::k)
    run_k<S, T>(g, plan, m0, m1, n0, n1);
  else
    run_n<S, T>(g, plan, m0, m1, n0, n1);
}

// Sums in two levels, 16 rows and then their sums: the rounding error grows with rows / 16 instead of rows.
template <typename S>
static void column_sum(const void* x, int64_t rows, int64_t columns, int64_t stride_row, int64_t stride_column,
                       void* out) {
  using T = typename Accumulate<S>::type;
  constexpr int64_t block = 512, few = 16;
  T row[block], partial[block], sums[block];
  for (int64_t c0 = 0; c0 < columns; c0 += block) {
    const int64_t here = min(block, columns - c0);
    for (int64_t c = 0; c < here; ++c) sums[c] = 0;
    for (int64_t r0 = 0; r0 < rows; r0 += few) {
      for (int64_t c = 0; c < here; ++c) partial[c] = 0;
      for (int64_t r = r0; r < min(r0 + few, rows); ++r) {
        copy_block<S, T>(1, here, static_cast<const S*>(x) + r * stride_row + c0 * stride_column, 0, stride_column, row,
                         block);
        for (int64_t c = 0; c < here; ++c) partial[c] += row[c];
      }
      for (int64_t c = 0; c < here; ++c) sums[c] += partial[c];
    }
    write_block<T, S>(1, here, sums, block, static_cast<S*>(out) + c0, 0, 1);
  }
}

}  // namespace mlhead::MLHEAD_ISA

#include "attention_kernels.h"

namespace mlhead::MLHEAD_ISA {

inline constexpr Kernels kKernels = {
    MLHEAD_ISA_NAME,
    MLHEAD_VECTOR_BYTES,
    {run_tile<float>, run_tile<double>, run_tile<Half>, run_tile<BFloat16>},
    {column_sum<float>, column_sum<double>, column_sum<Half>, column_sum<BFloat16>},
    {pool<float>, pool<double>, pool<Half>, pool<BFloat16>},
    {pool_backward<float>, pool_backward<double>, pool_backward<Half>, pool_backward<BFloat16>},
    {unit_row_backward<float, float>, unit_row_backward<double, double>, unit_row_backward<Half, Half>,
     unit_row_backward<BFloat16, BFloat16>},
    {unit_row_backward<float, float>, unit_row_backward<double, double>, unit_row_backward<Half, float>,
     unit_row_backward<BFloat16, float>},
    {norm_row<float>, norm_row<double>, norm_row<Half>, norm_row<BFloat16>},
    {norm_row_backward<float>, norm_row_backward<double>, norm_row_backward<Half>, norm_row_backward<BFloat16>},
    {relu_row<float>, relu_row<double>, relu_row<Half>, relu_row<BFloat16>},
    {relu_row_backward<float>, relu_row_backward<double>, relu_row_backward<Half>, relu_row_backward<BFloat16>},
    {loss_row<float>, loss_row<double>, loss_row<float>, loss_row<float>},
    {softmax_row<float>, softmax_row<double>, softmax_row<float>, softmax_row<float>},
    {attend_forward<float>, attend_forward<double>, attend_forward<Half>, attend_forward<BFloat16>},
    {attend_backward<float>, attend_backward<double>, attend_backward<Half>, attend_backward<BFloat16>},
    {pack_queries<float>, pack_queries<double>, pack_queries<Half>, pack_queries<BFloat16>},
    {packed_bytes<float>, packed_bytes<double>, packed_bytes<Half>, packed_bytes<BFloat16>},
};

}  // namespace mlhead::MLHEAD_ISA
