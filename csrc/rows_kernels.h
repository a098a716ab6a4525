// Dropout, residual sum and layer norm of a row; ReLU and dropout of a row.
// Included by gemm_kernels.h, once for each instruction set.
//
// A row is widened into scratch (L1) and everything else happens there: it is read and written once. Random numbers are
// a hash of the element's number, computed where they are needed, forward and backward alike.
#pragma once

#include "pack.h"
#include "rows.h"

namespace mlhead::MLHEAD_ISA {

// Unsigned numbers beside a register of T.
template <typename T>
using Counters = typename VectorOf<uint32_t, kLanes<T>>::type;

// 0 where dropout takes element `number` away, else `kept`.
template <typename T>
MLHEAD_INLINE Vec<T> dropout_factor(Counters<T> number, const Dropout& d) {
  using Signed = typename VectorOf<int32_t, kLanes<T>>::type;
  Counters<T> u = number + d.key0;
  u ^= u >> 16;
  u *= 0x7feb352du;
  u ^= d.key1;
  u ^= u >> 15;
  u *= 0x846ca68bu;
  u ^= u >> 16;
  const Signed keep = Signed(u >= d.threshold);  // -1 or 0
  return __builtin_convertvector(keep, Vec<T>) * -T(d.kept);
}

template <typename T>
MLHEAD_INLINE Counters<T> counters_from(uint32_t first) {
  Counters<T> number;
  for (int i = 0; i < kLanes<T>; ++i) number[i] = first + uint32_t(i);
  return number;
}

// So many numbers in whole registers.
template <typename T>
MLHEAD_INLINE int64_t padded(int64_t count) {
  return divide_up(count, kLanes<T>) * kLanes<T>;
}

// A row as numbers of T, zeros up to whole registers.
template <typename S, typename T>
static void widen_row(int64_t count, const S* from, int64_t stride, T* to) {
  copy_block<S, T>(1, count, from, 0, stride, to, count);
  for (int64_t e = count; e < padded<T>(count); ++e) to[e] = T(0);
}

// z = residual + dropout(x) in scratch.
template <typename S, typename T>
static void residual_sum(const NormRow& t, T* z, T* other) {
  widen_row<S, T>(t.E, static_cast<const S*>(t.x), t.x_e, z);
  widen_row<S, T>(t.E, static_cast<const S*>(t.residual), t.residual_e, other);
  Counters<T> number = counters_from<T>(t.first);
  for (int64_t e = 0; e < t.E; e += kLanes<T>, number += uint32_t(kLanes<T>)) {
    Vec<T> x = load(z + e);
    if (t.dropout.active) x *= dropout_factor<T>(number, t.dropout);
    store(z + e, load(other + e) + x);
  }
}

// sum_e f(e), in four sums that are then added.
template <typename T, typename F>
MLHEAD_INLINE T sum_over_row(int64_t count, const F& f) {
  constexpr int few = 4, L = kLanes<T>;
  Vec<T> sums[few] = {};
  int64_t e = 0;
  for (; e + few * L <= count; e += few * L)
#pragma GCC unroll 4
    for (int i = 0; i < few; ++i) sums[i] += f(e + i * L);
  for (; e + L <= count; e += L) sums[0] += f(e);
  if (e < count) {
    Vec<T> last = f(e);
    for (int i = int(count - e); i < L; ++i) last[i] = T(0);
    sums[1] += last;
  }
  return sum_of_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename S>
static void norm_row(const NormRow& t) {
  using T = typename Accumulate<S>::type;
  T *z = static_cast<T*>(t.scratch), *other = z + padded<T>(t.E);
  const T *weight = static_cast<const T*>(t.weight), *bias = static_cast<const T*>(t.bias);
  residual_sum<S, T>(t, z, other);
  const T mean = sum_over_row<T>(t.E, [&](int64_t e) { return load(z + e); }) / T(t.E);
  const T variance = sum_over_row<T>(t.E,
                                     [&](int64_t e) {
                                       const Vec<T> centred = load(z + e) - mean;
                                       return centred * centred;
                                     }) /
                     T(t.E);
  const T rstd = T(1) / T(__builtin_sqrt(double(variance) + t.eps));
  for (int64_t e = 0; e < t.E; e += kLanes<T>) store(other + e, (load(z + e) - mean) * rstd);
  // weight and bias have no room behind them: their last numbers are taken one by one.
  const int64_t whole = t.E - t.E % kLanes<T>;
  for (int64_t e = 0; e < whole; e += kLanes<T>) store(other + e, load(other + e) * load(weight + e) + load(bias + e));
  for (int64_t e = whole; e < t.E; ++e) other[e] = other[e] * weight[e] + bias[e];
  write_block<T, S>(1, t.E, other, t.E, static_cast<S*>(t.out), t.E, 1);
  *static_cast<T*>(t.mean) = mean, *static_cast<T*>(t.rstd) = rstd;
}

template <typename S>
static void norm_row_backward(const NormRow& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>;
  T *n = static_cast<T*>(t.scratch), *g = n + padded<T>(t.E), *d = g + padded<T>(t.E);
  const T* weight = static_cast<const T*>(t.weight);
  const T mean = *static_cast<const T*>(t.mean), rstd = *static_cast<const T*>(t.rstd);
  residual_sum<S, T>(t, n, g);
  widen_row<S, T>(t.E, static_cast<const S*>(t.dout), t.dout_e, d);
  const int64_t whole = t.E - t.E % L;
  for (int64_t e = 0; e < t.E; e += L) store(n + e, (load(n + e) - mean) * rstd);
  for (int64_t e = 0; e < whole; e += L) store(g + e, load(d + e) * load(weight + e));
  for (int64_t e = whole; e < t.E; ++e) g[e] = d[e] * weight[e];
  T *dweight = static_cast<T*>(t.dweight), *dbias = static_cast<T*>(t.dbias);
  if (dweight) {
    for (int64_t e = 0; e < whole; e += L) store(dweight + e, load(dweight + e) + load(d + e) * load(n + e));
    for (int64_t e = whole; e < t.E; ++e) dweight[e] += d[e] * n[e];
  }
  if (dbias) {
    for (int64_t e = 0; e < whole; e += L) store(dbias + e, load(dbias + e) + load(d + e));
    for (int64_t e = whole; e < t.E; ++e) dbias[e] += d[e];
  }
  if (!t.dx && !t.dresidual) return;
  const T mean_g = sum_over_row<T>(t.E, [&](int64_t e) { return load(g + e); }) / T(t.E);
  const T mean_gn = sum_over_row<T>(t.E, [&](int64_t e) { return load(g + e) * load(n + e); }) / T(t.E);
  for (int64_t e = 0; e < t.E; e += L) store(g + e, (load(g + e) - mean_g - load(n + e) * mean_gn) * rstd);
  if (t.dresidual) write_block<T, S>(1, t.E, g, t.E, static_cast<S*>(t.dresidual), t.E, 1);
  if (!t.dx) return;
  if (t.dropout.active) {
    Counters<T> number = counters_from<T>(t.first);
    for (int64_t e = 0; e < t.E; e += L, number += uint32_t(L))
      store(g + e, load(g + e) * dropout_factor<T>(number, t.dropout));
  }
  write_block<T, S>(1, t.E, g, t.E, static_cast<S*>(t.dx), t.E, 1);
}

template <typename S>
static void relu_row(const ReluRow& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>;
  const S* x = static_cast<const S*>(t.x);
  S* out = static_cast<S*>(t.out);
  Counters<T> number = counters_from<T>(t.first);
  const auto step = [&](Vec<T> v) {
    v = v < Vec<T>{} ? Vec<T>{} : v;  // NaN stays
    if (t.dropout.active) v *= dropout_factor<T>(number, t.dropout);
    number += uint32_t(L);
    return v;
  };
  const int64_t whole = t.x_f == 1 ? t.F - t.F % L : 0;
  for (int64_t f = 0; f < whole; f += L) store(out + f, step(load(x + f)));
  if (whole == t.F) return;
  T* rest = static_cast<T*>(t.scratch);
  widen_row<S, T>(t.F - whole, x + whole * t.x_f, t.x_f, rest);
  for (int64_t f = 0; f < t.F - whole; f += L) store(rest + f, step(load(rest + f)));
  write_block<T, S>(1, t.F - whole, rest, t.F, out + whole, t.F, 1);
}

template <typename S>
static void relu_row_backward(const ReluRow& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>;
  const S *x = static_cast<const S*>(t.x), *dout = static_cast<const S*>(t.dout);
  S* dx = static_cast<S*>(t.out);
  const Vec<T> kept = Vec<T>{} + T(t.dropout.kept);
  const auto step = [&](Vec<T> v, Vec<T> d) { return v <= Vec<T>{} ? Vec<T>{} : d * kept; };
  const int64_t whole = t.x_f == 1 && t.dout_f == 1 ? t.F - t.F % L : 0;
  for (int64_t f = 0; f < whole; f += L) store(dx + f, step(load(x + f), load(dout + f)));
  if (whole == t.F) return;
  T *rest = static_cast<T*>(t.scratch), *d = rest + padded<T>(t.F);
  widen_row<S, T>(t.F - whole, x + whole * t.x_f, t.x_f, rest);
  widen_row<S, T>(t.F - whole, dout + whole * t.dout_f, t.dout_f, d);
  for (int64_t f = 0; f < t.F - whole; f += L) store(rest + f, step(load(rest + f), load(d + f)));
  write_block<T, S>(1, t.F - whole, rest, t.F, dx + whole, t.F, 1);
}

}  // namespace mlhead::MLHEAD_ISA
