// What the CPU and the CUDA form of the ops share: the stable-ABI view of a tensor, the checks, the outputs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "dtypes.h"
#include "shim.h"

namespace mlhead {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    default: return std::string("torch.") + torch::headeronly::toString(type);
  }
}

inline Dtype dtype_of(const char* where, const char* argument, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: fail(where, argument, "float32, float64, float16 or bfloat16", dtype_name(type));
  }
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline std::string device_name(const Tensor& t) {
  return (t.is_cpu()    ? "cpu"
          : t.is_cuda() ? "cuda:"
                        : "device ") +
         (t.is_cpu() ? "" : std::to_string(t.get_device_index()));
}

// The dtype and the device of h.
inline void check_like_h(const char* where, const char* argument, const Tensor& t, const Tensor& h) {
  check_equal(where, argument, dtype_name(t.scalar_type()), dtype_name(h.scalar_type()), "h");
  check_equal(where, argument, "on " + device_name(t), "on " + device_name(h), "h");
}

inline Tensor empty_like_h(const Tensor& h, const Shape& shape) {
  int32_t dtype, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(h.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(h.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(h.get(), &device_index));
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 0 ? shape[i] : 1) strides[i] = stride;
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                         device_type, device_index, &out));
  return Tensor(out);
}

// Sizes, data and strides of one call, checked. Strides are in elements.
struct GroupFc {
  Dtype dtype;
  int64_t B, G, E, J, C;
  const void* h;
  int64_t h_b, h_g, h_e;
  const void* weight;
  int64_t w_g, w_e, w_j;

  GroupFc(const char* where, const Tensor& h_, const Tensor& weight_, int64_t num_classes) : C(num_classes) {
    const Shape h_shape = shape_of(h_), w_shape = shape_of(weight_);
    check_ndim(where, "h", h_shape, "(B, G, E)", 3);
    check_ndim(where, "weight", w_shape, "(G, E, J)", 3);
    dtype = dtype_of(where, "h", h_.scalar_type());
    check_like_h(where, "weight", weight_, h_);
    B = h_shape[0], G = h_shape[1], E = h_shape[2], J = w_shape[2];
    check_shape(where, "weight", w_shape, "(G, E, J)", {G, E, J});
    check_classes(where, C, G, J);
    h = h_.const_data_ptr();
    weight = weight_.const_data_ptr();
    const auto hs = h_.strides(), ws = weight_.strides();
    h_b = hs[0], h_g = hs[1], h_e = hs[2];
    w_g = ws[0], w_e = ws[1], w_j = ws[2];
  }

  // Classes of group g: J, fewer in the last group that has any, 0 in those after it.
  int64_t classes_of(int64_t g) const {
    const int64_t left = C - g * J;
    return left < 0 ? 0 : left < J ? left : J;
  }
  // Groups that have a class.
  int64_t groups() const { return J == 0 ? 0 : (C + J - 1) / J; }
};

}  // namespace mlhead
