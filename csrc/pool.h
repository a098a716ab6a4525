// Pooling of scores on a CPU: what one call of a kernel of pool_kernels.h computes.
#pragma once

#include <cstdint>

namespace mlhead {

inline constexpr int kPoolColumns = 32;

// The scores of one image in at most kPoolColumns neighbouring columns. T is the accumulation type of S, the storage
// type; every array of T has kPoolColumns elements, of which the first `columns` count.
struct PoolTask {
  int64_t L, columns;
  const void* scores;     // S (L, columns): row l begins at l * stride_l
  void* ds;               // backward: the same, written; perhaps scores itself
  int64_t stride_l;       // in elements
  const void* scale;      // T, s = scale * score
  const void* sharpness;  // T, the temperature, 0 where it is infinite
  const void* infinite;   // T, 1 where the temperature is infinite, else 0
  const void* lam;        // T
  double average;
  void* pooled;         // forward: T, written
  const void* dlogits;  // backward: T
  void* scratch;        // 64-byte aligned: T, 2 * L * kPoolColumns elements
};

// The gradient through the division of one classifier w (D) by its norm: dw <- factor (dw - u <dw, u>) with
// u = w / |w|, in place.
struct UnitRowTask {
  int64_t D;
  const void* weight;  // S
  int64_t stride_d;    // of weight, in elements; dw is contiguous
  double norm;         // |w|
  bool divide;         // factor is 1 / |w|, else 1
  void* dw;            // S, or T, the accumulation type of S
  void* scratch;       // T, D elements
};

}  // namespace mlhead
