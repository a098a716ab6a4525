// The losses in the head on a CPU: the kernels over a block of logits, for heads that make the logits themselves, and
// the schemas of the private ops of both devices. group_fc_loss has a pass of its own, in group_fc_loss_cpu.cpp.
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "class_loss_rows.h"

namespace mlhead {
namespace {

// Runs f(block, group, image, z of T) over all rows. A row of another type is widened on the way in, and rounded on the
// way out where `write`.
template <typename S, typename F>
void for_each_row(const LossCall& call, const LossOptions& options, void* z, bool write, const F& f) {
  using T = typename Accumulate<S>::type;
  constexpr int64_t worth_a_thread = 1 << 13;  // logits: 20 us or so
  const auto range = [&](int64_t begin, int64_t end) {
    T* const scratch = static_cast<T*>(thread_scratch(3 * call.N * int64_t(sizeof(T)), kLossScratch));
    for (int64_t g = 0; g < call.G; ++g) {
      const int64_t first = call.first + g * call.group_classes;
      const int64_t n = std::clamp<int64_t>(call.num_classes - first, 0, call.N);
      const LossBlock<T> block(call, options, n > 0 ? first : 0, n, scratch);
      for (int64_t b = begin; b < end; ++b) {
        S* const stored = static_cast<S*>(z) + g * call.z_g + b * call.z_b;
        if (n > 0) {
          T* const row = std::is_same<S, T>::value ? reinterpret_cast<T*>(stored) : scratch + 2 * call.N;
          if constexpr (!std::is_same<S, T>::value) widen(stored, 1, n, row);
          f(block, b, row);
          if constexpr (!std::is_same<S, T>::value)
            for (int64_t j = 0; write && j < n; ++j) store_scalar(stored + j, row[j]);
        }
        for (int64_t j = n; write && j < call.N; ++j) store_scalar(stored + j, T(0));
      }
    }
  };
  if (call.B == 0 || call.N == 0) return;
  const int64_t grain = 1 + worth_a_thread / (call.G * call.N);
  if (call.B <= grain) return range(0, call.B);
  torch::stable::parallel_for(0, call.B, grain, range);
}

template <typename S>
void run_gradient(const LossCall& call, const LossOptions& options, void* z, double factor, void* row_loss,
                  const void* statistics, bool need_dz) {
  using T = typename Accumulate<S>::type;
  const auto kernel = kernels().loss_row[int(call.dtype)];
  for_each_row<S>(call, options, z, need_dz, [&](const LossBlock<T>& block, int64_t b, T* row) {
    LossRow r{};
    const double weight = block.weight_of(b);
    r.factor = factor * weight, r.need_dz = need_dz;
    if (statistics) {
      const T* const s = static_cast<const T*>(statistics) + 4 * b;
      r.lse = double(s[0]) + std::log(double(s[1])), r.total = double(s[3]);
    }
    block.run(kernel, r, b, row);
    if (row_loss) static_cast<T*>(row_loss)[b] += T(r.loss * weight);
  });
}

template <typename S>
void run_statistics(const LossCall& call, const LossOptions& options, void* z, void* statistics) {
  using T = typename Accumulate<S>::type;
  const auto kernel = kernels().softmax_row[int(call.dtype)];
  for_each_row<S>(call, options, z, false, [&](const LossBlock<T>& block, int64_t b, T* row) {
    LossRow r{};
    T* const s = static_cast<T*>(statistics) + 4 * b;
    std::copy_n(s, 4, r.statistics);
    block.run(kernel, r, b, row);
    std::copy_n(r.statistics, 4, s);
  });
}

template <typename F>
void for_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(float());
    case Dtype::f64: return f(double());
    case Dtype::f16: return f(Half());
    case Dtype::bf16: return f(BFloat16());
  }
}

