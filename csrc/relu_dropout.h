// The CUDA kernels of relu_dropout behind raw pointers: this header and relu_dropout.cu know nothing of torch.
//
//     forward    out = dropout(max(x, 0))
//     backward   dx = 0 where out <= 0, else dout / (1 - dropout_p)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace mlhead {

// A tensor (B, N, F). Strides are in elements, any but negative.
struct ReluOperand {
  const void* data;
  int64_t b, n, f;
};

struct ReluCall {
  Dtype dtype;
  int64_t B, N, F;
  ReluOperand x;        // forward
  ReluOperand dout;     // backward
  ReluOperand out;      // backward
  const int64_t* seed;  // forward: in device memory; null where nothing is dropped
  double dropout_p;
  void* result;  // out or dx: contiguous
};

// Each returns null, or what went wrong. Nothing is launched where the result has no elements.
const char* launch_relu_dropout(const ReluCall& p, cudaStream_t stream);
const char* launch_relu_dropout_backward(const ReluCall& p, cudaStream_t stream);

}  // namespace mlhead
