// The checked arguments of csra_pool's two pooling ops, the same for the CPU and the CUDA form.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "group_fc_checks.h"

namespace mlhead {

inline ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Sizes, strides (in elements) and data of one call: column n of the scores is column first + n of H heads of `classes`
// classes each. Whatever is wrong is a std::invalid_argument.
struct ScoresCall {
  const char* where;
  Dtype dtype;              // of scores and dlogits
  ScalarType accumulation;  // of scale and pooled
  int64_t B, L, N, H, classes, first;
  int64_t s_b, s_l;            // strides of scores; that of n is 1
  const void* scale;           // (N,), or null
  const double* temperatures;  // (H,) on the CPU, > 0, infinity among them
  const double* lam;           // (H,) on the CPU

  ScoresCall(const char* where_, const Tensor& scores, const std::optional<Tensor>& scale_, const Tensor& heads,
             int64_t classes_, int64_t first_)
      : where(where_), classes(classes_), first(first_) {
    const Shape shape = shape_of(scores), heads_shape = shape_of(heads);
    check_ndim(where, "scores", shape, "(B, L, N)", 3);
    dtype = dtype_of(where, "scores", scores.scalar_type());
    accumulation = accumulation_type(scores.scalar_type());
    B = shape[0], L = shape[1], N = shape[2];
    if (L < 1) fail(where, "scores", "(B, L, N) with L >= 1", to_text(shape));
    const auto strides = scores.strides();
    check_unit_stride("scores", N, strides[2]);
    s_b = strides[0], s_l = strides[1];

    if (heads_shape.size() != 2 || heads_shape[0] != 2) fail(where, "heads", "(2, H)", to_text(heads_shape));
    if (!heads.is_cpu()) fail(where, "heads", "on cpu", "on " + device_name(heads));
    if (heads.scalar_type() != ScalarType::Double)
      fail(where, "heads", dtype_name(ScalarType::Double), dtype_name(heads.scalar_type()));
    if (!heads.is_contiguous()) fail(where, "heads", "contiguous", "other strides");
    H = heads_shape[1];
    temperatures = static_cast<const double*>(heads.const_data_ptr());
    lam = temperatures + H;
    for (int64_t h = 0; h < H; ++h)
      if (!(temperatures[h] > 0)) fail(where, "heads[0]", "temperatures > 0", std::to_string(temperatures[h]));

    if (classes < 0) fail(where, "classes", "at least 0", std::to_string(classes));
    if (first < 0 || first + N > H * classes)
      fail(where, "first", "in [0, H * classes - N] = [0, " + std::to_string(H * classes - N) + "]",
           std::to_string(first));

    scale = nullptr;
    if (scale_.has_value()) {
      check_accumulated("scale", *scale_, scores);
      check_shape(where, "scale", shape_of(*scale_), "(N,)", {N});
      check_unit_stride("scale", N, scale_->strides()[0]);
      scale = scale_->const_data_ptr();
    }
  }

  // pooled: (B, N) in the accumulation dtype, rows in any distance.
  void check_result(const char* argument, const Tensor& t, const Tensor& scores) const {
    check_accumulated(argument, t, scores);
    check_shape(where, argument, shape_of(t), "(B, N)", {B, N});
    check_unit_stride(argument, N, t.strides()[1]);
  }

  // (B, classes) of the dtype of scores, in any strides.
  void check_dlogits(const Tensor& t, const Tensor& scores) const {
    check_equal(where, "dlogits", dtype_name(t.scalar_type()), dtype_name(scores.scalar_type()), "scores");
    check_equal(where, "dlogits", "on " + device_name(t), "on " + device_name(scores), "scores");
    check_shape(where, "dlogits", shape_of(t), "(B, classes)", {B, classes});
  }

  // Scores' gradient: like scores in all, strides too; perhaps scores itself.
  void check_ds(const Tensor& t, const Tensor& scores) const {
    check_equal(where, "ds", dtype_name(t.scalar_type()), dtype_name(scores.scalar_type()), "scores");
    check_equal(where, "ds", "on " + device_name(t), "on " + device_name(scores), "scores");
    check_shape(where, "ds", shape_of(t), "(B, L, N)", {B, L, N});
    check_unit_stride("ds", N, t.strides()[2]);
    if ((B > 1 && t.strides()[0] != s_b) || (L > 1 && t.strides()[1] != s_l))
      fail(where, "ds", "in the strides of scores", "other strides");
  }

 private:
  void check_accumulated(const char* argument, const Tensor& t, const Tensor& scores) const {
    if (t.scalar_type() != accumulation)
      fail(where, argument, dtype_name(accumulation) + " for scores of " + dtype_name(scores.scalar_type()),
           dtype_name(t.scalar_type()));
    check_equal(where, argument, "on " + device_name(t), "on " + device_name(scores), "scores");
  }
  // An axis of at most one element has no stride to speak of.
  void check_unit_stride(const char* argument, int64_t size, int64_t stride) const {
    if (size > 1 && stride != 1) fail(where, argument, "contiguous along n", "a stride of " + std::to_string(stride));
  }
};

// The arguments of csra_unit_rows_backward: dw (N, D) with contiguous rows, in the dtype of weight (N, D) or in the
// accumulation dtype; norm (N,) in the accumulation dtype.
struct UnitRowsCall {
  Dtype dtype;  // of weight
  bool dw_accumulated;
  int64_t N, D;
  int64_t dw_n, w_n, w_d;  // strides

  UnitRowsCall(const char* where, const Tensor& dw, const Tensor& weight, const Tensor& norm) {
    const Shape shape = shape_of(weight);
    check_ndim(where, "weight", shape, "(N, D)", 2);
    N = shape[0], D = shape[1];
    dtype = dtype_of(where, "weight", weight.scalar_type());
    const ScalarType accumulated = accumulation_type(weight.scalar_type());
    dw_accumulated = dw.scalar_type() == accumulated;
    if (!dw_accumulated)
      check_equal(where, "dw", dtype_name(dw.scalar_type()), dtype_name(weight.scalar_type()), "weight");
    check_equal(where, "norm", dtype_name(norm.scalar_type()), dtype_name(accumulated), "the sums");
    check_equal(where, "dw", "on " + device_name(dw), "on " + device_name(weight), "weight");
    check_equal(where, "norm", "on " + device_name(norm), "on " + device_name(weight), "weight");
    check_shape(where, "dw", shape_of(dw), "(N, D)", {N, D});
    check_shape(where, "norm", shape_of(norm), "(N,)", {N});
    if (D > 1 && dw.strides()[1] != 1) fail(where, "dw", "contiguous along d", std::to_string(dw.strides()[1]));
    if (N > 1 && norm.strides()[0] != 1) fail(where, "norm", "contiguous", std::to_string(norm.strides()[0]));
    dw_n = dw.strides()[0], w_n = weight.strides()[0], w_d = weight.strides()[1];
  }
};

}  // namespace mlhead
