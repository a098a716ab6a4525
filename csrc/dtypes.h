// Element types and their scalar conversions.
//
// 16-bit numbers are only ever stored: every sum runs in fp32 (fp64 for fp64) and is rounded once, to nearest even,
// when it is written. The vector conversions in simd.h must agree with these scalar ones bit for bit; test_csrc.py
// compares them.
#pragma once

#include <cstdint>
#include <cstring>

namespace mlhead {

enum class Dtype { f32, f64, f16, bf16 };
inline constexpr int kDtypes = 4;

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// The type sums of S run in.
template <typename S>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

static inline float to_float(BFloat16 x) {
  return bit_cast<float>(uint32_t(x.bits) << 16);
}

static inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));  // infinity, NaN
  // Shifting the exponent into place leaves it 112 too small; the product by 2^112 repairs it, subnormals included.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

static inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(0x7fc0)};  // NaN must not round to infinity
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

static inline Half to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    out = 0x7c00u;  // 65520 and above rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Below the smallest normal half: adding 0.5 makes the hardware round at the last bit of a subnormal half.
    out = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    out = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {uint16_t(sign | out)};
}

static inline float load_scalar(const float* p) {
  return *p;
}
static inline double load_scalar(const double* p) {
  return *p;
}
static inline float load_scalar(const Half* p) {
  return to_float(*p);
}
static inline float load_scalar(const BFloat16* p) {
  return to_float(*p);
}
static inline void store_scalar(float* p, float x) {
  *p = x;
}
static inline void store_scalar(double* p, double x) {
  *p = x;
}
static inline void store_scalar(Half* p, float x) {
  *p = to_half(x);
}
static inline void store_scalar(BFloat16* p, float x) {
  *p = to_bfloat16(x);
}

}  // namespace mlhead