void class_loss_gradient_cpu(const Tensor& z, const std::optional<Tensor>& bias, int64_t first, int64_t group_classes,
                             int64_t num_classes, const Tensor& targets, const std::optional<Tensor>& offsets,
                             const std::optional<Tensor>& values, const std::optional<Tensor>& class_weight,
                             const std::optional<Tensor>& pos_weight, const std::optional<Tensor>& sample_weight,
                             int64_t loss, double gamma_neg, double gamma_pos, double margin, double eps,
                             bool detach_focal, double label_smoothing, double factor,
                             const std::optional<Tensor>& dout, const std::optional<Tensor>& row_loss,
                             const std::optional<Tensor>& statistics, bool need_dz) {
  const char* where = "class_loss_gradient";
  LossCall call(where, z, bias, first, group_classes, num_classes, targets, offsets, values, class_weight);
  call.pos_weight = call.per_class("pos_weight", pos_weight, z);
  call.take_sample_weight(sample_weight, z);
  const LossOptions options{
      LossCall::loss_of(where, loss), gamma_neg, gamma_pos, margin, eps, detach_focal, label_smoothing, num_classes};
  void* const rows = row_loss.has_value() ? call.written("row_loss", *row_loss, z, "(b,)", {call.B}) : nullptr;
  const void* const stats =
      statistics.has_value() ? call.written("statistics", *statistics, z, "(b, 4)", {call.B, 4}) : nullptr;
  if ((options.loss == Loss::softmax) != statistics.has_value())
    fail(where, "statistics", "given for softmax and only there", statistics.has_value() ? "a tensor" : "none");
  if (dout.has_value()) {
    const void* const d = call.scalar("dout", *dout, z);
    factor *= call.dtype == Dtype::f64 ? *static_cast<const double*>(d) : double(*static_cast<const float*>(d));
  }
  void* const at = z.mutable_data_ptr();
  for_type(call.dtype, [&](auto s) { run_gradient<decltype(s)>(call, options, at, factor, rows, stats, need_dz); });
}

void class_loss_statistics_cpu(const Tensor& z, const std::optional<Tensor>& bias, int64_t first, int64_t group_classes,
                               int64_t num_classes, const Tensor& targets, const std::optional<Tensor>& offsets,
                               const std::optional<Tensor>& values, const std::optional<Tensor>& class_weight,
                               double label_smoothing, const Tensor& statistics) {
  const LossCall call("class_loss_statistics", z, bias, first, group_classes, num_classes, targets, offsets, values,
                      class_weight);
  LossOptions options{};
  options.loss = Loss::softmax, options.label_smoothing = label_smoothing, options.num_classes = num_classes;
  void* const stats = call.written("statistics", statistics, z, "(b, 4)", {call.B, 4});
  void* const at = const_cast<void*>(z.const_data_ptr());  // only read
  for_type(call.dtype, [&](auto s) { run_statistics<decltype(s)>(call, options, at, stats); });
}

void scale_by_cpu(const Tensor& tensor, const Tensor& factor) {
  const char* where = "scale_by";
  check_equal(where, "factor", dtype_name(factor.scalar_type()), dtype_name(accumulation_type(tensor.scalar_type())),
              "the sums");
  if (factor.numel() != 1) fail(where, "factor", "one number", to_text(shape_of(factor)));
  check_without_gaps(where, tensor);
  const double by = factor.scalar_type() == ScalarType::Double
                        ? *static_cast<const double*>(factor.const_data_ptr())
                        : double(*static_cast<const float*>(factor.const_data_ptr()));
  if (by == 1.0) return;
  // Any order of memory: the tensor has no gaps and no overlaps.
  const int64_t count = tensor.numel();
  void* const data = tensor.mutable_data_ptr();
  for_type(dtype_of(where, "tensor", tensor.scalar_type()), [&](auto s) {
    using S = decltype(s);
    using T = typename Accumulate<S>::type;
    const auto range = [&](int64_t begin, int64_t end) {
      S* const x = static_cast<S*>(data);
      for (int64_t i = begin; i < end; ++i) store_scalar(x + i, T(load_scalar(x + i) * T(by)));
    };
    torch::stable::parallel_for(0, count, 1 << 16, range);
  });
}

}  // namespace
}  // namespace mlhead

// The only place where the schemas are written; the CUDA library adds implementations to them.
STABLE_TORCH_LIBRARY_FRAGMENT(mlhead_C, m) {
  m.def(
      "class_loss_gradient(Tensor(a!) z, Tensor? bias, int first, int group_classes, int num_classes, Tensor targets, "
      "Tensor? offsets, Tensor? values, Tensor? class_weight, Tensor? pos_weight, Tensor? sample_weight, int loss, "
      "float gamma_neg, float gamma_pos, float margin, float eps, bool detach_focal, float label_smoothing, "
      "float factor, Tensor? dout, Tensor(b!)? row_loss, Tensor? statistics, bool need_dz) -> ()");
  m.def(
      "class_loss_statistics(Tensor z, Tensor? bias, int first, int group_classes, int num_classes, Tensor targets, "
      "Tensor? offsets, Tensor? values, Tensor? class_weight, float label_smoothing, Tensor(a!) statistics) -> ()");
  m.def("scale_by(Tensor(a!) tensor, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("class_loss_gradient", TORCH_BOX(&mlhead::class_loss_gradient_cpu));
  m.impl("class_loss_statistics", TORCH_BOX(&mlhead::class_loss_statistics_cpu));
  m.impl("scale_by", TORCH_BOX(&mlhead::scale_by_cpu));
}
