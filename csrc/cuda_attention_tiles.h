// The shared memory of query_attention.cu, and the products of queries and positions that fill it.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda_numbers.h"
#include "cuda_tiles.h"
#include "query_attention.h"

namespace mlhead {

constexpr int kThreads = 256;
constexpr int kSlice = 96;  // columns of the result in one block: the width of the heads of ML-Decoder

__device__ inline int least(int x, int y) {
  return x < y ? x : y;
}

template <typename T>
constexpr int kSide = sizeof(T) == 8 ? 32 : 64;  // queries, and positions, of a tile of scores
template <typename T>
constexpr int kStep = sizeof(T) == 2 ? 32 : 16;  // length of a product between two loads

template <AttentionResult RESULT>
constexpr bool kRowsAreQueries = RESULT == AttentionResult::out || RESULT == AttentionResult::dq;
template <AttentionResult RESULT>
constexpr bool kNeedsDs = RESULT == AttentionResult::dq || RESULT == AttentionResult::dk;

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

// Whether a tile of scores has all positions. The gradients then take delta from it.
__host__ __device__ inline bool sees_whole_rows(int64_t L, int tile) {
  return L <= tile;
}

// The shared memory of a block. Weights of the type of the sums take the place of their scores, and the rows that they
// are multiplied with that of the operands of the scores; 16-bit weights change places with them. At the end, the sums
// take the place of everything.
template <typename T, AttentionResult RESULT, int WIDTH>
struct AttentionShared {
  using Sum = SumOf<T>;
  static constexpr int kTile = kSide<T>;
  using Stage = TileStage<T, kThreads, kTile, kStep<T>, WIDTH, true>;  // of the features of queries or positions
  using StageX = TileStage<T, kThreads, kStep<T>, 128, WIDTH, true>;   // of rows that are multiplied with weights
  using Scores = TileProduct<T, kThreads, kTile, kTile, kStep<T>, true, false>;
  using Sums = TileProduct<T, kThreads, kTile, kSlice, kStep<T>, kRowsAreQueries<RESULT>, true>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(Sum);
  static constexpr int kPitch = kTile + 16 / int(sizeof(Sum)), kWeightPitch = kTile + 16 / int(sizeof(T));
  static constexpr int kSumPitch = kSlice + 16 / int(sizeof(Sum));
  static constexpr int kOperand = kTile * Stage::kPitch;
  static constexpr int kScoreBytes = kTile * kPitch * int(sizeof(Sum));
  static constexpr int kWeightBytes = kTile * kWeightPitch * int(sizeof(T));
  static constexpr int kXBytes = kStep<T> * StageX::kPitch * int(sizeof(T));
  static constexpr int larger(int x, int y) { return x > y ? x : y; }
  static constexpr int kScoresAt =
      (larger(2 * kOperand * int(sizeof(T)), kInPlace ? kXBytes : kWeightBytes) + 127) / 128 * 128;
  static constexpr int kMoreAt = kScoresAt + kScoreBytes;  // of out: factors; of dq and dk: products of dout and v
  static constexpr int kMoreBytes = RESULT == AttentionResult::out ? kTile * Sums::kFactorPitch * int(sizeof(Sum))
                                    : kNeedsDs<RESULT>             ? kScoreBytes
                                                                   : 0;
  static constexpr int kBytes = larger(kMoreAt + kMoreBytes, kTile * kSumPitch * int(sizeof(Sum)));
  static_assert(kInPlace || kXBytes <= kScoreBytes, "the rows fit where the scores were");

  T *a, *b;
  Sum *scores, *dweights, *factors;
  T *weights, *x;
  Sum* sums;

  __device__ explicit AttentionShared(unsigned char* memory)
      : a(reinterpret_cast<T*>(memory)),
        b(a + kOperand),
        scores(reinterpret_cast<Sum*>(memory + kScoresAt)),
        dweights(reinterpret_cast<Sum*>(memory + kMoreAt)),
        factors(dweights),
        weights(reinterpret_cast<T*>(kInPlace ? memory + kScoresAt : memory)),
        x(reinterpret_cast<T*>(kInPlace ? memory : memory + kScoresAt)),
        sums(reinterpret_cast<Sum*>(memory)) {}
};

// Some rows of one image and one head: a pointer to the first, and how many there are.
template <typename T>
struct AttentionRows {
  const T* data;
  int64_t n, e;
  int count;

  __device__ AttentionRows(const AttentionOperand& x, int64_t b, int64_t first, int64_t feature, int count_)
      : data(static_cast<const T*>(x.data) + b * x.b + first * x.n + feature * x.e), n(x.n), e(x.e), count(count_) {}
};

// result[i, j] = factor x[i] . y[j] over a head of d features.
template <typename S, typename T>
__device__ void dot_products(const S& shared, const AttentionRows<T>& x, const AttentionRows<T>& y, int d,
                             SumOf<T> factor, SumOf<T>* result) {
  typename S::Stage stage_x, stage_y;
  typename S::Scores products;
  const auto load = [&](int e) {
    stage_x.load(x.data + int64_t(e) * x.e, x.n, x.e, x.count, d - e);
    stage_y.load(y.data + int64_t(e) * y.e, y.n, y.e, y.count, d - e);
  };
  load(0);
#pragma unroll 1
  for (int e = 0; e < d; e += kStep<T>) {
    __syncthreads();
    stage_x.store(shared.a);
    stage_y.store(shared.b);
    __syncthreads();
    if (e + kStep<T> < d) load(e + kStep<T>);
    products.step(shared.a, S::Stage::kPitch, shared.b, S::Stage::kPitch, x.count, y.count);
  }
  products.finish(result, S::kPitch, factor);
  __syncthreads();
}

}  // namespace mlhead
