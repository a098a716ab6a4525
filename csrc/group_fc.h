// The CUDA kernels of group_fc behind raw pointers: this header and group_fc.cu know nothing of torch.
//
// All three products of the op are one kernel, a matrix product for each group with any strides:
//
//     c[p, g, m, n] = sum over part p of k of a[g, m, k] b[g, k, n] (+ bias[g, n])
//
//     forward   m = image,   n = class j,   k = feature e     a = h         b = weight    c = logits
//     dh        m = image,   n = feature e, k = class j       a = dlogits   b = weight^T  c = dh
//     dweight   m = feature, n = class j,   k = image         a = h^T       b = dlogits   c = dweight
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace mlhead {

enum class Product { forward, dh, dweight };

// One product. Strides are in elements; n is contiguous in c.
struct GroupedProduct {
  Product product;
  Dtype dtype;
  int64_t groups, M, N, K;
  int64_t J, C;  // the class axis of group g ends at C - g J
  const void* a;
  int64_t a_g, a_m, a_k;
  const void* b;
  int64_t b_g, b_k, b_n;
  void* c;
  int64_t c_g, c_m;
  const void* bias;  // one number for each class, or null
  int64_t bias_c;
};

// Into how many parts the k axis is cut: 1, or more where the grid would leave multiprocessors idle.
int64_t parts_of(const GroupedProduct& p, int multiprocessors);

// Elements of the workspace (fp32, fp64 for fp64) that more than one part needs.
int64_t workspace_elements(const GroupedProduct& p, int64_t parts);

// Each returns null, or what went wrong. Nothing is launched where the output has no elements.
const char* launch_grouped_product(const GroupedProduct& p, int64_t parts, void* workspace, cudaStream_t stream);
const char* launch_column_sum(Dtype dtype, const void* x, int64_t rows, int64_t columns, int64_t stride_row,
                              int64_t stride_column, void* out, cudaStream_t stream);

}  // namespace mlhead
