// Cross-attention of the queries of one head over the positions of one image.
// Included by gemm_kernels.h, once for each instruction set.
//
// Scores are kept transposed, (l, g): queries are the lanes of a register. Softmax, dropout and the sums over l then
// run without a sum across lanes, and the scores' product reads k row by row where it lies, against q^T, which is made
// once for all images.
//
//     forward   s(l,g) = k(l,:) q^T(:,g)                 a whole column of positions for a block of queries: L2
//               p = drop(exp(s - max_l s)),  out(g,:) = p^T v / sum_l exp(s - max_l s)
//     backward  for a block of positions (L1, L2): s, p = exp(s - max) / sum as forward had it, dp = v dout^T
//               ds = p (drop'(dp) - delta),  delta(g) = dout(g,:) . out(g,:)
//               dv = drop(p) dout,  dk = ds q,  dq += ds^T k
//
// Scores are multiplied by 1 / sqrt(d) on their way into the exponent, and ds on its way out. Maximum and sum are kept
// for backward rather than lse = max + log sum: weights then are those of the forward bit for bit and of sum 1, where
// the rounding of lse, and of the exponential of the one large weight, would be an error that ds does not cancel.
#pragma once

#include "attention.h"
#include "pool_kernels.h"
#include "rows_kernels.h"

namespace mlhead::MLHEAD_ISA {

inline constexpr int64_t kPositions = 64;          // the fewest of a block, backward
inline constexpr int64_t kBlockScores = 20 << 10;  // scores of a block, backward: with dp a share of L2
inline constexpr int64_t kRowsOfProduct = 512;
inline constexpr int kGroup = 4;  // registers of queries that a pass over l takes together: two cache lines

// C [+]= A B over numbers of T, by this thread alone.
template <typename T>
static void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t a_m, int64_t a_k, const T* b, int64_t b_k,
                     int64_t b_n, T* c, int64_t c_m, bool accumulate = false) {
  constexpr Dtype dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
  const Gemm g{dtype, M, N, K, a, a_m, a_k, b, b_k, b_n, c, c_m, 1, nullptr, accumulate};
  constexpr int64_t many = 1 << 10;  // other items: no reason to cut this one finer
  Plan plan = plan_gemm(g, kLanes<T>, many);
  // All rows in one block: what there is of A is in L2 anyway, and every further block would copy B once more.
  plan.block_m = min(M, kRowsOfProduct);
  for (int64_t tile = 0; tile < plan.tiles_m * plan.tiles_n; ++tile) run_tile<T>(g, plan, tile);
}

// A block of rows as numbers of T: where it lies if it holds such, else a copy.
template <typename T>
struct Numbers {
  const T* data;
  int64_t rows, columns;  // strides
};
template <typename S, typename T>
static Numbers<T> numbers(const Matrix& m, int64_t first, int64_t rows, int64_t columns, T* copy) {
  const S* from = static_cast<const S*>(m.data) + first * m.rows;
  if constexpr (std::is_same_v<S, T>) {
    if (m.columns == 1 || m.rows == 1) return {from, m.rows, m.columns};
  }
  copy_block<S, T>(rows, columns, from, m.rows, m.columns, copy, columns);
  return {copy, columns, 1};
}

// to(c, r) = from(r, c), `width` numbers to a row, zeros after the first `rows`.
template <typename S, typename T>
static void transpose_block(int64_t rows, int64_t columns, const Matrix& from, int64_t first, T* to, int64_t width) {
  const S* at = static_cast<const S*>(from.data) + first * from.rows;
  copy_block<S, T>(columns, rows, at, from.columns, from.rows, to, width);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = rows; r < width; ++r) to[c * width + r] = T(0);
}

// Where block i begins among the transposed queries of a head, in numbers.
template <typename T>
static int64_t packed_offset(const QueryBlocks& blocks, int64_t d, int64_t i) {
  int64_t offset = 0;
  for (int64_t j = 0; j < i; ++j) offset += d * padded<T>(blocks.size(j));
  return offset;
}

// All blocks of one head, for all images, and after them its rows as numbers of T; `packed` holds packed_bytes.
template <typename S>
static void pack_queries(const AttentionTask& t, void* packed) {
  using T = typename Accumulate<S>::type;
  const QueryBlocks blocks(t.G, t.most_queries);
  T* to = static_cast<T*>(packed);
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t width = padded<T>(blocks.size(i));
    transpose_block<S, T>(blocks.size(i), t.d, t.q, blocks.first(i), to, width);
    to += t.d * width;
  }
  copy_block<S, T>(t.G, t.d, static_cast<const S*>(t.q.data), t.q.rows, t.q.columns, to, t.d);
}
template <typename S>
static int64_t packed_bytes(int64_t G, int64_t d, int64_t most_queries) {
  using T = typename Accumulate<S>::type;
  const QueryBlocks blocks(G, most_queries);
  return (packed_offset<T>(blocks, d, blocks.count) + G * d) * int64_t(sizeof(T));
}

