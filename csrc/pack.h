// Copies between strided memory and small contiguous blocks of the accumulation type, converting and transposing on the
// way. Included by gemm_kernels.h, once for each instruction set.
#pragma once

#include "simd.h"

namespace mlhead::MLHEAD_ISA {

// dst[r * ld + c] = src[r * s_r + c * s_c], in registers of L x L elements where one source axis is contiguous.
//
// Whole registers are also read where fewer elements are wanted, as long as they end before the last element of the
// block does: the surplus is other elements of the same matrix, and is not kept.
template <typename S, typename T>
static void copy_block(int64_t rows, int64_t columns, const S* src, int64_t s_r, int64_t s_c, T* dst, int64_t ld) {
  constexpr int L = kLanes<T>;
  if (s_c == 1) {
    const int64_t whole = columns - columns % L;
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = src + r * s_r;
      T* to = dst + r * ld;
      for (int64_t c = 0; c < whole; c += L) store(to + c, load(from + c));
      for (int64_t c = whole; c < columns; ++c) to[c] = load_scalar(from + c);
    }
    return;
  }
  int64_t done = 0;  // columns
  if (s_r == 1)
    for (; done + L <= columns; done += L) {
      const S* from = src + done * s_c;
      int64_t r = 0;
      for (; r < rows; r += L) {
        if (r + L > rows && r + (L - 1) * s_c + L > (columns - 1 - done) * s_c + rows) break;
        Vec<T> x[L];
#pragma GCC unroll 32
        for (int i = 0; i < L; ++i) x[i] = load(from + r + i * s_c);
        transpose<T>(x);
        if (r + L <= rows) {
#pragma GCC unroll 32
          for (int i = 0; i < L; ++i) store(dst + (r + i) * ld + done, x[i]);
        } else {
          for (int64_t i = 0; r + i < rows; ++i) store(dst + (r + i) * ld + done, x[i]);
        }
      }
      for (; r < rows; ++r)
        for (int64_t i = 0; i < L; ++i) dst[r * ld + done + i] = load_scalar(from + r + i * s_c);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = done; c < columns; ++c) dst[r * ld + c] = load_scalar(src + r * s_r + c * s_c);
}

// Rows of `valid` contiguous elements, each padded with zeros to `width`, whole registers.
template <typename S, typename T>
static void copy_padded(int64_t rows, int64_t valid, int64_t width, const S* src, int64_t s_r, T* dst) {
  constexpr int L = kLanes<T>;
  const int64_t last = (rows - 1) * s_r + valid;  // where the block ends
  for (int64_t c = 0; c < width; c += L) {
    T kept[L], lanes[L];
    for (int64_t i = 0; i < L; ++i) kept[i] = c + i < valid ? T(1) : T(0);
    const auto mask = load(kept) != Vec<T>{};
    int64_t r = 0;
    for (; r < rows && r * s_r + c + L <= last; ++r) {
      const Vec<T> x = load(src + r * s_r + c);
      store(dst + r * width + c, mask ? x : Vec<T>{});
    }
    for (; r < rows; ++r) {
      for (int64_t i = 0; i < L; ++i) lanes[i] = c + i < valid ? load_scalar(src + r * s_r + c + i) : T(0);
      store(dst + r * width + c, load(lanes));
    }
  }
}

// Rows of V whole registers, to contiguous memory.
template <typename S, typename T, int V>
static void copy_rows(int64_t rows, const S* src, int64_t s_r, T* dst) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(dst + (r * V + v) * L, load(src + r * s_r + v * L));
}

// dst[r * d_r + c * d_c] = src[r * ld + c], rounding to the storage type; the mirror image of copy_block.
template <typename T, typename S>
static void write_block(int64_t rows, int64_t columns, const T* src, int64_t ld, S* dst, int64_t d_r, int64_t d_c) {
  constexpr int L = kLanes<T>;
  if (d_c == 1) {
    const int64_t whole = columns - columns % L;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = src + r * ld;
      S* to = dst + r * d_r;
      for (int64_t c = 0; c < whole; c += L) store(to + c, load(from + c));
      for (int64_t c = whole; c < columns; ++c) store_scalar(to + c, from[c]);
    }
    return;
  }
  int64_t whole_r = 0;
  const int64_t whole_c = columns - columns % L;
  if (d_r == 1) {
    whole_r = rows - rows % L;
    for (int64_t c = 0; c < whole_c; c += L)
      for (int64_t r = 0; r < whole_r; r += L) {
        Vec<T> x[L];
#pragma GCC unroll 32
        for (int i = 0; i < L; ++i) x[i] = load(src + (r + i) * ld + c);
        transpose<T>(x);
#pragma GCC unroll 32
        for (int i = 0; i < L; ++i) store(dst + r + (c + i) * d_c, x[i]);
      }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_r ? whole_c : 0; c < columns; ++c)
      store_scalar(dst + r * d_r + c * d_c, src[r * ld + c]);
}

}  // namespace mlhead::MLHEAD_ISA
