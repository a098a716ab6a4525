// The checked arguments of the two private ops of the losses in the head, the same for the CPU and the CUDA form.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "class_loss_task.h"
#include "csra_pool_checks.h"
#include "group_fc_checks.h"

namespace mlhead {

// What dense targets may hold.
enum class TargetType { i8, f32, f64, f16, bf16 };

inline TargetType target_type(const char* where, ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return TargetType::i8;
    case ScalarType::Float: return TargetType::f32;
    case ScalarType::Double: return TargetType::f64;
    case ScalarType::Half: return TargetType::f16;
    case ScalarType::BFloat16: return TargetType::bf16;
    default: fail(where, "targets", "bool, int8, uint8 or floating", dtype_name(type));
  }
}

// Sizes, strides (in elements) and data of one call: z[i, b, j] is image b's logit of class first + i group_classes +
// j.
struct LossCall {
  const char* where;
  Dtype dtype;              // of z
  ScalarType accumulation;  // of weights, values, row_loss, statistics, dout
  int64_t G, B, N, first, group_classes, num_classes;
  int64_t z_g, z_b;            // strides of z; that along n is 1
  const void* bias = nullptr;  // (C), in the dtype `bias_dtype`
  Dtype bias_dtype = Dtype::f32;
  int64_t bias_c = 0;
  TargetType target = TargetType::i8;  // of dense targets
  const void* targets;                 // dense (B, C), or (entries) int64 with offsets
  int64_t t_b = 0, t_c = 0, entries = 0;
  const int64_t* offsets = nullptr;                           // (B + 1), positions in targets
  const void* values = nullptr;                               // (entries)
  const void *class_weight = nullptr, *pos_weight = nullptr;  // (C)
  const void* sample_weight = nullptr;                        // (B)
  int64_t sample_b = 0;

  LossCall(const char* where_, const Tensor& z, const std::optional<Tensor>& bias_, int64_t first_,
           int64_t group_classes_, int64_t num_classes_, const Tensor& targets_, const std::optional<Tensor>& offsets_,
           const std::optional<Tensor>& values_, const std::optional<Tensor>& class_weight_,
           std::optional<int64_t> batch = std::nullopt)  // given where z is not the logits but what they are made of
      : where(where_), first(first_), group_classes(group_classes_), num_classes(num_classes_) {
    const Shape shape = shape_of(z);
    check_ndim(where, "z", shape, "(g, b, n)", 3);
    G = shape[0], B = batch.value_or(shape[1]), N = shape[2];
    dtype = dtype_of(where, "z", z.scalar_type());
    accumulation = accumulation_type(z.scalar_type());
    const auto strides = z.strides();
    if (!batch && N > 1 && strides[2] != 1)
      fail(where, "z", "contiguous along n", "a stride of " + std::to_string(strides[2]));
    z_g = strides[0], z_b = strides[1];
    if (num_classes < 0) fail(where, "num_classes", "at least 0", std::to_string(num_classes));
    if (first < 0 || group_classes < 0) fail(where, "first", "at least 0, like group_classes", std::to_string(first));
    if (!batch && G > 1 && group_classes < N) fail(where, "group_classes", "at least n", std::to_string(group_classes));
    if (bias_.has_value()) {
      check_shape(where, "bias", shape_of(*bias_), "(C,)", {num_classes});
      check_device("bias", *bias_, z);
      bias_dtype = dtype_of(where, "bias", bias_->scalar_type());
      bias = bias_->const_data_ptr(), bias_c = bias_->strides()[0];
    }
    check_device("targets", targets_, z);
    targets = targets_.const_data_ptr();
    if (offsets_.has_value()) {
      check_integers("targets", targets_, z);
      check_integers("offsets", *offsets_, z);
      entries = targets_.sizes()[0];
      check_shape(where, "offsets", shape_of(*offsets_), "(b + 1,)", {B + 1});
      offsets = static_cast<const int64_t*>(offsets_->const_data_ptr());
      if (values_.has_value()) {
        check_shape(where, "values", shape_of(*values_), "(entries,)", {entries});
        values = accumulated("values", *values_, z);
      }
    } else {
      target = target_type(where, targets_.scalar_type());
      check_shape(where, "targets", shape_of(targets_), "(b, C)", {B, num_classes});
      t_b = targets_.strides()[0], t_c = targets_.strides()[1];
    }
    class_weight = per_class("class_weight", class_weight_, z);
  }

  // The data of an optional (C,) of the accumulation dtype.
  const void* per_class(const char* argument, const std::optional<Tensor>& t, const Tensor& z) const {
    if (!t.has_value()) return nullptr;
    check_shape(where, argument, shape_of(*t), "(C,)", {num_classes});
    return accumulated(argument, *t, z);
  }
  void take_sample_weight(const std::optional<Tensor>& t, const Tensor& z) {
    if (!t.has_value()) return;
    check_shape(where, "sample_weight", shape_of(*t), "(b,)", {B});
    check_type("sample_weight", *t, z);
    sample_weight = t->const_data_ptr(), sample_b = t->strides()[0];
  }
  // A contiguous tensor of the accumulation dtype, of this shape.
  void* written(const char* argument, const Tensor& t, const Tensor& z, const char* letters, const Shape& want) const {
    check_shape(where, argument, shape_of(t), letters, want);
    check_type(argument, t, z);
    if (!t.is_contiguous()) fail(where, argument, "contiguous", "other strides");
    return t.mutable_data_ptr();
  }
  const void* scalar(const char* argument, const Tensor& t, const Tensor& z) const {
    if (t.numel() != 1) fail(where, argument, "one number", to_text(shape_of(t)));
    check_type(argument, t, z);
    return t.const_data_ptr();
  }

  static Loss loss_of(const char* where, int64_t loss) {
    if (loss < 0 || loss > 2) fail(where, "loss", "0 (bce), 1 (asl) or 2 (softmax)", std::to_string(loss));
    return Loss(loss);
  }

 private:
  void check_device(const char* argument, const Tensor& t, const Tensor& z) const {
    check_equal(where, argument, "on " + device_name(t), "on " + device_name(z), "z");
  }
  void check_type(const char* argument, const Tensor& t, const Tensor& z) const {
    check_equal(where, argument, dtype_name(t.scalar_type()), dtype_name(accumulation), "the sums");
    check_device(argument, t, z);
  }
  const void* accumulated(const char* argument, const Tensor& t, const Tensor& z) const {
    check_type(argument, t, z);
    if (t.numel() > 1 && t.strides()[0] != 1) fail(where, argument, "contiguous", "other strides");
    return t.const_data_ptr();
  }
  void check_integers(const char* argument, const Tensor& t, const Tensor& z) const {
    check_device(argument, t, z);
    if (t.scalar_type() != ScalarType::Long || t.sizes().size() != 1 || !t.is_contiguous())
      fail(where, argument, "contiguous int64 of one axis", dtype_name(t.scalar_type()) + " " + to_text(shape_of(t)));
  }
};

// The elements of a tensor are all of a run of memory, in any order of its axes.
inline void check_without_gaps(const char* where, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1) axes.emplace_back(strides[i], sizes[i]);
  std::sort(axes.begin(), axes.end());
  int64_t next = 1;
  for (const auto& [stride, size] : axes) {
    if (stride != next) fail(where, "tensor", "without gaps in memory", "a stride of " + std::to_string(stride));
    next *= size;
  }
}

}  // namespace mlhead
