// BCE, ASL and softmax of a row of logits, and their derivatives, a register of classes at a time:
//
//     BCE      l = w y softplus(-z) + (1 - y) softplus(z)         dz = (1 - y) p - w y q
//     ASL      l = -(y q^gp log max(p, eps) + (1 - y) pm^gn log max(1 - pm, eps)),  p = sigmoid z, q = 1 - p, pm = (p -
//     m)+ softmax  dz = (sum v) e^(z - lse) - v
//
// One exponential, e = e^-|z|, gives p, q and softplus without cancellation for either sign; logarithms near 1 are
// log1p = 2 artanh(x / (2 + x)). Nearly all targets are 0, so a register without a positive skips what they need.
// Included by gemm_kernels.h, once for each instruction set.
#pragma once

#include "class_loss_task.h"
#include "pool_kernels.h"
#include "simd.h"

namespace mlhead::MLHEAD_ISA {

// 2 artanh(s) = 2 (s + s^3 / 3 + ...), `terms` of them.
template <typename T>
MLHEAD_INLINE Vec<T> twice_artanh(Vec<T> s, int terms) {
  const Vec<T> square = s * s;
  Vec<T> series = Vec<T>{} + T(1) / T(2 * terms - 1);
  for (int i = terms - 1; i > 0; --i) series = series * square + T(1) / T(2 * i - 1);
  return (s + s) * series;
}

// log(1 + x) for x in [-1/2, 1]: |s| <= 1/3.
template <typename T>
MLHEAD_INLINE Vec<T> log1p_near(Vec<T> x) {
  return twice_artanh<T>(x / (x + T(2)), sizeof(T) == 8 ? 17 : 8);
}

// log x for normal x > 0: 2^k f with f in [sqrt 1/2, sqrt 2], |s| <= 0.172.
template <typename T>
MLHEAD_INLINE Vec<T> log_of(Vec<T> x) {
  using K = ExpConstants<T>;
  using Bits = typename K::Bits;
  using Integers = typename VectorOf<Bits, kLanes<T>>::type;
  const Bits root_half = sizeof(T) == 8 ? Bits(0x3fe6a09e667f3bcdll) : Bits(0x3f3504f3);
  const Integers bits = Integers(x), k = (bits - root_half) >> K::mantissa;
  const Vec<T> f = Vec<T>(bits - (k << K::mantissa)), exponent = __builtin_convertvector(k, Vec<T>);
  return exponent * T(0.69314718055994530942) + twice_artanh<T>((f - T(1)) / (f + T(1)), sizeof(T) == 8 ? 11 : 6);
}

// base^gamma for base in [0, 1] and gamma >= 0.
template <typename T>
MLHEAD_INLINE Vec<T> power_of(Vec<T> base, double gamma) {
  if (gamma <= 16 && gamma == double(int(gamma))) {
    Vec<T> result = Vec<T>{} + T(1);
    for (int i = 0; i < int(gamma); ++i) result *= base;
    return result;
  }
  const T tiny = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38f);
  const Vec<T> result = exp_of_negative<T>(log_of<T>(base > tiny ? base : Vec<T>{} + tiny) * T(gamma));
  return base > tiny ? result : Vec<T>{};
}

// What every sigmoid loss needs of z.
template <typename T>
struct Sigmoid {
  Vec<T> p, q, softplus, softplus_negative;  // q = 1 - p; log(1 + e^z), log(1 + e^-z)

  explicit Sigmoid(Vec<T> z) {
    const Vec<T> magnitude = z < T(0) ? -z : z;
    const Vec<T> e = exp_of_negative<T>(-magnitude), large = T(1) / (e + T(1)), small = e * large;
    const Vec<T> tail = log1p_near<T>(e);
    p = z < T(0) ? small : large;
    q = z < T(0) ? large : small;
    softplus = tail + (z > T(0) ? z : Vec<T>{});
    softplus_negative = tail + (z < T(0) ? -z : Vec<T>{});
  }
};

template <typename T>
MLHEAD_INLINE bool any_lane(Vec<T> x, T than) {
  bool found = false;
  for (int i = 0; i < kLanes<T>; ++i) found |= x[i] != than;
  return found;
}

