// The pooling of csra_pool over the positions l of an image, kPoolColumns columns at a time, one column to a lane:
//
//     forward   pooled = average mean_l s + lam A,  A = sum_l p_l s_l,  p = softmax_l(T s);  A = max_l s for T = inf
//     backward  ds_l = dlogit (average / L + lam p_l (1 + T (s_l - A))),  p_l = [first maximum], no T, for T = inf
//
// The first pass reads the scores, widened and scaled, into a contiguous block of scratch (25 KB at L = 196: L1) and
// finds maximum and sum; the later passes run over that block. The scores are read once and, backward, written once.
// Sums run in two levels, kFew positions and then their sums.
// Included by gemm_kernels.h, once for each instruction set.
#pragma once

#include "pack.h"
#include "pool.h"
#include "simd.h"

namespace mlhead::MLHEAD_ISA {

template <typename T>
inline constexpr int kPoolVectors = kPoolColumns / kLanes<T>;
inline constexpr int64_t kFew = 32;

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr float lowest = -87.0f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr Bits magic_bits = 0x4b400000;
  static constexpr int mantissa = 23, degree = 7;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr double lowest = -708.0, magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr Bits magic_bits = 0x4338000000000000;
  static constexpr int mantissa = 52, degree = 13;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
};

inline constexpr double kInverseFactorials[] = {
    1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
    1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2 and the Taylor series of e^r; below `lowest` it stays at e^lowest.
// The relative error is 2 ulp or so: that of r, for r is rounded once more than needed.
template <typename T>
MLHEAD_INLINE Vec<T> exp_of_negative(Vec<T> x) {
  using K = ExpConstants<T>;
  using Integers = typename VectorOf<typename K::Bits, kLanes<T>>::type;
  const Vec<T> lowest = Vec<T>{} + K::lowest;
  x = x > lowest ? x : lowest;
  const Vec<T> shifted = x * T(1.44269504088896340736) + K::magic;
  const Vec<T> n = shifted - K::magic;
  const Vec<T> r = (x - n * K::ln2_high) - n * K::ln2_low;
  Vec<T> series = Vec<T>{} + T(kInverseFactorials[K::degree]);
#pragma GCC unroll 16
  for (int i = K::degree - 1; i >= 0; --i) series = series * r + T(kInverseFactorials[i]);
  const Integers exponent = Integers(shifted) - K::magic_bits;
  return Vec<T>(Integers(series) + (exponent << K::mantissa));
}

// What both directions need: the scores in scratch, and of each column the maximum, its first position and the sum.
template <typename T>
struct ColumnFacts {
  Vec<T> maximum[kPoolVectors<T>], first[kPoolVectors<T>], sum[kPoolVectors<T>];
};

template <typename S, typename T>
static void read_columns(const PoolTask& t, T* block, ColumnFacts<T>& facts) {
  constexpr int L = kLanes<T>, V = kPoolVectors<T>;
  const S* scores = static_cast<const S*>(t.scores);
  const T* scale = static_cast<const T*>(t.scale);
  const bool whole = t.columns == kPoolColumns;
  Vec<T> part[V] = {};
  for (int v = 0; v < V; ++v) {
    facts.maximum[v] = Vec<T>{} - T(__builtin_inf());
    facts.first[v] = facts.sum[v] = Vec<T>{};
  }
  for (int64_t l = 0; l < t.L; ++l) {
    const S* row = scores + l * t.stride_l;
    T* to = block + l * kPoolColumns;
    T lanes[kPoolColumns] = {};
    if (!whole)
      for (int64_t c = 0; c < t.columns; ++c) lanes[c] = load_scalar(row + c);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> s = (whole ? load(row + v * L) : load(lanes + v * L)) * load(scale + v * L);
      const auto above = s > facts.maximum[v];
      facts.maximum[v] = above ? s : facts.maximum[v];
      facts.first[v] = above ? Vec<T>{} + T(l) : facts.first[v];
      part[v] += s;
      store(to + v * L, s);
    }
    if (l % kFew == kFew - 1 || l == t.L - 1)
      for (int v = 0; v < V; ++v) {
        facts.sum[v] += part[v];
        part[v] = Vec<T>{};
      }
  }
}

