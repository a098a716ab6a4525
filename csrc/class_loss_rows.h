// One call of the losses in the head on a CPU as rows for the kernels of class_loss_kernels.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "class_loss_checks.h"
#include "gemm.h"

namespace mlhead {

// `count` numbers of type S, any stride apart, as numbers of T.
template <typename S, typename T>
void widen(const S* from, int64_t stride, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = T(load_scalar(from + i * stride));
}
template <typename T>
void widen(Dtype dtype, const void* from, int64_t offset, int64_t stride, int64_t count, T* to) {
  switch (dtype) {
    case Dtype::f32: return widen(static_cast<const float*>(from) + offset, stride, count, to);
    case Dtype::f64: return widen(static_cast<const double*>(from) + offset, stride, count, to);
    case Dtype::f16: return widen(static_cast<const Half*>(from) + offset, stride, count, to);
    case Dtype::bf16: return widen(static_cast<const BFloat16*>(from) + offset, stride, count, to);
  }
}

// A number of T for each class of a block, and for each element of a row of it.
template <typename T>
struct LossBlock {
  const LossCall& call;
  const LossOptions& options;
  int64_t first, n;
  T *bias, *y;  // scratch of n numbers each; y is all 0 between rows where the targets are sparse

  LossBlock(const LossCall& call_, const LossOptions& options_, int64_t first_, int64_t n_, T* scratch)
      : call(call_), options(options_), first(first_), n(n_), bias(scratch), y(scratch + n_) {
    if (call.bias) widen(call.bias_dtype, call.bias, first * call.bias_c, call.bias_c, n, bias);
    if (call.offsets) std::memset(y, 0, size_t(n) * sizeof(T));
  }

  // Runs kernel on row b of the block, z (n) of T.
  template <typename Kernel>
  void run(Kernel kernel, LossRow& row, int64_t b, T* z) const {
    row.options = &options;
    row.n = n, row.z = z, row.y = y;
    row.bias = call.bias ? bias : nullptr;
    row.class_weight = of_classes(call.class_weight), row.pos_weight = of_classes(call.pos_weight);
    const int64_t *begin = nullptr, *end = nullptr;
    if (call.offsets) {
      const int64_t* const indices = static_cast<const int64_t*>(call.targets);
      const auto within = [&](int64_t at) { return std::clamp<int64_t>(at, 0, call.entries); };
      const int64_t* const last = indices + within(call.offsets[b + 1]);
      begin = std::lower_bound(indices + within(call.offsets[b]), last, first);
      end = std::lower_bound(begin, last, first + n);
      for (const int64_t* i = begin; i < end; ++i)
        y[*i - first] = call.values ? static_cast<const T*>(call.values)[i - indices] : T(1);
    } else {
      read_dense(b);
    }
    kernel(row);
    for (const int64_t* i = begin; i < end; ++i) y[*i - first] = 0;
  }

  double weight_of(int64_t b) const {
    return call.sample_weight ? double(static_cast<const T*>(call.sample_weight)[b * call.sample_b]) : 1.0;
  }

 private:
  const T* of_classes(const void* weights) const { return weights ? static_cast<const T*>(weights) + first : nullptr; }

  void read_dense(int64_t b) const {
    const int64_t offset = b * call.t_b + first * call.t_c;
    switch (call.target) {
      case TargetType::i8:
        for (int64_t j = 0; j < n; ++j) y[j] = T(static_cast<const int8_t*>(call.targets)[offset + j * call.t_c]);
        return;
      case TargetType::f32: return widen(Dtype::f32, call.targets, offset, call.t_c, n, y);
      case TargetType::f64: return widen(Dtype::f64, call.targets, offset, call.t_c, n, y);
      case TargetType::f16: return widen(Dtype::f16, call.targets, offset, call.t_c, n, y);
      case TargetType::bf16: return widen(Dtype::bf16, call.targets, offset, call.t_c, n, y);
    }
  }
};

// Takes the statistics of some more classes into those of a row: (max, sum e^(z - max), sum v z, sum v).
inline void merge_statistics(double* into, const double* more) {
  const double top = std::max(into[0], more[0]);
  const auto scaled = [&](const double* s) { return s[1] == 0 ? 0.0 : s[1] * std::exp(s[0] - top); };
  into[1] = scaled(into) + scaled(more);
  into[0] = top;
  into[2] += more[2];
  into[3] += more[3];
}

}  // namespace mlhead
