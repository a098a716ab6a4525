// The loss of one logit, its gradient, and the statistics of a softmax, as class_loss.cu computes them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

#include "class_loss.h"

namespace mlhead {

__device__ inline float exp_of(float x) {
  return expf(x);
}
__device__ inline double exp_of(double x) {
  return exp(x);
}
__device__ inline float log_of(float x) {
  return logf(x);
}
__device__ inline double log_of(double x) {
  return log(x);
}
__device__ inline float log1p_of(float x) {
  return log1pf(x);
}
__device__ inline double log1p_of(double x) {
  return log1p(x);
}
__device__ inline float magnitude(float x) {
  return fabsf(x);
}
__device__ inline double magnitude(double x) {
  return fabs(x);
}
// x^gamma for x > 0
__device__ inline float power(float x, float gamma) {
  return exp2f(gamma * log2f(x));
}
__device__ inline double power(double x, double gamma) {
  return exp2(gamma * log2(x));
}

template <typename Sum>
constexpr Sum kTiny = std::is_same<Sum, double>::value ? Sum(2.2250738585072014e-308) : Sum(1.1754943508222875e-38);

// The options of a loss in the type of the sums: y becomes keep * y + smooth. floor_* is 0^gamma, and tiny^gamma where
// a gradient is taken of the power and gamma < 1.
template <typename Sum>
struct OptionsOf {
  Sum gamma_neg, gamma_pos, floor_neg, floor_pos, margin, eps, log_eps, keep, smooth, factor;

  explicit OptionsOf(const LossBlock& p)
      : gamma_neg(Sum(p.gamma_neg)),
        gamma_pos(Sum(p.gamma_pos)),
        floor_neg(floor_of(p, p.gamma_neg)),
        floor_pos(floor_of(p, p.gamma_pos)),
        margin(Sum(p.margin)),
        eps(Sum(p.eps)),
        log_eps(Sum(std::log(p.eps))),
        keep(Sum(p.loss == Loss::asl ? 1.0 : 1.0 - p.label_smoothing)),
        smooth(Sum(p.loss == Loss::bce       ? 0.5 * p.label_smoothing
                   : p.loss == Loss::softmax ? p.label_smoothing / double(p.num_classes)
                                             : 0.0)),
        factor(Sum(p.factor)) {}

  static Sum floor_of(const LossBlock& p, double gamma) {
    return gamma < 1 && !p.detach_focal ? Sum(std::pow(double(kTiny<Sum>), gamma)) : Sum(0);
  }
};

template <typename Sum>
struct LossElement {
  Sum loss, dz;
};

// p = sigmoid(z), q = sigmoid(-z), and log(1 + exp(-|z|)).
template <typename Sum>
struct Sigmoids {
  Sum p, q, log_u;

  __device__ explicit Sigmoids(Sum z) {
    const Sum e = exp_of(-magnitude(z)), near = 1 / (1 + e), far = e * near;
    p = z < 0 ? far : near, q = z < 0 ? near : far;
    log_u = log1p_of(e);
  }
};

template <typename Sum>
__device__ LossElement<Sum> bce(Sum z, Sum y, Sum weight) {
  const Sigmoids<Sum> s(z);
  const Sum weighted = weight * y;
  return {weighted * ((z > 0 ? Sum(0) : -z) + s.log_u) + (1 - y) * ((z < 0 ? Sum(0) : z) + s.log_u),
          (1 - y) * s.p - weighted * s.q};
}

template <typename Sum>
__device__ LossElement<Sum> asl(Sum z, Sum y, const OptionsOf<Sum>& o, bool detach) {
  const Sigmoids<Sum> s(z);
  const Sum log_p = (z < 0 ? z : Sum(0)) - s.log_u, bounded = log_p < o.log_eps ? o.log_eps : log_p;
  const Sum base = s.p < o.margin ? Sum(0) : s.p - o.margin;
  const Sum rest = s.q + o.margin > 1 ? Sum(1) : s.q + o.margin;
  // log(1 - base): from base where that is small, from q where the rest is.
  const Sum u = z < 0 ? 1 - base : rest < o.eps ? o.eps : rest;
  const Sum exact = z < 0 ? log1p_of(-base) : log_of(u), log_rest = exact < o.log_eps ? o.log_eps : exact;
  Sum positive = bounded, dpositive = log_p < o.log_eps ? Sum(0) : s.q;
  Sum negative = log_rest, dnegative = s.p < o.margin || rest < o.eps ? Sum(0) : -s.p * s.q / u;
  if (o.gamma_pos > 0) {
    const bool zero = s.q < kTiny<Sum>;
    const Sum focal = zero ? Sum(0) : power(s.q, o.gamma_pos);
    positive *= zero ? o.floor_pos : focal;
    dpositive *= focal;
    if (!detach) dpositive -= o.gamma_pos * bounded * focal * s.p;
  }
  if (o.gamma_neg > 0) {
    const bool zero = base <= kTiny<Sum>;
    const Sum focal = zero ? Sum(0) : power(base, o.gamma_neg);
    negative *= zero ? o.floor_neg : focal;
    dnegative *= focal;
    if (!detach && !zero) dnegative += o.gamma_neg * power(base, o.gamma_neg - 1) * log_rest * s.p * s.q;
  }
  return {-(y * positive + (1 - y) * negative), -(y * dpositive + (1 - y) * dnegative)};
}

// The statistics of some logits of a row.
template <typename Sum>
struct LossStatistics {
  Sum top, sum, score, total;

  __device__ void merge(const LossStatistics& other) {
    const Sum next = other.top > top ? other.top : top;
    sum = sum * weight(top, next) + other.sum * weight(other.top, next);
    top = next;
    score += other.score;
    total += other.total;
  }

 private:
  // Infinities that are equal have no difference.
  __device__ static Sum weight(Sum x, Sum next) { return x == next ? Sum(1) : exp_of(x - next); }
};

}  // namespace mlhead
