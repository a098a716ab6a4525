// The checked arguments of dropout_add_layer_norm and relu_dropout, the same for the CPU and the CUDA form.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "query_attention_checks.h"

namespace mlhead {

inline void check_like_x(const char* where, const char* argument, const Tensor& t, const Tensor& x) {
  check_equal(where, argument, dtype_name(t.scalar_type()), dtype_name(x.scalar_type()), "x");
  check_equal(where, argument, "on " + device_name(t), "on " + device_name(x), "x");
}

inline Strided rows_of(const Tensor& t) {
  const auto s = t.strides();
  return {t.const_data_ptr(), s[0], s[1], s[2]};
}

// Sizes, strides (in elements) and data of one call of dropout_add_layer_norm.
struct AddNorm {
  const char* where;
  Dtype dtype;
  bool wide_weight;  // weight and bias are in the accumulation dtype, not in that of x
  int64_t B, N, E;
  Strided x, residual;
  const void *weight, *bias;
  int64_t weight_e, bias_e;
  const int64_t* seed;
  double dropout_p, eps;

  AddNorm(const char* where_, const Tensor& x_, const Tensor& residual_, const Tensor& weight_, const Tensor& bias_,
          const std::optional<Tensor>& seed_, double dropout_p_, double eps_)
      : where(where_), dropout_p(dropout_p_), eps(eps_) {
    const Shape shape = shape_of(x_);
    check_ndim(where, "x", shape, "(B, N, E)", 3);
    dtype = dtype_of(where, "x", x_.scalar_type());
    B = shape[0], N = shape[1], E = shape[2];
    if (E < 1) fail(where, "x", "of at least one feature (E >= 1)", to_text(shape));
    check_like_x(where, "residual", residual_, x_);
    check_shape(where, "residual", shape_of(residual_), "(B, N, E)", shape);
    const ScalarType wide = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    wide_weight = weight_.scalar_type() == wide;
    if (!wide_weight) check_like_x(where, "weight", weight_, x_);
    check_equal(where, "bias", dtype_name(bias_.scalar_type()), dtype_name(weight_.scalar_type()), "weight");
    for (const Tensor* t : {&weight_, &bias_}) {
      const char* name = t == &weight_ ? "weight" : "bias";
      check_equal(where, name, "on " + device_name(*t), "on " + device_name(x_), "x");
      check_shape(where, name, shape_of(*t), "(E,)", {E});
    }
    x = rows_of(x_), residual = rows_of(residual_);
    weight = weight_.const_data_ptr(), bias = bias_.const_data_ptr();
    weight_e = weight_.strides()[0], bias_e = bias_.strides()[0];
    seed = checked_seed(where, seed_, dropout_p, "x", x_);
  }

  // dout, of the shape of x.
  Strided checked_dout(const Tensor& t, const Tensor& x_) const {
    check_like_x(where, "dout", t, x_);
    check_shape(where, "dout", shape_of(t), "(B, N, E)", {B, N, E});
    return rows_of(t);
  }

  // Mean and 1 / std as the forward returned them: (2, B, N), contiguous, in the accumulation dtype.
  const void* checked_statistics(const Tensor& t, const Tensor& x_) const {
    const ScalarType wide = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_equal(where, "statistics", dtype_name(t.scalar_type()), dtype_name(wide), "the sums");
    check_equal(where, "statistics", "on " + device_name(t), "on " + device_name(x_), "x");
    check_shape(where, "statistics", shape_of(t), "(2, B, N)", {2, B, N});
    if (!t.is_contiguous()) fail(where, "statistics", "contiguous", "other strides");
    return t.const_data_ptr();
  }
};

// Of one call of relu_dropout.
struct ReluDropout {
  const char* where;
  Dtype dtype;
  int64_t B, N, F;
  Strided x;

  ReluDropout(const char* where_, const Tensor& x_) : where(where_) {
    const Shape shape = shape_of(x_);
    check_ndim(where, "x", shape, "(B, N, F)", 3);
    dtype = dtype_of(where, "x", x_.scalar_type());
    B = shape[0], N = shape[1], F = shape[2];
    x = rows_of(x_);
  }

  Strided checked_dout(const Tensor& t, const Tensor& x_) const {
    check_like_x(where, "dout", t, x_);
    check_shape(where, "dout", shape_of(t), "(B, N, F)", {B, N, F});
    return rows_of(t);
  }
};

}  // namespace mlhead
