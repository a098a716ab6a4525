// The CUDA kernels of dropout_add_layer_norm behind raw pointers: this header and dropout_add_layer_norm.cu know
// nothing of torch.
//
// With z = residual + dropout(x), n = (z - mean z) / std z and g = dout weight, over rows of E features,
//
//     forward    out = n weight + bias
//     backward   dresidual = dz = (g - mean g - n mean(g n)) / std;  dx = dropout'(dz)
//                dweight = sum dout n;  dbias = sum dout      over all rows of all images
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace mlhead {

// A tensor (B, N, E). Strides are in elements, any but negative.
struct LayerNormOperand {
  const void* data;
  int64_t b, n, e;
};

// One call. `Sum` below is fp32, and fp64 for fp64.
struct LayerNormCall {
  Dtype dtype;                  // of x, residual, dout and the results but the last two
  bool parameters_accumulated;  // weight, bias, dweight and dbias are Sum, not of the dtype
  int64_t B, N, E;
  LayerNormOperand x, residual;
  LayerNormOperand dout;  // backward
  const void *weight, *bias;
  int64_t weight_e, bias_e;  // strides
  const int64_t* seed;       // in device memory; null where nothing is dropped
  double dropout_p, eps;
  void* statistics;       // Sum (2, B, N), mean and 1 / std: written by forward, read by backward
  void* out;              // forward: contiguous, as all results
  void *dx, *dresidual;   // backward: (B, N, E), null where not needed
  void *dweight, *dbias;  // backward: (E,), null where not needed
};

// Elements of Sum that backward needs as a workspace: parts of dweight and dbias, a function of the call's shape, dtype
// and needs alone.
int64_t layer_norm_workspace_elements(const LayerNormCall& p);

// Each returns null, or what went wrong. Where there are no rows, dweight and dbias are zeros.
const char* launch_dropout_add_layer_norm(const LayerNormCall& p, cudaStream_t stream);
const char* launch_dropout_add_layer_norm_backward(const LayerNormCall& p, void* workspace, cudaStream_t stream);

}  // namespace mlhead