// q^T of block i, (d, padded): what pack_queries left, or made in `own`.
template <typename S, typename T>
static const T* transposed_queries(const AttentionTask& t, const QueryBlocks& blocks, int64_t i, T* own) {
  if (t.packed) return static_cast<const T*>(t.packed) + packed_offset<T>(blocks, t.d, i);
  transpose_block<S, T>(blocks.size(i), t.d, t.q, blocks.first(i), own, padded<T>(blocks.size(i)));
  return own;
}

// Rows of block i of the queries as numbers of T.
template <typename S, typename T>
static Numbers<T> query_rows(const AttentionTask& t, const QueryBlocks& blocks, int64_t i, T* copy) {
  if (!t.packed) return numbers<S, T>(t.q, blocks.first(i), blocks.size(i), t.d, copy);
  const T* rows = static_cast<const T*>(t.packed) + packed_offset<T>(blocks, t.d, blocks.count);
  return {rows + blocks.first(i) * t.d, t.d, 1};
}

// What dropout multiplies the weights of position l and the queries of one register by.
template <typename T>
struct Factors {
  Counters<T> number;  // (h G + g) L of each lane
  Dropout dropout;

  Factors(const AttentionTask& t, int64_t first) : dropout(t.dropout) {
    for (int i = 0; i < kLanes<T>; ++i) number[i] = (t.first_query + uint32_t(first + i)) * uint32_t(t.L);
  }
  inline __attribute__((always_inline)) Vec<T> at(int64_t l) const {
    return dropout_factor<T>(number + uint32_t(l), dropout);
  }
};

// Scores (L, width) become drop(exp(s - max)) in V registers of queries; their sum without dropout, and their maximum.
template <typename T, int V>
static void softmax_columns(const AttentionTask& t, int64_t width, int64_t first, T* scores, T* maxima, T* sums) {
  constexpr int L = kLanes<T>;
  constexpr T infinity = T(__builtin_inf());
  Vec<T> maximum[V], sum[V] = {}, part[V] = {};
  const Vec<T> scale = Vec<T>{} + T(t.scale);
  for (int v = 0; v < V; ++v) maximum[v] = Vec<T>{} - infinity;
  auto wrong = maximum[0] == Vec<T>{};  // a score that is NaN or infinite makes its query NaN; all false here
  decltype(wrong) is_wrong[V];
  for (int v = 0; v < V; ++v) is_wrong[v] = wrong;
  bool any = false;
  for (int64_t l = 0; l < t.L; ++l) {
    if (t.mask && !t.mask[l * t.mask_l]) continue;
    any = true;
    const T* row = scores + l * width;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> s = load(row + v * L);
      maximum[v] = s > maximum[v] ? s : maximum[v];
      is_wrong[v] |= ~(s < Vec<T>{} + infinity);
    }
  }
  for (int v = 0; v < V; ++v)
    if (any) is_wrong[v] |= maximum[v] == Vec<T>{} - infinity;

  const auto pass = [&](auto drops) {
    constexpr bool kDrops = decltype(drops)::value;
    for (int v = 0; v < V; ++v) {
      const Factors<T> factors(t, first + v * L);
      for (int64_t l0 = 0; l0 < t.L; l0 += kFew) {
        part[v] = Vec<T>{};
        for (int64_t l = l0, end = min(l0 + kFew, t.L); l < end; ++l) {
          T* at = scores + l * width + v * L;
          if (t.mask && !t.mask[l * t.mask_l]) {
            store(at, Vec<T>{});
            continue;
          }
          const Vec<T> e = exp_of_negative<T>((load(at) - maximum[v]) * scale);
          part[v] += e;
          if constexpr (kDrops)
            store(at, e * factors.at(l));
          else
            store(at, e);
        }
        sum[v] += part[v];
      }
    }
  };
  t.dropout.active ? pass(std::true_type{}) : pass(std::false_type{});
  for (int v = 0; v < V; ++v) {
    store(maxima + v * L, maximum[v]);
    store(sums + v * L, is_wrong[v] ? Vec<T>{} + T(__builtin_nan("")) : sum[v]);
  }
}

