// group_fc on a CPU, and the schemas of the private ops of both devices.
//
//     logits(b, c) = sum_e h(b, g, e) weight(g, e, j) + bias(c)      g = c div J, j = c mod J, c < C
//
// Each group is one strided product of gemm.h that reads h and weight where they are and writes its columns of the (B,
// C) logits, so nothing is transposed, padded or copied as a whole in either direction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "build_info.h"
#include "gemm.h"
#include "group_fc_checks.h"
#include "pages.h"

namespace mlhead {
namespace {

const char* at(const void* base, int64_t offset, Dtype dtype) {
  return static_cast<const char*>(base) + offset * element_size(dtype);
}
char* at(void* base, int64_t offset, Dtype dtype) {
  return static_cast<char*>(base) + offset * element_size(dtype);
}

// Runs f(group, tile) over all pairs, on torch's own threads where the work is worth them.
template <typename F>
void for_each_tile(int64_t groups, const Plan& plan, double work_of_group, const F& f) {
  constexpr double kWorthAThread = 1 << 18;  // multiply-adds and moved numbers: 20 us or so
  const int64_t tiles = plan.tiles_m * plan.tiles_n;
  const int64_t items = groups * tiles;
  if (items == 0) return;
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / tiles, i % tiles);
  };
  const double work = work_of_group * double(groups);
  if (items == 1 || work <= kWorthAThread) return range(0, items);
  const int64_t grain = 1 + int64_t(double(items) * kWorthAThread / work);
  torch::stable::parallel_for(0, items, grain, range);
}

// Numbers moved weigh more than multiply-adds, which run 8 or 16 at a time.
double work_of(const Gemm& g) {
  return double(g.M) * g.N * g.K + 4.0 * (double(g.M) * g.K + double(g.K) * g.N + double(g.M) * g.N);
}

// bias as contiguous numbers of the accumulation type: itself, or a converted copy.
const void* accumulation_bias(const Tensor& bias, Dtype dtype, std::vector<double>& storage) {
  const int64_t C = bias.size(0), stride = bias.stride(0);
  const void* data = bias.const_data_ptr();
  if ((dtype == Dtype::f32 || dtype == Dtype::f64) && stride == 1) return data;
  storage.resize(size_t(C) + 1);
  float* f = reinterpret_cast<float*>(storage.data());
  for (int64_t c = 0; c < C; ++c) switch (dtype) {
      case Dtype::f32: f[c] = static_cast<const float*>(data)[c * stride]; break;
      case Dtype::f64: storage[size_t(c)] = static_cast<const double*>(data)[c * stride]; break;
      case Dtype::f16: f[c] = to_float(static_cast<const Half*>(data)[c * stride]); break;
      case Dtype::bf16: f[c] = to_float(static_cast<const BFloat16*>(data)[c * stride]); break;
    }
  return storage.data();
}

