#pragma once
#include "../../csrc/dtypes.h"
struct __half : mlhead::Half {};
inline float __half2float(__half x) {
  return mlhead::to_float(static_cast<mlhead::Half>(x));
}
inline __half __float2half_rn(float x) {
  return {mlhead::to_half(x)};
}
