// Vectors of one register's width, through the vector extensions of GCC and Clang.
//
// Included by gemm_kernels.h once for each instruction set, inside its own namespace and under its own compiler flags:
// MLHEAD_VECTOR_BYTES says how wide a register is. No function of the standard library may be called from here on: the
// linker keeps one copy of an inline function, and it could be the copy compiled for AVX-512.
#pragma once

#include "dtypes.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MLHEAD_INLINE static inline __attribute__((always_inline))

namespace mlhead::MLHEAD_ISA {

template <typename T>
inline constexpr int kLanes = MLHEAD_VECTOR_BYTES / int(sizeof(T));

template <typename T, int L>
struct VectorOf {
  typedef T type __attribute__((vector_size(L * sizeof(T)), may_alias));
  typedef T unaligned __attribute__((vector_size(L * sizeof(T)), may_alias, aligned(alignof(T))));
};
template <typename T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

MLHEAD_INLINE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
MLHEAD_INLINE int64_t max(int64_t a, int64_t b) {
  return a > b ? a : b;
}
MLHEAD_INLINE int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
MLHEAD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, kLanes<T>>::unaligned*>(p);
}
template <typename T>
MLHEAD_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T, kLanes<T>>::unaligned*>(p) = x;
}

// 16-bit storage: widened on the way in, rounded to nearest even on the way out, as the scalar functions of dtypes.h
// do.
using Bits16 = VectorOf<uint16_t, kLanes<float>>;
using Bits32 = VectorOf<uint32_t, kLanes<float>>;
using Signed32 = VectorOf<int32_t, kLanes<float>>;

MLHEAD_INLINE Vec<float> load(const BFloat16* p) {
  const typename Bits16::type x = *reinterpret_cast<const typename Bits16::unaligned*>(p);
  return Vec<float>(__builtin_convertvector(x, typename Bits32::type) << 16);
}
MLHEAD_INLINE void store(BFloat16* p, Vec<float> x) {
  const typename Bits32::type bits = typename Bits32::type(x);
  const typename Bits32::type rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const typename Bits32::type nan = typename Bits32::type(typename Signed32::type(bits & 0x7fffffffu) > 0x7f800000);
  const typename Bits32::type out = (nan & 0x7fc0u) | (~nan & rounded);
  *reinterpret_cast<typename Bits16::unaligned*>(p) = __builtin_convertvector(out, typename Bits16::type);
}

MLHEAD_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__) && MLHEAD_VECTOR_BYTES == 64
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && MLHEAD_VECTOR_BYTES == 32
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
MLHEAD_INLINE void store(Half* p, Vec<float> x) {
#if defined(__AVX512F__) && MLHEAD_VECTOR_BYTES == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && MLHEAD_VECTOR_BYTES == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_half(x[i]);
#endif
}

// shuffle<I...>(a, b): element i of the result is element I_i of a followed by b.
#if defined(__clang__)
template <int... I, typename V>
MLHEAD_INLINE V shuffle(V a, V b) {
  return __builtin_shufflevector(a, b, I...);
}
#else
template <int... I, typename V>
MLHEAD_INLINE V shuffle(V a, V b) {
  using Index = typename VectorOf<std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>, sizeof...(I)>::type;
  return __builtin_shuffle(a, b, Index{I...});
}
#endif

// Exchanges blocks of S elements between two rows: the step of a transposition (bit log2 S of row and column change
// places).
template <int S, typename V, int... I>
MLHEAD_INLINE void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  const V low = shuffle<((I & S) ? L + I - S : I)...>(a, b);
  const V high = shuffle<((I & S) ? L + I : I + S)...>(a, b);
  a = low;
  b = high;
}

template <typename T, int S = kLanes<T> / 2>
MLHEAD_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 32
  for (int i = 0; i < L; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, L>());
  if constexpr (S > 1) transpose<T, S / 2>(rows);
}

template <int S, typename V, int... I>
MLHEAD_INLINE V rotated(V x, std::integer_sequence<int, I...>) {
  return shuffle<((I + S) % int(sizeof...(I)))...>(x, x);
}

// Sum of all lanes, in an order that depends on nothing.
template <typename T, int S = kLanes<T> / 2>
MLHEAD_INLINE T sum_of_lanes(Vec<T> x) {
  x += rotated<S>(x, std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (S > 1) return sum_of_lanes<T, S / 2>(x);
  return x[0];
}

}  // namespace mlhead::MLHEAD_ISA
