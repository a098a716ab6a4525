// The checked arguments of query_attention, the same for the CPU and the CUDA form.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "checks.h"
#include "group_fc_checks.h"

namespace mlhead {

// A tensor of three axes as the kernels see it. Strides are in elements; that of the images is 0 for shared queries.
struct Strided {
  const void* data = nullptr;
  int64_t b = 0, n = 0, e = 0;
};

// The seed's place on the device, or null where nothing is dropped; `like` names the tensor whose device it must share.
inline const int64_t* checked_seed(const char* where, const std::optional<Tensor>& seed, double dropout_p,
                                   const char* like, const Tensor& tensor) {
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) fail(where, "dropout_p", "in [0, 1)", std::to_string(dropout_p));
  if (dropout_p == 0.0) return nullptr;
  if (!seed.has_value()) fail(where, "seed", "an int64 scalar where dropout_p > 0", "none");
  if (seed->scalar_type() != ScalarType::Long || seed->dim() != 0)
    fail(where, "seed", "an int64 scalar", dtype_name(seed->scalar_type()) + " " + to_text(shape_of(*seed)));
  check_equal(where, "seed", "on " + device_name(*seed), "on " + device_name(tensor), like);
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

// Sizes, strides and data of one call, checked. Head h owns the columns h * d to (h + 1) * d - 1 of E.
struct QueryAttention {
  const char* where;
  Dtype dtype;
  int64_t B, G, L, E, H, d;
  bool shared;  // one (G, E) of queries for all images
  Strided q, k, v;
  const bool* key_mask = nullptr;  // (B, L), True where a key may be attended; or null
  int64_t mask_b = 0, mask_l = 0;
  const int64_t* seed = nullptr;  // on the device; null without dropout
  double dropout_p;
  double scale;  // 1 / sqrt(d)

  QueryAttention(const char* where_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                 const std::optional<Tensor>& key_mask_, const std::optional<Tensor>& seed_, int64_t num_heads,
                 double dropout)
      : where(where_), H(num_heads), dropout_p(dropout) {
    const Shape q_shape = shape_of(q_), k_shape = shape_of(k_);
    check_ndim(where, "k", k_shape, "(B, L, E)", 3);
    dtype = dtype_of(where, "q", q_.scalar_type());
    check_like_q("k", k_, q_);
    check_like_q("v", v_, q_);
    B = k_shape[0], L = k_shape[1], E = k_shape[2];
    check_shape(where, "v", shape_of(v_), "(B, L, E)", k_shape);
    shared = q_shape.size() == 2;
    if (shared) {
      check_shape(where, "q", q_shape, "(G, E)", {q_shape[0], E});
    } else {
      check_ndim(where, "q", q_shape, "(G, E) or (B, G, E)", 3);
      check_shape(where, "q", q_shape, "(B, G, E)", {B, q_shape[1], E});
    }
    G = q_shape[q_shape.size() - 2];
    if (L < 1 || E < 1) fail(where, "k", "of at least one position and feature (L, E >= 1)", to_text(k_shape));
    if (H < 1 || E % H != 0) fail(where, "num_heads", "a divisor of E = " + std::to_string(E), std::to_string(H));
    d = E / H;
    scale = 1.0 / std::sqrt(double(d));
    q = strided(q_), k = strided(k_), v = strided(v_);

    if (key_mask_.has_value()) {
      if (key_mask_->scalar_type() != ScalarType::Bool)
        fail(where, "key_mask", "torch.bool", dtype_name(key_mask_->scalar_type()));
      check_equal(where, "key_mask", "on " + device_name(*key_mask_), "on " + device_name(q_), "q");
      check_shape(where, "key_mask", shape_of(*key_mask_), "(B, L)", {B, L});
      key_mask = static_cast<const bool*>(key_mask_->const_data_ptr());
      mask_b = key_mask_->strides()[0], mask_l = key_mask_->strides()[1];
    }
    seed = checked_seed(where, seed_, dropout_p, "q", q_);
  }

  // dout or out, of the shape of the output.
  Strided checked_output(const char* argument, const Tensor& t, const Tensor& q_) const {
    check_like_q(argument, t, q_);
    check_shape(where, argument, shape_of(t), "(B, G, E)", {B, G, E});
    return strided(t);
  }

  // What the forward kept for backward: contiguous, in the accumulation dtype.
  const void* checked_kept(const Tensor& t, const Tensor& q_, const Shape& shape) const {
    const ScalarType want = q_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check_equal(where, "kept", dtype_name(t.scalar_type()), dtype_name(want), "the sums");
    check_equal(where, "kept", "on " + device_name(t), "on " + device_name(q_), "q");
    check_shape(where, "kept", shape_of(t), "as the forward returned it", shape);
    if (!t.is_contiguous()) fail(where, "kept", "contiguous", "other strides");
    return t.const_data_ptr();
  }

  Shape shape_of_q() const { return shared ? Shape{G, E} : Shape{B, G, E}; }

 private:
  void check_like_q(const char* argument, const Tensor& t, const Tensor& q_) const {
    check_equal(where, argument, dtype_name(t.scalar_type()), dtype_name(q_.scalar_type()), "q");
    check_equal(where, argument, "on " + device_name(t), "on " + device_name(q_), "q");
  }
  static Strided strided(const Tensor& t) {
    const auto s = t.strides();
    if (s.size() == 2) return {t.const_data_ptr(), 0, s[0], s[1]};
    return {t.const_data_ptr(), s[0], s[1], s[2]};
  }
};

// An uninitialised contiguous tensor on the device of `like`, of a dtype of torch's C interface.
inline Tensor empty_of_type(const Tensor& like, int32_t dtype, const Shape& shape) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                         device_type, device_index, &out));
  return Tensor(out);
}

// The same in the accumulation dtype of `like`.
inline Tensor empty_accumulated(const Tensor& like, const Shape& shape) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return empty_of_type(like, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(), shape);
}

}  // namespace mlhead
