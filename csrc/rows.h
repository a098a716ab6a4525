// Work on rows of numbers on a CPU: what one call of a kernel of rows_kernels.h computes. S is the storage type, T its
// accumulation type.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace mlhead {

// One row of dropout_add_layer_norm. x, residual and dout have a stride, in elements; outputs are contiguous.
struct NormRow {
  int64_t E;
  const void* x;  // S
  int64_t x_e;
  const void* residual;  // S
  int64_t residual_e;
  const void *weight, *bias;  // T (E), zeros behind them up to whole registers
  double eps;
  Dropout dropout;
  uint32_t first;     // number of the row's first element, for the dropout
  void *mean, *rstd;  // T, one each: written forward, read backward
  void* out;          // forward: S
  const void* dout;   // backward: S
  int64_t dout_e;
  void *dx, *dresidual;   // backward: S, or null
  void *dweight, *dbias;  // backward: T (E) and room up to whole registers, added to; or null
  void* scratch;          // T, room for 5 rows of whole registers, 64-byte aligned
};

// One row of relu_dropout: out = dropout(max(x, 0)); backward x is the output, and out = 0 where x <= 0, else
// dout * kept.
struct ReluRow {
  int64_t F;
  const void* x;  // S
  int64_t x_f;
  const void* dout;  // S, backward
  int64_t dout_f;
  Dropout dropout;
  uint32_t first;
  void* out;      // S, contiguous
  void* scratch;  // T, 2 F elements
};

}  // namespace mlhead
