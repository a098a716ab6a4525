// The CUDA kernels of csra_pool behind raw pointers: this header and csra_pool.cu know nothing of torch.
//
// A chunk of raw scores (B, L, N) holds the columns first ... first + N - 1 of H heads of `classes` classes each, so
// column n belongs to head h = (first + n) / classes and class c = (first + n) mod classes. With s = scale[n] scores
// and A = sum_l p_l s_l, p = softmax_l(T_h s), which for T_h = infinity is the maximum over l,
//
//     forward    pooled[b, n] = average mean_l s + lam_h A
//     backward   ds_l = dlogits[b, c] (average / L + lam_h p_l (1 + T_h (s_l - A)))
//                for T_h = infinity: dlogits[b, c] (average / L + lam_h [l is the first position of the maximum])
//                ds[b, l, n] <- scale[n] ds_l, which may be written over the scores
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace mlhead {

// One chunk of scores. Strides are in elements; that of n is 1. `Sum` below is fp32, and fp64 for fp64.
struct CsraScores {
  Dtype dtype;  // of scores and dlogits
  int64_t B, L, N;
  int64_t classes, first;
  double average;
  const double* temperatures;  // of every head, > 0, in host memory: a launch copies what it needs
  const double* lam;
  const void* scores;
  int64_t s_b, s_l;
  const void* scale;  // Sum (N,), or null for 1
  void* pooled;       // forward: Sum (B, N)
  int64_t pooled_b;
  const void* dlogits;  // backward: (B, classes)
  int64_t d_b, d_c;
  void* ds;  // backward: (B, L, N) in the strides of scores; perhaps scores itself
};

// The gradient through the division of N classifiers w (D) by their norms: dw <- dw - u <dw, u> with u = w / norm, in
// place, and divided by the norm if `divide`.
struct UnitRows {
  Dtype dtype;          // of weight
  bool dw_accumulated;  // dw is Sum, not of the dtype of weight
  bool divide;
  int64_t N, D;
  void* dw;  // (N, D); d is contiguous
  int64_t dw_n;
  const void* weight;
  int64_t w_n, w_d;
  const void* norm;  // Sum (N,)
};

// Each returns null, or what went wrong. Nothing is launched where there are no columns or no images. No position of
// ds may have two indices.
const char* launch_csra_pool(const CsraScores& p, cudaStream_t stream);
const char* launch_csra_pool_backward(const CsraScores& p, cudaStream_t stream);
const char* launch_unit_rows_backward(const UnitRows& p, cudaStream_t stream);

}  // namespace mlhead
