// Matrix products of tiles in shared memory, by blocks of THREADS threads: how a tile gets there, and how it is
// multiplied.
//
// fp16 and bf16 are multiplied on tensor cores (mma through nvcuda::wmma, sm_80 or later) and summed in fp32; fp32 and
// fp64 on the ordinary units, so fp32 is never rounded to TF32.
#pragma once

#include <cuda_runtime.h>
#include <mma.h>

#include "cuda_numbers.h"

namespace mlhead {

template <typename T>
constexpr bool kTensorCores = sizeof(T) == 2;

// A tile of OUTER x INNER elements on its way from device memory to shared memory; rows of the shared tile are padded
// by 16 bytes, so that the rows a warp reads lie in different banks.
// WHOLE: no row ends inside a vector.
template <typename T, int THREADS, int OUTER, int INNER, int WIDTH, bool WHOLE = WIDTH == 1>
struct TileStage {
  static constexpr int kPitch = INNER + 16 / int(sizeof(T));
  static constexpr int kAcross = INNER / WIDTH;    // threads along one row
  static constexpr int kRows = THREADS / kAcross;  // rows at a time
  static constexpr int kEach = OUTER / kRows;
  static_assert(kAcross * kRows == THREADS && kEach * kRows == OUTER, "every thread moves as much, in one column");
  Vector<T, WIDTH> held[kEach];

  __device__ static int inner() { return int(threadIdx.x) % kAcross * WIDTH; }
  __device__ static int outer() { return int(threadIdx.x) / kAcross; }

  // What lies outside the limits is 0. A WIDTH over 1 needs an inner stride of 1 and rows aligned to WIDTH elements.
  __device__ void load(const T* origin, int64_t outer_stride, int64_t inner_stride, int outers, int inners) {
    const int columns = inners - inner();
    const T* at = origin + outer() * outer_stride + inner() * inner_stride;
#pragma unroll
    for (int i = 0; i < kEach; ++i, at += kRows * outer_stride) {
      const bool row = outer() + i * kRows < outers;
      if (WIDTH > 1 && row && columns >= WIDTH) {
        held[i] = *reinterpret_cast<const Vector<T, WIDTH>*>(at);
      } else {
#pragma unroll
        for (int v = 0; v < WIDTH; ++v)
          held[i].x[v] = (WIDTH == 1 || !WHOLE) && row && v < columns ? at[v * inner_stride] : from_sum<T>(0);
      }
    }
  }

  __device__ void store(T* tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      *reinterpret_cast<Vector<T, WIDTH>*>(tile + (outer() + i * kRows) * kPitch + inner()) = held[i];
  }
};

// sums(M x N) += a(M x K) b(K x N) of shared tiles, kept in registers until `finish` writes them, times a factor, to
// shared memory. A_INNER_IS_K: k is the inner axis of the tile of a; B_INNER_IS_N: n is that of b. `rows` and `columns`
// say how many of M and N matter: the others may be left out.
template <typename T, int THREADS, int M, int N, int K, bool A_INNER_IS_K, bool B_INNER_IS_N,
          bool TENSOR_CORES = kTensorCores<T>>
struct TileProduct;

// Warps in two columns; a warp owns every other column, and one of so many rows, of fragments of 16 x 16.
template <typename T, int THREADS, int M, int N, int K, bool A_INNER_IS_K, bool B_INNER_IS_N>
struct TileProduct<T, THREADS, M, N, K, A_INNER_IS_K, B_INNER_IS_N, true> {
  using A = std::conditional_t<A_INNER_IS_K, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  using B = std::conditional_t<B_INNER_IS_N, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  static constexpr int kBand = THREADS / 64 * 16;  // rows that the warps cover at a time
  static constexpr int kDown = M / kBand, kAcross = N / 32;
  static_assert(M % kBand == 0 && N % 32 == 0 && K % 16 == 0, "whole fragments");
  static constexpr int kFactorPitch = 16;
  Sums sums[kDown][kAcross];

