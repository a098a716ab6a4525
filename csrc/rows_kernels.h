// Dropout, residual sum and layer norm of a row; ReLU and dropout of a row.
// Included by gemm_kernels.h, once for each instruction set.
//
// A row is read and written once; what is needed again stays in scratch (L1). Random numbers are a hash of the
// element's number, computed once in each direction.
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

// A row that is read or written as it lies, if it is contiguous and ends with a whole register; else in scratch.
template <typename S, typename T>
MLHEAD_INLINE bool lies_well(const NormRow& t, int64_t stride) {
  return stride == 1 && t.E % kLanes<T> == 0;
}

// x, residual and out hold whole registers.
template <typename R, typename T>
static void norm_registers(const NormRow& t, const R* x, const R* residual, R* out, T* z) {
  constexpr int L = kLanes<T>;
  const int64_t width = padded<T>(t.E);
  const T *weight = static_cast<const T*>(t.weight), *bias = static_cast<const T*>(t.bias);
  const Dropout dropout = t.dropout;
  Counters<T> number = counters_from<T>(t.first);
  for (int64_t e = 0; e < width; e += L, number += uint32_t(L)) {
    Vec<T> v = load(x + e);
    if (dropout.active) v *= dropout_factor<T>(number, dropout);
    store(z + e, load(residual + e) + v);
  }
  const T mean = sum_over_row<T>(t.E, [&](int64_t e) { return load(z + e); }) / T(t.E);
  const T variance = sum_over_row<T>(t.E,
                                     [&](int64_t e) {
                                       const Vec<T> centred = load(z + e) - mean;
                                       return centred * centred;
                                     }) /
                     T(t.E);
  const T rstd = T(1) / T(__builtin_sqrt(double(variance) + t.eps));
  for (int64_t e = 0; e < width; e += L)
    store(out + e, (load(z + e) - mean) * rstd * load(weight + e) + load(bias + e));
  *static_cast<T*>(t.mean) = mean, *static_cast<T*>(t.rstd) = rstd;
}

template <typename S>
static void norm_row(const NormRow& t) {
  using T = typename Accumulate<S>::type;
  const int64_t width = padded<T>(t.E);
  T *a = static_cast<T*>(t.scratch), *b = a + width, *z = b + width;
  const S *x = static_cast<const S*>(t.x), *residual = static_cast<const S*>(t.residual);
  S* out = static_cast<S*>(t.out);
  if (lies_well<S, T>(t, t.x_e) && t.residual_e == 1) return norm_registers<S, T>(t, x, residual, out, z);
  widen_row<S, T>(t.E, x, t.x_e, a);
  widen_row<S, T>(t.E, residual, t.residual_e, b);
  norm_registers<T, T>(t, a, b, a, z);
  write_block<T, S>(1, t.E, a, t.E, out, t.E, 1);
}

// All rows hold whole registers, beyond E zeros; dx, dresidual and g may be x, residual and dout, and
// the first two null.
template <typename R, typename T>
static void norm_registers_backward(const NormRow& t, const R* x, const R* residual, const R* dout, R* dx, R* dresidual,
                                    T* n, T* g, T* factors) {
  constexpr int L = kLanes<T>;
  const int64_t width = padded<T>(t.E);
  const T *weight = static_cast<const T*>(t.weight), mean = *static_cast<const T*>(t.mean),
          rstd = *static_cast<const T*>(t.rstd);
  T *dweight = static_cast<T*>(t.dweight), *dbias = static_cast<T*>(t.dbias);
  const Dropout dropout = t.dropout;
  Counters<T> number = counters_from<T>(t.first);
  Vec<T> sum_g{}, sum_gn{};
  for (int64_t e = 0; e < width; e += L, number += uint32_t(L)) {
    Vec<T> v = load(x + e);
    if (dropout.active) {
      const Vec<T> factor = dropout_factor<T>(number, dropout);
      store(factors + e, factor);
      v *= factor;
    }
    v = (load(residual + e) + v - mean) * rstd;
    store(n + e, v);
    const Vec<T> d = load(dout + e), dn = d * load(weight + e);
    store(g + e, dn);
    sum_g += dn;
    sum_gn += dn * v;
    if (dweight) store(dweight + e, load(dweight + e) + d * v);
    if (dbias) store(dbias + e, load(dbias + e) + d);
  }
  if (!dx && !dresidual) return;
  const T mean_g = sum_of_lanes<T>(sum_g) / T(t.E), mean_gn = sum_of_lanes<T>(sum_gn) / T(t.E);
  for (int64_t e = 0; e < width; e += L) {
    const Vec<T> dz = (load(g + e) - mean_g - load(n + e) * mean_gn) * rstd;
    if (dresidual) store(dresidual + e, dz);
    if (dx) store(dx + e, dropout.active ? dz * load(factors + e) : dz);
  }
}

template <typename S>
static void norm_row_backward(const NormRow& t) {
  using T = typename Accumulate<S>::type;
  const int64_t width = padded<T>(t.E);
  T *n = static_cast<T*>(t.scratch), *factors = n + width;
  T *a = factors + width, *b = a + width, *d = b + width;
  const S *x = static_cast<const S*>(t.x), *residual = static_cast<const S*>(t.residual);
  const S* dout = static_cast<const S*>(t.dout);
  S *dx = static_cast<S*>(t.dx), *dresidual = static_cast<S*>(t.dresidual);
  if (lies_well<S, T>(t, t.x_e) && t.residual_e == 1 && t.dout_e == 1)
    return norm_registers_backward<S, T>(t, x, residual, dout, dx, dresidual, n, d, factors);
  widen_row<S, T>(t.E, x, t.x_e, a);
  widen_row<S, T>(t.E, residual, t.residual_e, b);
  widen_row<S, T>(t.E, dout, t.dout_e, d);
  norm_registers_backward<T, T>(t, a, b, d, dx ? a : nullptr, dresidual ? b : nullptr, n, d, factors);
  if (dx) write_block<T, S>(1, t.E, a, t.E, dx, t.E, 1);
  if (dresidual) write_block<T, S>(1, t.E, b, t.E, dresidual, t.E, 1);
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
