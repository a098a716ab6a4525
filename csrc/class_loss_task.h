// The loss of one row of logits on a CPU: what one call of a kernel of class_loss_kernels.h computes.
#pragma once

#include <cstdint>

namespace mlhead {

enum class Loss { bce, asl, softmax };

struct LossOptions {
  Loss loss;
  double gamma_neg, gamma_pos, margin, eps;
  bool detach_focal;
  double label_smoothing;
  int64_t num_classes;  // C, by which softmax divides the smoothing
};

// One image's logits of n neighbouring classes. T is the accumulation type; all arrays are of it and contiguous.
struct LossRow {
  const LossOptions* options;
  int64_t n;
  void* z;                   // (n): raw logits; becomes dz where need_dz
  const void* bias;          // (n), added to z, or null
  const void* y;             // (n), negative where ignored
  const void* class_weight;  // (n), or null for 1
  const void* pos_weight;    // (n), or null for 1
  double factor;             // of dz: everything but the weight of the class
  bool need_dz;
  double loss;  // written: the sum of the elements' losses times class_weight

  // Softmax: in gradient, the logarithm of the sum and what multiplies the softmax; in statistics, what the row's
  // blocks so far have, written anew: largest z, sum of e^(z - largest), sum of v z, sum of v.
  double lse, total;
  double statistics[4];
};

}  // namespace mlhead
