// Fragments that every lane holds whole.
#pragma once
#include <cassert>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {
struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
constexpr int mem_row_major = 0;

inline float wide(__half x) {
  return __half2float(x);
}
inline float wide(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename Use, int M, int N, int K, typename T, typename Order = row_major>
struct fragment {
  static constexpr int num_elements = 256;
  float x[num_elements];  // row by row
};

inline void check_alignment(const void* p, int pitch, int element) {
  // What the hardware asks for: 32-byte aligned tiles, rows of a multiple of 16 bytes.
  assert(reinterpret_cast<uintptr_t>(p) % 32 == 0 && pitch * element % 16 == 0);
}
template <typename F>
void fill_fragment(F& f, float value) {
  for (float& x : f.x) x = value;
}
template <typename Use, typename T, typename Order>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Order>& f, const T* p, int pitch) {
  check_alignment(p, pitch, sizeof(T));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      f.x[16 * i + j] = wide(std::is_same_v<Order, row_major> ? p[i * pitch + j] : p[j * pitch + i]);
}
template <typename F>
void load_matrix_sync(F& f, const float* p, int pitch, int) {
  check_alignment(p, pitch, sizeof(float));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) f.x[16 * i + j] = p[i * pitch + j];
}
template <typename D, typename A, typename B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[16 * i + j];
      for (int k = 0; k < 16; ++k) sum += a.x[16 * i + k] * b.x[16 * k + j];
      d.x[16 * i + j] = sum;
    }
}
template <typename F>
void store_matrix_sync(float* p, const F& f, int pitch, int) {
  check_alignment(p, pitch, sizeof(float));
  if (threadIdx.x % 32) return;  // one lane writes for its warp
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) p[i * pitch + j] = f.x[16 * i + j];
}
}  // namespace nvcuda::wmma