// sum_l e and sum_l e (s - max) with e = e^(T (s - max)), which is left in `weights` where that is not null. Distances
// from the maximum keep their bits where the scores themselves are large beside them.
template <typename T>
static void attend(const PoolTask& t, const T* block, const ColumnFacts<T>& facts, T* weights, Vec<T>* total,
                   Vec<T>* weighted) {
  constexpr int L = kLanes<T>, V = kPoolVectors<T>;
  for (int v = 0; v < V; ++v) {
    const Vec<T> sharpness = load(static_cast<const T*>(t.sharpness) + v * L), maximum = facts.maximum[v];
    Vec<T> sum = {}, sum_s = {};
    for (int64_t l0 = 0; l0 < t.L; l0 += kFew) {
      Vec<T> part = {}, part_s = {};
      for (int64_t l = l0, end = min(l0 + kFew, t.L); l < end; ++l) {
        const Vec<T> below = load(block + l * kPoolColumns + v * L) - maximum;
        const Vec<T> e = exp_of_negative<T>(below * sharpness);
        part += e;
        part_s += e * below;
        if (weights) store(weights + l * kPoolColumns + v * L, e);
      }
      sum += part;
      sum_s += part_s;
    }
    total[v] = sum;
    weighted[v] = sum_s;
  }
}

template <typename S>
static void pool(const PoolTask& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>, V = kPoolVectors<T>;
  T* block = static_cast<T*>(t.scratch);
  ColumnFacts<T> facts;
  Vec<T> total[V], weighted[V];
  read_columns<S, T>(t, block, facts);
  attend<T>(t, block, facts, nullptr, total, weighted);
  for (int v = 0; v < V; ++v) {
    const Vec<T> lam = load(static_cast<const T*>(t.lam) + v * L);
    const auto infinite = load(static_cast<const T*>(t.infinite) + v * L) != Vec<T>{};
    const Vec<T> attended = facts.maximum[v] + (infinite ? Vec<T>{} : weighted[v] / total[v]);
    store(static_cast<T*>(t.pooled) + v * L, facts.sum[v] * T(t.average / double(t.L)) + lam * attended);
  }
}

template <typename S>
static void pool_backward(const PoolTask& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>, V = kPoolVectors<T>;
  T *block = static_cast<T*>(t.scratch), *weights = block + t.L * kPoolColumns;
  ColumnFacts<T> facts;
  Vec<T> total[V], weighted[V];
  read_columns<S, T>(t, block, facts);
  attend<T>(t, block, facts, weights, total, weighted);
  for (int v = 0; v < V; ++v) {
    const auto at = [&](const void* values) { return load(static_cast<const T*>(values) + v * L); };
    const Vec<T> d = at(t.dlogits), sharpness = at(t.sharpness), scale = at(t.scale);
    const auto infinite = at(t.infinite) != Vec<T>{};
    const Vec<T> maximum = facts.maximum[v], attended = weighted[v] / total[v];  // below the maximum
    const Vec<T> even = d * T(t.average / double(t.L));
    const Vec<T> focus = d * at(t.lam) / (infinite ? Vec<T>{} + T(1) : total[v]);
    for (int64_t l = 0; l < t.L; ++l) {
      T* s_at = block + l * kPoolColumns + v * L;
      const Vec<T> below = load(s_at) - maximum;
      const auto here = facts.first[v] == Vec<T>{} + T(l);
      const Vec<T> soft = load(weights + l * kPoolColumns + v * L) * (sharpness * (below - attended) + T(1));
      const Vec<T> ds = even + focus * (infinite ? (here ? Vec<T>{} + T(1) : Vec<T>{}) : soft);
      store(s_at, ds * scale);
    }
  }
  write_block<T, S>(t.L, t.columns, block, kPoolColumns, static_cast<S*>(t.ds), t.stride_l, 1);
}

// The storage types are those of the weight and of dw.
template <typename S, typename G>
static void unit_row_backward(const UnitRowTask& t) {
  using T = typename Accumulate<S>::type;
  constexpr int L = kLanes<T>, few = 4;
  const S* weight = static_cast<const S*>(t.weight);
  G* dw = static_cast<G*>(t.dw);
  const G* from = dw;  // const, for the overloads of load
  T* unit = static_cast<T*>(t.scratch);
  copy_block<S, T>(1, t.D, weight, 0, t.stride_d, unit, t.D);
  const T norm = T(t.norm), factor = t.divide ? T(1) / norm : T(1);
  Vec<T> sums[few] = {};
  const int64_t whole = t.D - t.D % (few * L);
  for (int64_t d = 0; d < whole; d += few * L)
#pragma GCC unroll 4
    for (int i = 0; i < few; ++i) {
      const Vec<T> u = load(unit + d + i * L) / norm;
      store(unit + d + i * L, u);
      sums[i] += load(from + d + i * L) * u;
    }
  T along = sum_of_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t d = whole; d < t.D; ++d) {
    unit[d] /= norm;
    along += T(load_scalar(from + d)) * unit[d];
  }
  const int64_t vectors = t.D - t.D % L;
  for (int64_t d = 0; d < vectors; d += L) store(dw + d, (load(from + d) - load(unit + d) * along) * factor);
  for (int64_t d = vectors; d < t.D; ++d) store_scalar(dw + d, (T(load_scalar(from + d)) - unit[d] * along) * factor);
}

}  // namespace mlhead::MLHEAD_ISA
