// The counter-based dropout of reference/_dropout.py on a CPU: the keys of an image.
#pragma once

#include <cstdint>

namespace mlhead {

struct Dropout {
  bool active;
  uint32_t key0, key1, threshold;
  double kept;  // what survives is multiplied by this
};

inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// `seed` is null where nothing is dropped.
inline Dropout dropout_of_image(const int64_t* seed, double dropout_p, int64_t b) {
  if (seed == nullptr) return {false, 0, 0, 0, 1.0};
  const uint64_t bits = uint64_t(*seed);
  const uint32_t key0 = mix(mix(uint32_t(bits) + uint32_t(b)) + uint32_t(bits >> 32));
  const double scaled = dropout_p * 4294967296.0;
  const uint32_t threshold = scaled < 4294967295.0 ? uint32_t(scaled) : 4294967295u;
  return {true, key0, mix(key0 + 1), threshold, 1.0 / (1.0 - dropout_p)};
}

}  // namespace mlhead