Tensor group_fc_cpu(const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, int64_t num_classes) {
  const GroupFc p("group_fc", h, weight, num_classes);
  std::vector<double> storage;
  const void* bias_data = nullptr;
  if (bias.has_value()) {
    check_like_h("group_fc", "bias", *bias, h);
    check_shape("group_fc", "bias", shape_of(*bias), "(C,)", {p.C});
    bias_data = accumulation_bias(*bias, p.dtype, storage);
  }
  const Tensor logits = output_like(h, {p.B, p.C});
  void* out = logits.mutable_data_ptr();
  if (p.B == 0 || p.C == 0) return logits;

  const int64_t bias_size = p.dtype == Dtype::f64 ? 8 : 4;
  const auto product = [&](int64_t g) {
    return Gemm{p.dtype,
                p.B,
                p.classes_of(g),
                p.E,
                at(p.h, g * p.h_g, p.dtype),
                p.h_b,
                p.h_e,
                at(p.weight, g * p.w_g, p.dtype),
                p.w_e,
                p.w_j,
                at(out, g * p.J, p.dtype),
                p.C,
                1,
                bias_data ? static_cast<const char*>(bias_data) + g * p.J * bias_size : nullptr};
  };
  const Kernels& k = kernels();
  const Gemm first = product(0);
  const Plan plan = plan_gemm(first, k.lanes(p.dtype), p.groups());
  for_each_tile(p.groups(), plan, work_of(first),
                [&](int64_t g, int64_t tile) { k.run_tile[int(p.dtype)](product(g), plan, tile); });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> group_fc_backward_cpu(const Tensor& dlogits, const Tensor& h, const Tensor& weight,
                                                         int64_t num_classes, bool need_dh, bool need_dweight,
                                                         bool need_dbias) {
  const char* where = "group_fc_backward";
  const GroupFc p(where, h, weight, num_classes);
  check_like_h(where, "dlogits", dlogits, h);
  check_shape(where, "dlogits", shape_of(dlogits), "(B, C)", {p.B, p.C});
  const void* d = dlogits.const_data_ptr();
  const auto ds = dlogits.strides();
  const int64_t d_b = ds[0], d_c = ds[1];
  const Kernels& k = kernels();
  const auto run = k.run_tile[int(p.dtype)];

  const Tensor dh = output_like(h, need_dh ? Shape{p.B, p.G, p.E} : Shape{0});
  if (need_dh && p.B > 0 && p.G > 0 && p.E > 0) {
    void* out = dh.mutable_data_ptr();
    const auto product = [&](int64_t g) {  // an empty group is a sum over no j: zeros
      return Gemm{p.dtype,
                  p.B,
                  p.E,
                  p.classes_of(g),
                  at(d, g * p.J * d_c, p.dtype),
                  d_b,
                  d_c,
                  at(p.weight, g * p.w_g, p.dtype),
                  p.w_j,
                  p.w_e,
                  at(out, g * p.E, p.dtype),
                  p.G * p.E,
                  1,
                  nullptr};
    };
    const Gemm first = product(0);
    const Plan plan = plan_gemm(first, k.lanes(p.dtype), p.G);
    for_each_tile(p.G, plan, work_of(first), [&](int64_t g, int64_t tile) { run(product(g), plan, tile); });
  }

  const Tensor dweight = output_like(h, need_dweight ? Shape{p.G, p.E, p.J} : Shape{0});
  if (need_dweight && p.G > 0 && p.E > 0 && p.J > 0) {
    void* out = dweight.mutable_data_ptr();
    const auto product = [&](int64_t g) {
      return Gemm{p.dtype,
                  p.E,
                  p.classes_of(g),
                  p.B,
                  at(p.h, g * p.h_g, p.dtype),
                  p.h_e,
                  p.h_b,
                  at(d, g * p.J * d_c, p.dtype),
                  d_b,
                  d_c,
                  at(out, g * p.E * p.J, p.dtype),
                  p.J,
                  1,
                  nullptr};
    };
    const Gemm first = product(0);
    const Plan plan = plan_gemm(first, k.lanes(p.dtype), p.G);
    for_each_tile(p.groups(), plan, work_of(first), [&](int64_t g, int64_t tile) { run(product(g), plan, tile); });
    const auto clear = [&](int64_t begin, int64_t end) {  // columns that own no class
      for (int64_t g = begin; g < end; ++g) {
        const int64_t mine = p.classes_of(g);
        const int64_t rows = mine == 0 ? 1 : p.E, columns = mine == 0 ? p.E * p.J : p.J - mine;
        for (int64_t e = 0; e < rows; ++e)
          std::memset(at(out, (g * p.E + e) * p.J + mine, p.dtype), 0, size_t(columns * element_size(p.dtype)));
      }
    };
    if (p.C < p.G * p.J) torch::stable::parallel_for(p.C / p.J, p.G, 1 + (1 << 16) / (p.E * p.J), clear);
  }

  const Tensor dbias = empty_like_h(h, need_dbias ? Shape{p.C} : Shape{0});
  if (need_dbias && p.C > 0) {
    void* out = dbias.mutable_data_ptr();
    constexpr int64_t columns = 512;
    const auto sum = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i * columns;
        k.column_sum[int(p.dtype)](at(d, c * d_c, p.dtype), p.B, std::min(columns, p.C - c), d_b, d_c,
                                   at(out, c, p.dtype));
      }
    };
    const int64_t blocks = (p.C + columns - 1) / columns;
    if (p.B * p.C < (1 << 16))
      sum(0, blocks);
    else
      torch::stable::parallel_for(0, blocks, 1 + (1 << 15) / (columns * (p.B + 1)), sum);
  }
  return {dh, dweight, dbias};
}

}  // namespace
}  // namespace mlhead

// The only place where the schemas are written; the CUDA library adds implementations to them.
STABLE_TORCH_LIBRARY(mlhead_C, m) {
  m.def("group_fc(Tensor h, Tensor weight, Tensor? bias, int num_classes) -> Tensor");
  m.def(
      "group_fc_backward(Tensor dlogits, Tensor h, Tensor weight, int num_classes, bool need_dh, bool need_dweight, "
      "bool need_dbias) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("group_fc", TORCH_BOX(&mlhead::group_fc_cpu));
  m.impl("group_fc_backward", TORCH_BOX(&mlhead::group_fc_backward_cpu));
}

MLHEAD_EXPORT const char* mlhead_build_info() {
  return MLHEAD_BUILD_INFO;
}
// The instruction set that runs on this machine.
MLHEAD_EXPORT const char* mlhead_instruction_set() {
  return mlhead::kernels().name;
}
