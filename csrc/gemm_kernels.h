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

#include "gemm.h"
#include "micro_kernel.h"
#include "pack.h"

namespace mlhead::MLHEAD_ISA {

// Hands out parts of the thread's scratch block, each aligned to a cache line.
struct Scratch {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += divide_up(count * int64_t(sizeof(T)), 64) * 64;
    return p;
  }
};

template <typename S, typename T>
static void run_n(const Gemm& g, const Plan& plan, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  constexpr int L = kLanes<T>;
  const int64_t rows = m1 - m0, columns = n1 - n0;
  const int64_t vectors = divide_up(columns, L);
  const int64_t panels = divide_up(vectors, kVectors);
  const int64_t blocks_k = max(1, divide_up(g.K, plan.block_k));
  const int64_t block_k = divide_up(g.K, blocks_k);
  const int64_t block_m = min(plan.block_m, rows);
  const int64_t width = vectors * L;
  const int64_t c_rows = plan.scratch_c ? (blocks_k == 1 ? block_m : rows) : 0;

  Scratch scratch{static_cast<char*>(
      thread_scratch(256 + int64_t(sizeof(T)) * ((block_k + c_rows) * width + (plan.pack_a ? block_m * block_k : 0))))};
  T* packed_b = scratch.take<T>(block_k * width);
  T* packed_a = scratch.take<T>(plan.pack_a ? block_m * block_k : 0);
  T* scratch_c = scratch.take<T>(c_rows * width);

  const S* b = static_cast<const S*>(g.b) + n0 * g.b_n;
  const T* bias = static_cast<const T*>(g.bias);
  for (int64_t kb = 0; kb < blocks_k; ++kb) {
    const int64_t k0 = kb * block_k;
    const int64_t K = min(block_k, g.K - k0);
    // Panels share the registers evenly: 5 make 3 + 2, never 3 + 1 + 1, for a panel of one register is bound by
    // latency.
    const auto first_vector = [&](int64_t p) { return p * vectors / panels; };
    const auto in_place = [&](int64_t p) { return !plan.pack_b && first_vector(p + 1) * L <= columns; };
    for (int64_t p = 0; p < panels; ++p) {
      if (in_place(p)) continue;
      const int64_t v0 = first_vector(p), w = (first_vector(p + 1) - v0) * L;
      const int64_t valid = min(w, columns - v0 * L);
      T* to = packed_b + v0 * L * block_k;
      copy_block<S, T>(K, valid, b + k0 * g.b_k + v0 * L * g.b_n, g.b_k, g.b_n, to, w);
      if (valid < w)
        for (int64_t k = 0; k < K; ++k)
          for (int64_t i = valid; i < w; ++i) to[k * w + i] = 0;
    }
    for (int64_t mb = 0; mb < rows; mb += block_m) {
      const int64_t here = min(block_m, rows - mb);
      const S* a_from = static_cast<const S*>(g.a) + (m0 + mb) * g.a_m + k0 * g.a_k;
      const T* a = reinterpret_cast<const T*>(a_from);  // if S is T
      int64_t a_m = g.a_m, a_k = g.a_k;
      if (plan.pack_a) {  // along the axis that is contiguous already
        a = packed_a;
        a_m = g.a_m == 1 ? 1 : block_k;
        a_k = g.a_m == 1 ? block_m : 1;
        if (g.a_m == 1)
          copy_block<S, T>(K, here, a_from, g.a_k, 1, packed_a, block_m);
        else
          copy_block<S, T>(here, K, a_from, g.a_m, g.a_k, packed_a, block_k);
      }
      T* c =
          plan.scratch_c ? scratch_c + (blocks_k == 1 ? 0 : mb * width) : static_cast<T*>(g.c) + (m0 + mb) * g.c_m + n0;
      const int64_t c_m = plan.scratch_c ? width : g.c_m;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t v0 = first_vector(p), count = first_vector(p + 1) - v0;
        const bool direct = in_place(p);
        Tile<T> t;
        t.K = K;
        t.a_m = a_m;
        t.a_k = a_k;
        t.b = direct ? reinterpret_cast<const T*>(b) + k0 * g.b_k + v0 * L : packed_b + v0 * L * block_k;
        t.b_k = direct ? g.b_k : count * L;
        t.c_m = c_m;
        t.columns = min(count * L, columns - v0 * L);
        t.bias = bias && kb == blocks_k - 1 ? bias + n0 + v0 * L : nullptr;
        t.accumulate = kb > 0;
        for (int64_t m = 0; m < here; m += kRows) {
          t.a = a + m * a_m;
          t.c = c + m * c_m + v0 * L;
          call_tile_n<T>(min(kRows, here - m), count, t);
        }
      }
      if (plan.scratch_c && kb == blocks_k - 1)
        write_block<T, S>(here, columns, c, width, static_cast<S*>(g.c) + (m0 + mb) * g.c_m + n0 * g.c_n, g.c_m, g.c_n);
    }
  }
}

template <typename S, typename T>
static void run_k(const Gemm& g, const Plan& plan, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t rows = m1 - m0, columns = n1 - n0;
  const int64_t blocks_k = max(1, divide_up(g.K, plan.block_k));
  const int64_t block_k = divide_up(g.K, blocks_k);
  const int64_t block_m = min(plan.block_m, rows);

  Scratch scratch{static_cast<char*>(
      thread_scratch(256 + int64_t(sizeof(T)) * (columns * rows + (plan.pack_b ? columns : 0) * block_k +
                                                 (plan.pack_a ? block_m : 0) * block_k)))};
  T* sums = scratch.take<T>(columns * rows);
  T* packed_b = scratch.take<T>(plan.pack_b ? columns * block_k : 0);
  T* packed_a = scratch.take<T>(plan.pack_a ? block_m * block_k : 0);

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

inline constexpr Kernels kKernels = {
    MLHEAD_ISA_NAME,
    MLHEAD_VECTOR_BYTES,
    {run_tile<float>, run_tile<double>, run_tile<Half>, run_tile<BFloat16>},
    {column_sum<float>, column_sum<double>, column_sum<Half>, column_sum<BFloat16>},
};

}  // namespace mlhead::MLHEAD_ISA
