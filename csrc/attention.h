// Cross-attention on a CPU: what one call of a kernel of attention_kernels.h computes.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace mlhead {

// A matrix in the storage type; strides in elements.
struct Matrix {
  const void* data;
  int64_t rows, columns;
};

// Queries of one head are taken in blocks of equal size, so that a block's scores stay in the caches.
struct QueryBlocks {
  int64_t G, count;
  QueryBlocks(int64_t G_, int64_t most) : G(G_), count((G_ + most - 1) / most) {}
  int64_t first(int64_t i) const { return i * G / count; }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }
};

// One head of one image. S is the storage type, T its accumulation type; d is the width of the head.
struct AttentionTask {
  int64_t G, L, d;
  double scale;      // 1 / sqrt(d)
  Matrix q, k, v;    // S, strides of (g, e) and (l, e)
  const bool* mask;  // (L), or null
  int64_t mask_l;
  Dropout dropout;
  uint32_t first_query;  // h G: number of the first query of this head
  int64_t most_queries;  // of a block
  const void* packed;    // what pack_queries left for this head; or null, then it is done here

  int64_t block;  // forward: which block of queries
  void* out;      // forward: S, row g begins at g * out_g, contiguous
  int64_t out_g;
  void* kept;  // T (2, G): the largest score of each query and 1 / sum of exponentials; written forward

  Matrix dout, kept_out;  // backward: S
  void *dk, *dv;          // S, row l begins at l * dk_l, contiguous; or null where not needed
  int64_t dk_l;
  void* dq;  // T, row g begins at g * dq_g, contiguous; or null where not needed
  int64_t dq_g;
  bool add_to_dq;  // dq holds the sum over earlier images
};

}  // namespace mlhead
