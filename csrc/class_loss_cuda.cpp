// The CUDA form of the private ops of the losses in the head: checks on the stable ABI; the kernels are in
// class_loss.cu.
#include "class_loss.h"

#include "class_loss_checks.h"
#include "cuda_device.h"

namespace mlhead {
namespace {

static_assert(int(LossTarget::i8) == int(TargetType::i8) && int(LossTarget::f32) == int(TargetType::f32) &&
              int(LossTarget::f64) == int(TargetType::f64) && int(LossTarget::f16) == int(TargetType::f16) &&
              int(LossTarget::bf16) == int(TargetType::bf16));

LossBlock block_of(const LossCall& call, const Tensor& z) {
  LossBlock p{};
  p.dtype = call.dtype;
  p.G = call.G, p.B = call.B, p.N = call.N;
  p.first = call.first, p.group_classes = call.group_classes, p.num_classes = call.num_classes;
  p.z = const_cast<void*>(z.const_data_ptr());  // statistics only read it
  p.z_g = call.z_g, p.z_b = call.z_b;
  p.bias = call.bias, p.bias_dtype = call.bias_dtype, p.bias_c = call.bias_c;
  p.target = LossTarget(int(call.target)), p.targets = call.targets, p.t_b = call.t_b, p.t_c = call.t_c;
  p.offsets = call.offsets, p.values = call.values;
  p.class_weight = call.class_weight, p.pos_weight = call.pos_weight;
  p.sample_weight = call.sample_weight, p.sample_b = call.sample_b;
  p.eps = 1;
  p.splits = 1;
  return p;
}

// Splits the rows, and makes room for `each` numbers from every split.
Tensor split(LossBlock& p, const Device& device, const Tensor& like, int64_t each) {
  p.splits = loss_splits(p, device.multiprocessors());
  const Tensor parts = empty_like_h(like, {p.splits > 1 ? p.B * p.splits * each : 0});
  p.parts = p.splits > 1 ? parts.mutable_data_ptr() : nullptr;
  return parts;
}

void class_loss_gradient_cuda(const Tensor& z, const std::optional<Tensor>& bias, int64_t first, int64_t group_classes,
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
  LossBlock p = block_of(call, z);
  p.loss = LossCall::loss_of(where, loss);
  p.gamma_neg = gamma_neg, p.gamma_pos = gamma_pos, p.margin = margin, p.eps = eps;
  p.detach_focal = detach_focal, p.label_smoothing = label_smoothing, p.factor = factor, p.need_dz = need_dz;
  if (dout.has_value()) p.dout = call.scalar("dout", *dout, z);
  if (p.loss == Loss::softmax) {
    if (!statistics.has_value()) fail(where, "statistics", "given for softmax", "None");
    p.statistics = call.written("statistics", *statistics, z, "(b, 4)", {p.B, 4});
  } else if (row_loss.has_value()) {
    p.row_loss = call.written("row_loss", *row_loss, z, "(b,)", {p.B});
  }
  const Device device(z);
  const Tensor parts = split(p, device, p.row_loss ? *row_loss : z, p.row_loss ? 1 : 0);
  if (!p.row_loss) p.parts = nullptr;
  check_launch(where, launch_class_loss_gradient(p, device.stream()));
}

void class_loss_statistics_cuda(const Tensor& z, const std::optional<Tensor>& bias, int64_t first,
                                int64_t group_classes, int64_t num_classes, const Tensor& targets,
                                const std::optional<Tensor>& offsets, const std::optional<Tensor>& values,
                                const std::optional<Tensor>& class_weight, double label_smoothing,
                                const Tensor& statistics) {
  const char* where = "class_loss_statistics";
  const LossCall call(where, z, bias, first, group_classes, num_classes, targets, offsets, values, class_weight);
  LossBlock p = block_of(call, z);
  p.loss = Loss::softmax, p.label_smoothing = label_smoothing;
  p.statistics = call.written("statistics", statistics, z, "(b, 4)", {p.B, 4});
  const Device device(z);
  const Tensor parts = split(p, device, statistics, 4);
  check_launch(where, launch_class_loss_statistics(p, device.stream()));
}

void scale_by_cuda(const Tensor& tensor, const Tensor& factor) {
  const char* where = "scale_by";
  const Dtype dtype = dtype_of(where, "tensor", tensor.scalar_type());
  check_equal(where, "factor", dtype_name(factor.scalar_type()), dtype_name(accumulation_type(tensor.scalar_type())),
              "the sums");
  check_equal(where, "factor", "on " + device_name(factor), "on " + device_name(tensor), "tensor");
  if (factor.numel() != 1) fail(where, "factor", "one number", to_text(shape_of(factor)));
  if (tensor.numel() == 0) return;
  check_without_gaps(where, tensor);
  const Device device(tensor);
  check_launch(where, launch_scale_by(dtype, tensor.mutable_data_ptr(), tensor.numel(), factor.const_data_ptr(),
                                      device.multiprocessors(), device.stream()));
}

}  // namespace
}  // namespace mlhead

// The schemas are in class_loss_cpu.cpp.
STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("class_loss_gradient", TORCH_BOX(&mlhead::class_loss_gradient_cuda));
  m.impl("class_loss_statistics", TORCH_BOX(&mlhead::class_loss_statistics_cuda));
  m.impl("scale_by", TORCH_BOX(&mlhead::scale_by_cuda));
}
