// How a product is vectorised, blocked and cut into tiles. Pure functions of shape, strides and register width: a
// result never depends on the number of threads.
#include <algorithm>
#include <cstdlib>

#include "gemm.h"

namespace mlhead {
namespace {

// Cycles on Zen 3 and its like, rough; only their ratios matter.
constexpr double kMultiplyAdd = 0.5;     // one register
constexpr double kCopy = 0.15;           // one element, converted or zero-padded on the way
constexpr double kTransposedCopy = 0.4;  // one element
constexpr double kFold = 3.0;            // the sum of the lanes of one register

constexpr int64_t kNear = 1024;   // bytes between rows that may be read in place: a few rows to a page
constexpr int64_t kFewRows = 8;   // so few passes over B that copying it first does not pay
constexpr int64_t kBlockK = 256;  // 24 columns x 256 fp32 = 24 KiB of L1
constexpr int64_t kBlockM = 96;   // 96 rows x 256 fp32 = 96 KiB of L2
constexpr int64_t kDotBlockK = 768;
constexpr int64_t kTileVectors = 16;       // widest tile, in registers
constexpr int64_t kScratchC = 256 * 1024;  // bytes
constexpr int64_t kWantedTiles = 64;       // enough for any number of cores that a bag of this size can use
constexpr double kTileWork = 1e6;          // multiply-adds under which cutting further costs more than it gives

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

bool is_16_bit(Dtype dtype) {
  return dtype == Dtype::f16 || dtype == Dtype::bf16;
}

// Whether B must be copied before vectors along n can read it.
bool must_pack_b(const Gemm& g) {
  return g.b_n != 1;
}

double cost_n(const Gemm& g, int64_t lanes) {
  const double M = double(g.M), N = double(g.N), K = double(g.K);
  double cycles = kMultiplyAdd * M * double(divide_up(g.N, lanes)) * K;
  if (must_pack_b(g)) cycles += (g.b_n == 1 ? kCopy : kTransposedCopy) * N * K;
  if (g.c_n != 1) cycles += kTransposedCopy * M * N;
  return cycles;
}

double cost_k(const Gemm& g, int64_t lanes) {
  const double M = double(g.M), N = double(g.N), K = double(g.K);
  double cycles =
      kMultiplyAdd * M * N * double(divide_up(g.K, lanes)) + kFold * M * N * double(divide_up(g.K, kDotBlockK));
  if (g.a_k != 1) cycles += kTransposedCopy * M * K;
  if (g.b_k != 1) cycles += kTransposedCopy * N * K;
  return cycles;
}

}  // namespace

Gemm exchanged(const Gemm& g) {
  return {g.dtype, g.N, g.M, g.K, g.b, g.b_n, g.b_k, g.a, g.a_k, g.a_m, g.c, g.c_n, g.c_m, g.bias, g.accumulate};
}

Plan plan_gemm(const Gemm& gemm, int64_t lanes, int64_t copies, std::optional<VectorAxis> axis) {
  Plan plan;
  Gemm g = gemm;
  const double along_n = cost_n(g, lanes), along_k = cost_k(g, lanes);
  // bias runs along n, and the kernels know it only there.
  const double along_m = g.bias ? 1e300 : cost_n(exchanged(g), lanes);
  plan.axis = along_n <= along_m && along_n <= along_k ? VectorAxis::n
              : along_m <= along_k                     ? VectorAxis::m
                                                       : VectorAxis::k;
  if (axis) plan.axis = *axis;
  if (g.accumulate) plan.axis = VectorAxis::n;  // the only one that finds C as it left it
  if (plan.axis == VectorAxis::m) g = exchanged(g);

  const int64_t size = is_16_bit(g.dtype) ? 4 : element_size(g.dtype);  // of the accumulation type
  if (plan.axis == VectorAxis::k) {
    plan.pack_a = is_16_bit(g.dtype) || g.a_k != 1;
    plan.pack_b = is_16_bit(g.dtype) || g.b_k != 1;
    plan.scratch_c = true;
    plan.block_k = kDotBlockK;
    plan.block_m = plan.pack_a ? 16 : kBlockM;
    plan.tile_n = std::min<int64_t>(g.N, 48);
    plan.tile_m = std::min<int64_t>(g.M, 512);
  } else {
    plan.pack_b = must_pack_b(g);
    // In place, a step of k reads one number of each row of A: good along k, and good along m if the next step is not
    // another page.
    plan.pack_a = is_16_bit(g.dtype) || (g.a_k != 1 && g.N > lanes && std::abs(g.a_k) * size > kNear && g.a_k != 0);
    plan.scratch_c = is_16_bit(g.dtype) || g.c_n != 1;
    plan.block_k = kBlockK;
    plan.block_m = kBlockM;
    // Tiles of equal width, in whole registers.
    const int64_t vectors = divide_up(g.N, lanes);
    plan.tile_n =
        lanes * std::max<int64_t>(1, divide_up(vectors, std::max<int64_t>(1, divide_up(vectors, kTileVectors))));
    plan.tile_m = g.M;
    if (plan.scratch_c && g.K > plan.block_k)
      plan.tile_m = std::min(plan.tile_m, kScratchC / (size * plan.tile_n) / 8 * 8);
  }
  plan.tile_m = std::max<int64_t>(plan.tile_m, 1);
  plan.tile_n = std::max<int64_t>(plan.tile_n, 1);

  // Few products: cut along m too, as long as a tile is worth a thread's while.
  const int64_t columns = divide_up(g.N, plan.tile_n);
  const double work = double(g.M) * double(g.N) * double(g.K);
  const int64_t wanted = std::min<int64_t>(divide_up(kWantedTiles, std::max<int64_t>(1, copies * columns)),
                                           int64_t(work / double(std::max<int64_t>(1, columns)) / kTileWork));
  if (wanted > 1)
    plan.tile_m =
        std::min(plan.tile_m, std::max<int64_t>(plan.pack_b ? 96 : 16, divide_up(divide_up(g.M, wanted), 8) * 8));
  plan.tiles_m = divide_up(g.M, plan.tile_m);
  plan.tiles_n = columns;
  return plan;
}

}  // namespace mlhead
