#pragma once
#include "../../csrc/dtypes.h"
struct __nv_bfloat16 : mlhead::BFloat16 {};
inline float __bfloat162float(__nv_bfloat16 x) {
  return mlhead::to_float(static_cast<mlhead::BFloat16>(x));
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {mlhead::to_bfloat16(x)};
}