template <typename T>
MLHEAD_INLINE void bce_element(const LossOptions& o, Vec<T> z, Vec<T> y, Vec<T> weight, Vec<T>& loss, Vec<T>& dz) {
  const Sigmoid<T> s(z);
  if (o.label_smoothing == 0 && !any_lane<T>(y, T(0))) {
    loss = s.softplus;
    dz = s.p;
    return;
  }
  y = y * T(1.0 - o.label_smoothing) + T(0.5 * o.label_smoothing);
  const Vec<T> weighted = weight * y;
  loss = weighted * s.softplus_negative + (T(1) - y) * s.softplus;
  dz = (T(1) - y) * s.p - weighted * s.q;
}

template <typename T>
MLHEAD_INLINE void asl_element(const LossOptions& o, Vec<T> z, Vec<T> y, Vec<T>& loss, Vec<T>& dz) {
  const T eps = T(o.eps), margin = T(o.margin), tiny = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38f);
  const Sigmoid<T> s(z);
  // Negatives: log(q + m), which near 1 is log1p(-(p - m)).
  const Vec<T> above = s.p - margin, base = above > T(0) ? above : Vec<T>{}, rest = s.q + margin;
  const Vec<T> kept = rest > eps ? rest : Vec<T>{} + eps;
  const auto small = (base < T(0.5)) & (rest >= eps);
  const Vec<T> near = log1p_near<T>(small ? -base : Vec<T>{}), far = log_of<T>(kept);
  const Vec<T> log_rest = small ? near : far;
  const Vec<T> focal = o.gamma_neg > 0 ? power_of<T>(base, o.gamma_neg) : Vec<T>{} + T(1);
  loss = -focal * log_rest;
  const auto inside = (rest <= T(1)) & (rest >= eps);
  dz = inside ? focal * s.p * s.q / kept : Vec<T>{};
  if (!o.detach_focal && o.gamma_neg > 0) {
    const Vec<T> lifted = base > tiny ? base : Vec<T>{} + tiny;
    const Vec<T> slope = focal / lifted * T(o.gamma_neg);
    dz -= base > tiny ? slope * log_rest * s.p * s.q : Vec<T>{};
  }
  if (!any_lane<T>(y, T(0))) return;
  const T log_eps = log_of<T>(Vec<T>{} + eps)[0];
  const Vec<T> log_p = -s.softplus_negative, clamped = log_p > log_eps ? log_p : Vec<T>{} + log_eps;
  const Vec<T> focal_p = o.gamma_pos > 0 ? power_of<T>(s.q, o.gamma_pos) : Vec<T>{} + T(1);
  Vec<T> dpositive = log_p >= log_eps ? focal_p * s.q : Vec<T>{};
  if (!o.detach_focal && o.gamma_pos > 0) dpositive -= T(o.gamma_pos) * clamped * focal_p * s.p;
  loss = (T(1) - y) * loss - y * focal_p * clamped;
  dz = (T(1) - y) * dz - y * dpositive;
}

// Calls body(i, count, z, y, class weight, positive weight) for each register of the row, z with its bias; the last one
// may hold fewer than a register.
template <typename T, typename Body>
MLHEAD_INLINE void for_each_register(const LossRow& row, const Body& body) {
  constexpr int L = kLanes<T>;
  const T *z = static_cast<const T*>(row.z), *y = static_cast<const T*>(row.y), *bias = static_cast<const T*>(row.bias);
  const T *weight = static_cast<const T*>(row.class_weight), *positive = static_cast<const T*>(row.pos_weight);
  const Vec<T> one = Vec<T>{} + T(1);
  int64_t i = 0;
  for (; i + L <= row.n; i += L) {
    const Vec<T> at = bias ? load(z + i) + load(bias + i) : load(z + i);
    body(i, L, at, load(y + i), weight ? load(weight + i) : one, positive ? load(positive + i) : one);
  }
  if (i == row.n) return;
  const int rest = int(row.n - i);
  Vec<T> at = {}, target = {}, w = one, w_positive = one;
  for (int j = 0; j < rest; ++j) {
    at[j] = bias ? z[i + j] + bias[i + j] : z[i + j];
    target[j] = y[i + j];
    if (weight) w[j] = weight[i + j];
    if (positive) w_positive[j] = positive[i + j];
  }
  body(i, rest, at, target, w, w_positive);
}

