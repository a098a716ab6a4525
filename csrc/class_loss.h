// The CUDA kernels of the losses in the head behind raw pointers: this header and class_loss.cu know nothing of torch.
//
//     gradient     z becomes dz where need_dz; row_loss[b] += the weighted losses of the row's elements (BCE, ASL)
//     statistics   statistics[b] takes in the block: max z, sum exp(z - max), sum v z, sum v (softmax)
//     scale        x *= factor
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "class_loss_task.h"
#include "dtypes.h"

namespace mlhead {

// What dense targets hold, numbered as TargetType in class_loss_checks.h.
enum class LossTarget { i8, f32, f64, f16, bf16 };

// A block of raw logits z[i, b, j], of image b and class first + i group_classes + j; one at num_classes or beyond does
// not exist. Strides are in elements, that of z along n is 1. `Sum` is fp32, and fp64 for fp64.
struct LossBlock {
  Dtype dtype;  // of z
  int64_t G, B, N, first, group_classes, num_classes;
  void* z;
  int64_t z_g, z_b;
  const void* bias;  // (C), or null
  Dtype bias_dtype;
  int64_t bias_c;
  LossTarget target;
  const void* targets;  // dense (B, C), or with offsets int64, ascending within a row
  int64_t t_b, t_c;
  const int64_t* offsets;                                 // (B + 1), or null
  const void* values;                                     // Sum, of the sparse targets, or null for 1
  const void *class_weight, *pos_weight, *sample_weight;  // Sum, (C), (C) and (B), or null for 1
  int64_t sample_b;
  Loss loss;
  double gamma_neg, gamma_pos, margin, eps;
  bool detach_focal;
  double label_smoothing, factor;
  const void* dout;  // Sum, or null for 1
  void* row_loss;    // Sum (B), or null
  void* statistics;  // Sum (B, 4)
  bool need_dz;
  int64_t splits;  // of an image's logits, by loss_splits
  void* parts;     // Sum (B, splits) for a loss, (B, splits, 4) for statistics; null where splits is 1
};

// Into how many parts the logits of each image are cut: a function of the shape and the device alone.
int64_t loss_splits(const LossBlock& p, int multiprocessors);

// Each returns null, or what went wrong. Nothing is launched where there are no logits.
const char* launch_class_loss_gradient(const LossBlock& p, cudaStream_t stream);
const char* launch_class_loss_statistics(const LossBlock& p, cudaStream_t stream);
const char* launch_scale_by(Dtype dtype, void* x, int64_t numel, const void* factor, int multiprocessors,
                            cudaStream_t stream);

}  // namespace mlhead
