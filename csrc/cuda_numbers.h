// What every .cu file needs: the type sums run in, conversions to and from it, vectors, and the arithmetic of grids.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace mlhead {

__host__ __device__ inline int64_t smaller(int64_t x, int64_t y) {
  return x < y ? x : y;
}
__host__ __device__ inline int64_t tiles(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

template <typename T>
using SumOf = std::conditional_t<std::is_same<T, double>::value, double, float>;

template <typename T>
__device__ T from_sum(SumOf<T> x) {
  if constexpr (std::is_same<T, __half>::value)
    return __float2half_rn(x);
  else if constexpr (std::is_same<T, __nv_bfloat16>::value)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <typename T>
__device__ SumOf<T> to_sum(T x) {
  if constexpr (std::is_same<T, __half>::value)
    return __half2float(x);
  else if constexpr (std::is_same<T, __nv_bfloat16>::value)
    return __bfloat162float(x);
  else
    return x;
}

template <typename T, int Width>
struct alignas(sizeof(T) * Width) Vector {
  T x[Width];
};

}  // namespace mlhead