  __device__ TileProduct() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) nvcuda::wmma::fill_fragment(sums[i][j], 0.0f);
  }
  __device__ static int m(int i) { return kBand * i + int(threadIdx.x) / 64 * 16; }
  __device__ static int n(int j) { return 32 * j + int(threadIdx.x) / 32 % 2 * 16; }

  __device__ void step(const T* a, int a_pitch, const T* b, int b_pitch, int rows = M, int columns = N) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, A> fa[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        if (m(i) < rows)
          nvcuda::wmma::load_matrix_sync(fa[i], A_INNER_IS_K ? a + m(i) * a_pitch + k : a + k * a_pitch + m(i),
                                         a_pitch);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        if (n(j) >= columns) continue;
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, B> fb;
        nvcuda::wmma::load_matrix_sync(fb, B_INNER_IS_N ? b + k * b_pitch + n(j) : b + n(j) * b_pitch + k, b_pitch);
#pragma unroll
        for (int i = 0; i < kDown; ++i)
          if (m(i) < rows) nvcuda::wmma::mma_sync(sums[i][j], fa[i], fb, sums[i][j]);
      }
    }
  }

  // Multiplies every row by a factor of its own. Which thread holds which element of a fragment is not specified, but
  // it is the same for all fragments of a type: so the factors come as a tile (M x 16) of equal columns.
  __device__ void scale_rows(const float* factors) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      Sums factor;
      nvcuda::wmma::load_matrix_sync(factor, factors + m(i) * kFactorPitch, kFactorPitch, nvcuda::wmma::mem_row_major);
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int x = 0; x < Sums::num_elements; ++x) sums[i][j].x[x] *= factor.x[x];
    }
  }

  __device__ void finish(float* tile, int pitch, float factor = 1) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int x = 0; x < Sums::num_elements; ++x) sums[i][j].x[x] *= factor;
        nvcuda::wmma::store_matrix_sync(tile + m(i) * pitch + n(j), sums[i][j], pitch, nvcuda::wmma::mem_row_major);
      }
  }
};

// Threads in 16 columns; a thread owns every 16th column and one of so many rows.
template <typename T, int THREADS, int M, int N, int K, bool A_INNER_IS_K, bool B_INNER_IS_N>
struct TileProduct<T, THREADS, M, N, K, A_INNER_IS_K, B_INNER_IS_N, false> {
  static constexpr int kBand = THREADS / 16;  // rows that the threads cover at a time
  static constexpr int kDown = M / kBand, kAcross = N / 16;
  static_assert(M % kBand == 0 && N % 16 == 0, "every thread owns as much");
  static constexpr int kFactorPitch = 1;
  T sums[kDown][kAcross];

  __device__ TileProduct() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j] = T(0);
  }
  __device__ static int m(int i) { return kBand * i + int(threadIdx.x) / 16; }
  __device__ static int n(int j) { return 16 * j + int(threadIdx.x) % 16; }

  // The products of a step are summed by themselves: one sum over all of k would have three times the error at 768.
  __device__ void step(const T* a, int a_pitch, const T* b, int b_pitch, int = M, int = N) {
    T part[kDown][kAcross] = {};
#pragma unroll 4
    for (int k = 0; k < K; ++k) {
      T x[kDown], y[kAcross];
#pragma unroll
      for (int i = 0; i < kDown; ++i) x[i] = A_INNER_IS_K ? a[m(i) * a_pitch + k] : a[k * a_pitch + m(i)];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) y[j] = B_INNER_IS_N ? b[k * b_pitch + n(j)] : b[n(j) * b_pitch + k];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) part[i][j] += x[i] * y[j];
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j] += part[i][j];
  }

  __device__ void scale_rows(const T* factors) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j] *= factors[m(i)];
  }

  __device__ void finish(T* tile, int pitch, T factor = 1) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) tile[m(i) * pitch + n(j)] = sums[i][j] * factor;
  }
};

}  // namespace mlhead
