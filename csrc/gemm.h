// One strided matrix product, the whole arithmetic of group_fc on a CPU:
//
//     C(m, n) = sum_k A(m, k) B(k, n)  [+ bias(n)]
//
// A, B and C are read and written where they are, with any strides (0 and transposed included). The three products of
// group_fc differ only in their strides:
//
//     forward   logits(b, j)    = sum_e h(b, e) weight(e, j) + bias(j)
//     dh        dh(b, e)        = sum_j dlogits(b, j) weight(e, j)
//     dweight   dweight(e, j)   = sum_b h(b, e) dlogits(b, j)
//
// A SIMD register must run along one of the axes n, m or k, and each choice is right somewhere (see gemm_plan.cpp).
// The caller makes a Plan once, cuts the product into tiles that threads may compute in any order, and calls run_tile
// on each. A tile reduces over all of k in a fixed order, so a result depends neither on the number of threads nor on
// the run.
#pragma once

#include <cstdint>
#include <optional>

#include "attention.h"
#include "class_loss_task.h"
#include "dtypes.h"
#include "pool.h"
#include "rows.h"

namespace mlhead {

struct Gemm {
  Dtype dtype;
  int64_t M, N, K;
  const void* a;
  int64_t a_m, a_k;  // strides, in elements
  const void* b;
  int64_t b_k, b_n;
  void* c;
  int64_t c_m, c_n;
  const void* bias;         // (N), in the accumulation type, contiguous; or null
  bool accumulate = false;  // add to C, whose columns are then contiguous; not for 16-bit types
};

enum class VectorAxis { n, m, k };

struct Plan {
  VectorAxis axis;
  // What follows speaks of the product after the exchange of m and n when axis is m.
  int64_t tile_m, tile_n;  // one tile: what run_tile computes
  int64_t block_m;         // rows of A that are kept together (in L2) while a block of B (in L1) passes over them
  int64_t block_k;         // length of one pass over k
  bool pack_a, pack_b;     // copy to scratch first: strides are bad for the caches, or the type is 16-bit
  bool scratch_c;          // sums live in scratch until they are final: C is 16-bit, or not contiguous along the vector
  int64_t tiles_m, tiles_n;
};

// `copies` is the number of such products the caller will run (groups): with few of them a product is cut finer.
// `axis` overrules the choice of the vector axis (for tests).
Plan plan_gemm(const Gemm& gemm, int64_t lanes, int64_t copies, std::optional<VectorAxis> axis = std::nullopt);

// The same product with the roles of m and n exchanged.
Gemm exchanged(const Gemm& gemm);

// The functions of one instruction set; each is compiled from the same source (gemm_kernels.h) under its own flags.
struct Kernels {
  const char* name;
  int64_t vector_bytes;
  void (*run_tile[kDtypes])(const Gemm& gemm, const Plan& plan, int64_t tile);
  // out[j] = sum_b x(b, j) for j < columns
  void (*column_sum[kDtypes])(const void* x, int64_t rows, int64_t columns, int64_t stride_row, int64_t stride_column,
                              void* out);
  // The pooling of csra_pool over one image's scores in a few columns.
  void (*pool[kDtypes])(const PoolTask& task);
  void (*pool_backward[kDtypes])(const PoolTask& task);
  // dw in the storage type of the weight, and in the accumulation type.
  void (*unit_row_backward[kDtypes])(const UnitRowTask& task);
  void (*unit_row_backward_accumulated[kDtypes])(const UnitRowTask& task);

  // One row of dropout_add_layer_norm and of relu_dropout.
  void (*norm_row[kDtypes])(const NormRow& task);
  void (*norm_row_backward[kDtypes])(const NormRow& task);
  void (*relu_row[kDtypes])(const ReluRow& task);
  void (*relu_row_backward[kDtypes])(const ReluRow& task);
  // The loss of a row of logits in the accumulation type, and a row's part of softmax's statistics.
  void (*loss_row[kDtypes])(LossRow& row);
  void (*softmax_row[kDtypes])(LossRow& row);
  // The cross-attention of one head and one image; packed_bytes and pack_queries are for queries shared by all images.
  void (*attend_forward[kDtypes])(const AttentionTask& task);
  void (*attend_backward[kDtypes])(const AttentionTask& task);
  void (*pack_queries[kDtypes])(const AttentionTask& task, void* packed);
  int64_t (*packed_bytes[kDtypes])(int64_t G, int64_t d, int64_t most_queries);

  int64_t lanes(Dtype dtype) const { return vector_bytes / (dtype == Dtype::f64 ? 8 : 4); }
};

// The best set this processor has; ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers it, as it does for torch itself.
const Kernels& kernels();
// By name (baseline, avx2, avx512), or null where this build or this processor has it not.
const Kernels* kernels_by_name(const char* name);

// At least `bytes` of memory aligned to 64, reused from call to call (a megabyte or two). A thread has two such blocks:
// one for products, and one for kernels that are made of products.
inline constexpr int kProductScratch = 0, kAttentionScratch = 1, kLossScratch = 1;
void* thread_scratch(int64_t bytes, int block = kProductScratch);

}  // namespace mlhead