template <typename S>
static void attend_forward(const AttentionTask& t) {
  using T = typename Accumulate<S>::type;
  const QueryBlocks blocks(t.G, t.most_queries);
  const int64_t first = blocks.first(t.block), count = blocks.size(t.block), width = padded<T>(count), d = t.d;
  const int64_t own = t.packed ? 0 : d * width;
  const int64_t copied = min(t.L, kPositions) * d;
  Scratch<T> scratch(own + 2 * width, t.L * width, copied + padded<T>(count * d), kAttentionScratch);
  const T* q_t = transposed_queries<S, T>(t, blocks, t.block, scratch.part[0] + 2 * width);
  T *maxima = scratch.part[0], *sums = maxima + width, *scores = scratch.part[1];
  T *copy = scratch.part[2], *result = copy + copied;

  // Rows that must be copied are taken a block at a time; those in place, all at once.
  const bool in_place = std::is_same_v<S, T>;
  const int64_t step = in_place && (t.k.columns == 1 || t.k.rows == 1) ? t.L : kPositions;
  for (int64_t l = 0; l < t.L; l += step) {
    const int64_t rows = min(step, t.L - l);
    const Numbers<T> k = numbers<S, T>(t.k, l, rows, d, copy);
    multiply<T>(rows, width, d, k.data, k.rows, k.columns, q_t, width, 1, scores + l * width, width);
  }
  int64_t g = 0;
  for (; g + kGroup * kLanes<T> <= width; g += kGroup * kLanes<T>)
    softmax_columns<T, kGroup>(t, width, first + g, scores + g, maxima + g, sums + g);
  for (; g < width; g += kLanes<T>) softmax_columns<T, 1>(t, width, first + g, scores + g, maxima + g, sums + g);

  const int64_t step_v = in_place && (t.v.columns == 1 || t.v.rows == 1) ? t.L : kPositions;
  for (int64_t l = 0; l < t.L; l += step_v) {
    const int64_t rows = min(step_v, t.L - l);
    const Numbers<T> v = numbers<S, T>(t.v, l, rows, d, copy);
    multiply<T>(count, d, rows, scores + l * width, 1, width, v.data, v.rows, v.columns, result, d, l > 0);
  }
  T *kept_maxima = static_cast<T*>(t.kept) + first, *kept_inverses = kept_maxima + t.G;
  S* out = static_cast<S*>(t.out) + first * t.out_g;
  for (int64_t i = 0; i < count; ++i) {
    const bool none = sums[i] == T(0);  // no key at all
    const T factor = none ? T(0) : T(1) / sums[i];
    kept_maxima[i] = none ? T(0) : maxima[i];
    kept_inverses[i] = factor;
    T* row = result + i * d;
    for (int64_t e = 0; e < d; ++e) row[e] = none ? T(0) : row[e] * factor;
  }
  write_block<T, S>(count, d, result, d, out, t.out_g, 1);
}

// One block of positions and one register of queries, backward: first scores become p, then, when delta is known,
// scores become drop(p) and products ds.
template <typename T>
struct BackwardColumns {
  const AttentionTask& t;
  int64_t first_position, rows, width, first_query;
  T *scores, *products;

  bool masked(int64_t r) const { return t.mask && !t.mask[(first_position + r) * t.mask_l]; }

  // Returns sum_l p drop'(dp).
  template <bool kDrops>
  Vec<T> exponentiate(Vec<T> maximum, Vec<T> inverse) const {
    const Factors<T> factors(t, first_query);
    const Vec<T> scale = Vec<T>{} + T(t.scale);
    Vec<T> sum = {};
    for (int64_t r0 = 0; r0 < rows; r0 += kFew) {
      Vec<T> part = {};
      for (int64_t r = r0, end = min(r0 + kFew, rows); r < end; ++r) {
        T* s = scores + r * width;
        Vec<T> p = inverse - inverse;  // 0, but NaN where the query's weights are
        if (!masked(r)) {
          p = exp_of_negative<T>((load(s) - maximum) * scale) * inverse;
          Vec<T> dp = load(products + r * width);
          if constexpr (kDrops) {  // stored, so that delta and ds take it rounded alike: where p is near 1 they cancel
            dp *= factors.at(first_position + r);
            store(products + r * width, dp);
          }
          part += p * dp;
        }
        store(s, p);
      }
      sum += part;
    }
    return sum;
  }

  template <bool kDrops>
  void differentiate(Vec<T> delta) const {
    const Factors<T> factors(t, first_query);
    const Vec<T> scale = Vec<T>{} + T(t.scale);
    for (int64_t r = 0; r < rows; ++r) {
      T *s = scores + r * width, *at = products + r * width;
      const Vec<T> p = load(s);
      if constexpr (kDrops) store(s, p * factors.at(first_position + r));
      store(at, masked(r) ? p : p * (load(at) - delta) * scale);
    }
  }
};

