// The pooling of csra_pool on a CPU, and the schemas of its private ops.
//
// A chunk's raw scores (B, L, N) come from a matrix product of torch; each column (image b, class of one head) is
// pooled over its L positions by itself, so images and blocks of columns are shared out over torch's threads in any
// order. The arithmetic is in pool_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "csra_pool_checks.h"
#include "gemm.h"

namespace mlhead {
namespace {

// What the columns of one block have of their own, as numbers of the accumulation type.
template <typename T>
struct ColumnBlock {
  alignas(64) T scale[kPoolColumns], sharpness[kPoolColumns], infinite[kPoolColumns], lam[kPoolColumns];
  alignas(64) T dlogits[kPoolColumns] = {}, result[kPoolColumns];
  int64_t n, columns;

  ColumnBlock(const ScoresCall& p, int64_t n_) : n(n_), columns(std::min<int64_t>(kPoolColumns, p.N - n_)) {
    for (int64_t i = 0; i < kPoolColumns; ++i) {
      const int64_t column = n + std::min(i, columns - 1), h = (p.first + column) / p.classes;
      const bool is_infinite = std::isinf(p.temperatures[h]);
      scale[i] = p.scale ? static_cast<const T*>(p.scale)[column] : T(1);
      sharpness[i] = is_infinite ? T(0) : T(p.temperatures[h]);
      infinite[i] = is_infinite ? T(1) : T(0);
      lam[i] = T(p.lam[h]);
    }
  }
};

// Runs f(block of columns, image, task) over all images and blocks of columns.
template <typename T, typename F>
void for_each_block(const ScoresCall& p, const void* scores, void* ds, double average, const F& f) {
  const int64_t blocks = (p.N + kPoolColumns - 1) / kPoolColumns, items = blocks * p.B;
  const auto range = [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(2 * p.L * kPoolColumns * int64_t(sizeof(T)));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks;
      ColumnBlock<T> block(p, item % blocks * kPoolColumns);
      const int64_t offset = (b * p.s_b + block.n) * element_size(p.dtype);
      const char* from = static_cast<const char*>(scores) + offset;
      char* to = ds ? static_cast<char*>(ds) + offset : nullptr;
      f(block, b,
        PoolTask{p.L, block.columns, from, to, p.s_l, block.scale, block.sharpness, block.infinite, block.lam, average,
                 block.result, block.dlogits, scratch});
    }
  };
  if (items == 0) return;
  constexpr int64_t worth_a_thread = 1 << 14;  // scores: 20 us or so
  const int64_t grain = 1 + worth_a_thread / (p.L * kPoolColumns);
  if (items <= grain) return range(0, items);
  torch::stable::parallel_for(0, items, grain, range);
}

template <typename T>
void run_forward(const ScoresCall& p, const void* scores, double average, T* pooled, int64_t stride_b) {
  const auto kernel = kernels().pool[int(p.dtype)];
  for_each_block<T>(p, scores, nullptr, average, [&](ColumnBlock<T>& block, int64_t b, const PoolTask& task) {
    kernel(task);
    std::copy_n(block.result, block.columns, pooled + b * stride_b + block.n);
  });
}

template <typename S, typename T>
void run_backward(const ScoresCall& p, const void* scores, void* ds, double average, const S* dlogits, int64_t d_b,
                  int64_t d_c) {
  const auto kernel = kernels().pool_backward[int(p.dtype)];
  for_each_block<T>(p, scores, ds, average, [&](ColumnBlock<T>& block, int64_t b, const PoolTask& task) {
    for (int64_t i = 0; i < block.columns; ++i)
      block.dlogits[i] = load_scalar(dlogits + b * d_b + (p.first + block.n + i) % p.classes * d_c);
    kernel(task);
  });
}

void csra_pool_scores_cpu(const Tensor& scores, const std::optional<Tensor>& scale, const Tensor& heads,
                          int64_t classes, int64_t first, double average, const Tensor& pooled) {
  const ScoresCall p("csra_pool_scores", scores, scale, heads, classes, first);
  p.check_result("pooled", pooled, scores);
  const void* from = scores.const_data_ptr();
  void* to = pooled.mutable_data_ptr();
  const int64_t stride_b = pooled.strides()[0];
  if (p.dtype == Dtype::f64) return run_forward(p, from, average, static_cast<double*>(to), stride_b);
  run_forward(p, from, average, static_cast<float*>(to), stride_b);
}

void csra_pool_scores_backward_cpu(const Tensor& scores, const std::optional<Tensor>& scale, const Tensor& heads,
                                   int64_t classes, int64_t first, double average, const Tensor& dlogits,
                                   const Tensor& ds) {
  const ScoresCall p("csra_pool_scores_backward", scores, scale, heads, classes, first);
  p.check_dlogits(dlogits, scores);
  p.check_ds(ds, scores);
  const void *at = scores.const_data_ptr(), *d = dlogits.const_data_ptr();
  void* to = ds.mutable_data_ptr();
  const auto strides = dlogits.strides();
  const int64_t d_b = strides[0], d_c = strides[1];
  switch (p.dtype) {
    case Dtype::f32: return run_backward<float, float>(p, at, to, average, static_cast<const float*>(d), d_b, d_c);
    case Dtype::f64: return run_backward<double, double>(p, at, to, average, static_cast<const double*>(d), d_b, d_c);
    case Dtype::f16: return run_backward<Half, float>(p, at, to, average, static_cast<const Half*>(d), d_b, d_c);
    case Dtype::bf16:
      return run_backward<BFloat16, float>(p, at, to, average, static_cast<const BFloat16*>(d), d_b, d_c);
  }
}

void csra_unit_rows_backward_cpu(const Tensor& dw, const Tensor& weight, const Tensor& norm, bool divide) {
  const UnitRowsCall p("csra_unit_rows_backward", dw, weight, norm);
  char* to = static_cast<char*>(dw.mutable_data_ptr());
  const char* from = static_cast<const char*>(weight.const_data_ptr());
  const void* norms = norm.const_data_ptr();
  const Kernels& k = kernels();
  const auto kernel = (p.dw_accumulated ? k.unit_row_backward_accumulated : k.unit_row_backward)[int(p.dtype)];
  const int64_t dw_bytes = p.dw_accumulated && p.dtype != Dtype::f64 ? 4 : element_size(p.dtype);
  const auto range = [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(p.D * 8);
    for (int64_t n = begin; n < end; ++n) {
      const double one =
          p.dtype == Dtype::f64 ? static_cast<const double*>(norms)[n] : static_cast<const float*>(norms)[n];
      kernel({p.D, from + n * p.w_n * element_size(p.dtype), p.w_d, one, divide, to + n * p.dw_n * dw_bytes, scratch});
    }
  };
  if (p.N * p.D > 0) torch::stable::parallel_for(0, p.N, 1 + (1 << 16) / p.D, range);
}

}  // namespace
}  // namespace mlhead

// The only place where the schemas are written; the CUDA library adds implementations to them.
STABLE_TORCH_LIBRARY_FRAGMENT(mlhead_C, m) {
  m.def(
      "csra_pool_scores(Tensor scores, Tensor? scale, Tensor heads, int classes, int first, float average, "
      "Tensor(a!) pooled) -> ()");
  m.def(
      "csra_pool_scores_backward(Tensor scores, Tensor? scale, Tensor heads, int classes, int first, "
      "float average, Tensor dlogits, Tensor(a!) ds) -> ()");
  m.def("csra_unit_rows_backward(Tensor(a!) dw, Tensor weight, Tensor norm, bool divide) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("csra_pool_scores", TORCH_BOX(&mlhead::csra_pool_scores_cpu));
  m.impl("csra_pool_scores_backward", TORCH_BOX(&mlhead::csra_pool_scores_backward_cpu));
  m.impl("csra_unit_rows_backward", TORCH_BOX(&mlhead::csra_unit_rows_backward_cpu));
}
