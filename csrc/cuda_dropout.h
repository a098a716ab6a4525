// Dropout by counting, on a GPU: the bits of mlhead/reference/_dropout.py.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace mlhead {

// What a launch needs of the dropout.
template <typename Sum>
struct DropoutArguments {
  const int64_t* seed;  // in device memory; null where nothing is dropped
  uint32_t threshold;   // a random number at least this is kept
  Sum kept;             // what kept numbers are multiplied by

  DropoutArguments(const int64_t* seed_, double dropout_p)
      : seed(seed_),
        threshold(uint32_t(std::fmin(dropout_p * 4294967296.0, 4294967295.0))),
        kept(Sum(1.0 / (1.0 - dropout_p))) {}
};

// What survives of one image.
template <typename Sum>
class ImageDropout {
 public:
  __device__ ImageDropout(const DropoutArguments<Sum>& p, int64_t b)
      : active_(p.seed != nullptr), threshold_(p.threshold), kept_(p.kept) {
    if (!active_) return;
    const uint64_t seed = uint64_t(*p.seed);
    key0_ = mix(mix(uint32_t(seed) + uint32_t(b)) + uint32_t(seed >> 32));
    key1_ = mix(key0_ + 1);
  }

  __device__ bool keeps(uint32_t i) const {
    if (!active_) return true;
    uint32_t u = i + key0_;
    u = ((u ^ (u >> 16)) * 0x7feb352du) ^ key1_;
    u = (u ^ (u >> 15)) * 0x846ca68bu;
    return (u ^ (u >> 16)) >= threshold_;
  }
  // A factor and not a selection: what is not finite stays so, as in plain torch.
  __device__ Sum factor(bool keep) const { return !active_ ? Sum(1) : keep ? kept_ : Sum(0); }

 private:
  __device__ static uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
  }
  bool active_;
  uint32_t key0_ = 0, key1_ = 0, threshold_;
  Sum kept_;
};

}  // namespace mlhead