template <typename S>
static void attend_backward(const AttentionTask& t) {
  using T = typename Accumulate<S>::type;
  constexpr bool in_place = std::is_same_v<S, T>;
  const QueryBlocks blocks(t.G, t.most_queries);
  const int64_t d = t.d, most = divide_up(t.G, blocks.count), widest = padded<T>(most);
  const int64_t positions = min(t.L, max(kPositions, kBlockScores / widest)), copied = positions * d;
  const bool whole = positions == t.L;  // then delta is a sum over the block, else it is taken from the output
  const int64_t own = t.packed ? 0 : d * widest;
  const int64_t sums = in_place ? 0 : t.L * d;  // 16-bit gradients are summed over the blocks of queries in T
  Scratch<T> scratch(3 * widest + d * widest + own + 2 * most * d, 2 * positions * widest, 2 * copied + 2 * sums,
                     kAttentionScratch);
  T *maxima = scratch.part[0], *inverses = maxima + widest, *delta = inverses + widest, *dout_t = delta + widest;
  T *own_queries = dout_t + d * widest, *dout_rows = own_queries + own, *copy_q = dout_rows + most * d;
  T *scores = scratch.part[1], *products = scores + positions * widest;
  T *copy_k = scratch.part[2], *copy_v = copy_k + copied;
  T *dk = in_place ? static_cast<T*>(t.dk) : copy_v + copied, *dv = in_place ? static_cast<T*>(t.dv) : dk + sums;
  const int64_t dk_l = in_place ? t.dk_l : d;

  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t first = blocks.first(i), count = blocks.size(i), width = padded<T>(count);
    const T* q_t = transposed_queries<S, T>(t, blocks, i, own_queries);
    const Numbers<T> q = query_rows<S, T>(t, blocks, i, copy_q);
    copy_block<S, T>(count, d, static_cast<const S*>(t.dout.data) + first * t.dout.rows, t.dout.rows, t.dout.columns,
                     dout_rows, d);
    transpose_block<T, T>(count, d, {dout_rows, d, 1}, 0, dout_t, width);
    const S* out = static_cast<const S*>(t.kept_out.data) + first * t.kept_out.rows;
    for (int64_t g = 0; g < width; ++g) {
      const T* kept = static_cast<const T*>(t.kept) + first + min(g, count - 1);
      maxima[g] = kept[0], inverses[g] = kept[t.G];
      Vec<T> sum = {};
      T rest = T(0);
      if (g < count && !whole) {
        const S* row = out + g * t.kept_out.rows;
        const int64_t vectors = t.kept_out.columns == 1 ? d - d % kLanes<T> : 0;
        for (int64_t e = 0; e < vectors; e += kLanes<T>) sum += load(row + e) * load(dout_rows + g * d + e);
        for (int64_t e = vectors; e < d; ++e)
          rest += T(load_scalar(row + e * t.kept_out.columns)) * dout_rows[g * d + e];
      }
      delta[g] = sum_of_lanes<T>(sum) + rest;
    }
    for (int64_t l = 0; l < t.L; l += positions) {
      const int64_t rows = min(positions, t.L - l);
      const Numbers<T> k = numbers<S, T>(t.k, l, rows, d, copy_k), v = numbers<S, T>(t.v, l, rows, d, copy_v);
      multiply<T>(rows, width, d, k.data, k.rows, k.columns, q_t, width, 1, scores, width);
      multiply<T>(rows, width, d, v.data, v.rows, v.columns, dout_t, width, 1, products, width);
      for (int64_t g = 0; g < width; g += kLanes<T>) {
        const BackwardColumns<T> columns{t, l, rows, width, first + g, scores + g, products + g};
        const Vec<T> m = load(maxima + g), i = load(inverses + g);
        const Vec<T> sum =
            t.dropout.active ? columns.template exponentiate<true>(m, i) : columns.template exponentiate<false>(m, i);
        const Vec<T> known = whole ? sum : load(delta + g);
        t.dropout.active ? columns.template differentiate<true>(known) : columns.template differentiate<false>(known);
      }
      if (t.dv) multiply<T>(rows, d, count, scores, width, 1, dout_rows, d, 1, dv + l * dk_l, dk_l, i > 0);
      if (t.dk) multiply<T>(rows, d, count, products, width, 1, q.data, q.rows, q.columns, dk + l * dk_l, dk_l, i > 0);
      if (t.dq)
        multiply<T>(count, d, rows, products, 1, width, k.data, k.rows, k.columns,
                    static_cast<T*>(t.dq) + first * t.dq_g, t.dq_g, t.add_to_dq || l > 0);
    }
  }
  if (in_place) return;
  if (t.dk) write_block<T, S>(t.L, d, dk, d, static_cast<S*>(t.dk), t.dk_l, 1);
  if (t.dv) write_block<T, S>(t.L, d, dv, d, static_cast<S*>(t.dv), t.dk_l, 1);
}

}  // namespace mlhead::MLHEAD_ISA