template <typename T>
MLHEAD_INLINE void put(T* to, Vec<T> x, int count) {
  if (count == kLanes<T>) return store(to, x);
  for (int j = 0; j < count; ++j) to[j] = x[j];
}

// The sum of some numbers: few at a time in T, those sums in fp64.
template <typename T>
struct Total {
  double sum = 0;
  Vec<T> part = {};
  int parts = 0;

  void add(Vec<T> x, int count) {
    for (int j = count; j < kLanes<T>; ++j) x[j] = 0;
    part += x;
    if (++parts == 32) flush();
  }
  void flush() {
    for (int j = 0; j < kLanes<T>; ++j) sum += double(part[j]);
    part = Vec<T>{};
    parts = 0;
  }
  double value() {
    flush();
    return sum;
  }
};

template <typename T>
static void loss_row(LossRow& row) {
  const LossOptions& o = *row.options;
  T* const to = static_cast<T*>(row.z);
  Total<T> total;
  for_each_register<T>(row, [&](int64_t i, int count, Vec<T> z, Vec<T> y, Vec<T> weight, Vec<T> positive) {
    Vec<T> loss = {}, dz;
    const auto known = y >= T(0);
    const Vec<T> target = known ? y : Vec<T>{};
    if (o.loss == Loss::bce) {
      bce_element<T>(o, z, target, positive, loss, dz);
    } else if (o.loss == Loss::asl) {
      asl_element<T>(o, z, target, loss, dz);
    } else {
      const Vec<T> v = weight * (y * T(1.0 - o.label_smoothing) + T(o.label_smoothing / double(o.num_classes)));
      const Vec<T> below = z - T(row.lse);
      dz = exp_of_negative<T>(below < T(0) ? below : Vec<T>{}) * T(row.total) - v;
      weight = Vec<T>{} + T(1);
    }
    loss = z == z ? loss : z;  // comparisons above drop a NaN
    dz = z == z ? dz : z;
    total.add(known ? loss * weight : Vec<T>{}, count);
    if (row.need_dz) put(to + i, known ? dz * weight * T(row.factor) : Vec<T>{}, count);
  });
  row.loss = total.value();
}

template <typename T>
static void softmax_row(LossRow& row) {
  const LossOptions& o = *row.options;
  const T smoothing = T(o.label_smoothing / double(o.num_classes));
  Vec<T> largest = Vec<T>{} - T(__builtin_inf()), nan = {};
  Total<T> scores, weights, sum;
  for_each_register<T>(row, [&](int64_t, int count, Vec<T> z, Vec<T> y, Vec<T> weight, Vec<T>) {
    const Vec<T> v = weight * (y * T(1.0 - o.label_smoothing) + smoothing);
    for (int j = count; j < kLanes<T>; ++j) z[j] = z[0];
    largest = z > largest ? z : largest;
    nan += z == z ? Vec<T>{} : z;
    scores.add(v * z, count);
    weights.add(v, count);
  });
  T top = T(row.statistics[0]);
  for (int j = 0; j < kLanes<T>; ++j) top = largest[j] > top ? largest[j] : top;
  const T shift = top == -T(__builtin_inf()) ? T(0) : top;
  for_each_register<T>(row, [&](int64_t, int count, Vec<T> z, Vec<T>, Vec<T>, Vec<T>) {
    sum.add(exp_of_negative<T>(z - shift), count);
  });
  Vec<T> before = Vec<T>{} + (T(row.statistics[0]) - shift);
  const double rescaled = row.statistics[1] == 0 ? 0.0 : row.statistics[1] * double(exp_of_negative<T>(before)[0]);
  row.statistics[0] = double(top);
  row.statistics[1] = rescaled + sum.value() + double(sum_of_lanes<T>(nan));
  row.statistics[2] += scores.value();
  row.statistics[3] += weights.value();
}

}  // namespace mlhead::MLHEAD_ISA
