// A row of dropout_add_layer_norm.cu, as one of the threads that share it sees it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda_dropout.h"
#include "cuda_numbers.h"
#include "dropout_add_layer_norm.h"

namespace mlhead {

constexpr int kWarp = 32, kBlock = 256;  // the threads that share a row
template <int LANES>
constexpr int kThreads = LANES == kWarp ? 128 : kBlock;
// Numbers of a row that a thread keeps: half as many of fp64, and where each has an address of its own.
template <typename T, int WIDTH, int LANES>
constexpr int kHeld = (LANES == kWarp ? 32 : 16) / (sizeof(T) == 8 ? 2 : 1) / (WIDTH == 1 ? 2 : 1);
template <typename T, int WIDTH, int LANES>
constexpr int kCapacity = LANES * kHeld<T, WIDTH, LANES>;
template <typename T>
constexpr int kWidest = 16 / int(sizeof(T));

__device__ inline float inverse_root(float x) {
  return 1.0f / sqrtf(x);
}
__device__ inline double inverse_root(double x) {
  return 1.0 / sqrt(x);
}

// The sum over the threads that share a row, the same bits in all of them.
template <int LANES, typename Sum>
__device__ Sum sum_of_row(Sum x) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if constexpr (LANES > kWarp) {
    __shared__ Sum of_warps[LANES / kWarp];
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int w = 0; w < LANES / kWarp; ++w) x += of_warps[w];
    __syncthreads();
  }
  return x;
}

// One row as one of its LANES threads sees it, in vectors of WIDTH.
template <typename T, int WIDTH, int LANES>
struct LayerNormRow {
  using Sum = SumOf<T>;
  static constexpr int kVectors = kHeld<T, WIDTH, LANES> / WIDTH;
  static constexpr bool kReads = LANES > kWarp;  // whether a row may be longer than what is kept
  using Raw = Vector<T, WIDTH>;

  const LayerNormCall& p;
  const ImageDropout<Sum> image;
  int64_t b, n;
  uint32_t first_i;

  __device__ LayerNormRow(const LayerNormCall& p_, const DropoutArguments<Sum>& dropout, int64_t row)
      : p(p_), image(dropout, row / p_.N), b(row / p_.N), n(row % p_.N), first_i(uint32_t(n) * uint32_t(p_.E)) {}

  __device__ static int64_t place(int v) { return (int64_t(v) * LANES + int64_t(threadIdx.x) % LANES) * WIDTH; }
  __device__ Raw load(const LayerNormOperand& x, int64_t e) const {
    const T* const at = static_cast<const T*>(x.data) + b * x.b + n * x.n;
    if constexpr (WIDTH == 1)
      return {at[e * x.e]};
    else
      return *reinterpret_cast<const Raw*>(at + e);
  }
  // The sum of the residual and what dropout leaves of x; `kept` has a bit for each number of the vector.
  __device__ uint32_t add(const Raw& x, const Raw& residual, int64_t e, Sum (&z)[WIDTH]) const {
    uint32_t kept = 0;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const bool keep = image.keeps(first_i + uint32_t(e) + uint32_t(w));
      kept |= uint32_t(keep) << w;
      z[w] = to_sum(residual.x[w]) + to_sum(x.x[w]) * image.factor(keep);
    }
    return kept;
  }
  // A part of weight or bias.
  __device__ void parameter(const void* data, int64_t stride, int64_t e, Sum (&values)[WIDTH]) const {
    if (sizeof(T) == sizeof(Sum) || p.parameters_accumulated)
      read(static_cast<const Sum*>(data), stride, e, values);
    else
      read(static_cast<const T*>(data), stride, e, values);
  }
  __device__ void store(void* result, int64_t row, int64_t e, const Sum (&values)[WIDTH]) const {
    Raw rounded;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) rounded.x[w] = from_sum<T>(values[w]);
    *reinterpret_cast<Raw*>(static_cast<T*>(result) + row * p.E + e) = rounded;
  }

 private:
  template <typename W>
  __device__ static void read(const W* data, int64_t stride, int64_t e, Sum (&values)[WIDTH]) {
    constexpr int step = WIDTH * sizeof(W) > 16 ? 16 / int(sizeof(W)) : WIDTH;  // no load is wider than 16 bytes
#pragma unroll
    for (int first = 0; first < WIDTH; first += step) {
      Vector<W, step> some;
      if constexpr (WIDTH == 1)
        some.x[0] = data[e * stride];
      else
        some = *reinterpret_cast<const Vector<W, step>*>(data + e + first);
#pragma unroll
      for (int w = 0; w < step; ++w) values[first + w] = to_sum(some.x[w]);
    }
  }
};

}  // namespace mlhead
