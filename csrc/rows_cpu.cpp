// dropout_add_layer_norm and relu_dropout on a CPU, and the schemas of their private ops. Threads share out the rows;
// the arithmetic is in rows_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "gemm.h"
#include "pages.h"
#include "rows_checks.h"

namespace mlhead {
namespace {

constexpr int64_t kWorthAThread = 1 << 14;  // numbers: 10 us or so
constexpr int64_t kMostRuns = 64;           // of rows, each with its own sums of dweight and dbias
constexpr int64_t kRowsOfRun = 16;          // at least

int64_t sum_size(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : 4;
}

const char* row_at(const Strided& x, int64_t b, int64_t n, Dtype dtype) {
  return static_cast<const char*>(x.data) + (b * x.b + n * x.n) * element_size(dtype);
}
char* row_at(void* base, int64_t row, int64_t width, Dtype dtype) {
  return base ? static_cast<char*>(base) + row * width * element_size(dtype) : nullptr;
}

// A row with whole registers of any instruction set: numbers of T.
int64_t room(int64_t count) {
  return (count + 63) / 64 * 64;
}

// weight and bias, contiguous and of the accumulation type T, zeros behind them.
template <typename T>
std::vector<T> widened(const void* data, int64_t count, int64_t stride, Dtype dtype, bool wide) {
  std::vector<T> to(static_cast<size_t>(room(count)), T(0));
  for (int64_t e = 0; e < count; ++e) {
    if (wide || dtype == Dtype::f32 || dtype == Dtype::f64)
      to[size_t(e)] = static_cast<const T*>(data)[e * stride];
    else
      to[size_t(e)] = T(dtype == Dtype::f16 ? load_scalar(static_cast<const Half*>(data) + e * stride)
                                            : load_scalar(static_cast<const BFloat16*>(data) + e * stride));
  }
  return to;
}

void for_each_row(int64_t rows, int64_t width, const auto& f) {
  const int64_t grain = 1 + kWorthAThread / std::max<int64_t>(1, width);
  if (rows <= grain) return f(int64_t(0), rows);
  torch::stable::parallel_for(0, rows, grain, f);
}

template <typename T>
void run_forward(const AddNorm& p, void* out, void* statistics) {
  const auto weight = widened<T>(p.weight, p.E, p.weight_e, p.dtype, p.wide_weight);
  const auto bias = widened<T>(p.bias, p.E, p.bias_e, p.dtype, p.wide_weight);
  const auto run = kernels().norm_row[int(p.dtype)];
  T *mean = static_cast<T*>(statistics), *rstd = mean + p.B * p.N;
  for_each_row(p.B * p.N, p.E, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(5 * room(p.E) * int64_t(sizeof(T)));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.N, n = row % p.N;
      NormRow t{};
      t.E = p.E, t.eps = p.eps;
      t.x = row_at(p.x, b, n, p.dtype), t.x_e = p.x.e;
      t.residual = row_at(p.residual, b, n, p.dtype), t.residual_e = p.residual.e;
      t.weight = weight.data(), t.bias = bias.data();
      t.dropout = dropout_of_image(p.seed, p.dropout_p, b);
      t.first = uint32_t(n * p.E);
      t.mean = mean + row, t.rstd = rstd + row;
      t.out = row_at(out, row, p.E, p.dtype);
      t.scratch = scratch;
      run(t);
    }
  });
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm_cpu(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                      const Tensor& bias, const std::optional<Tensor>& seed,
                                                      double dropout_p, double eps) {
  const AddNorm p("dropout_add_layer_norm", x, residual, weight, bias, seed, dropout_p, eps);
  const Tensor out = output_like(x, {p.B, p.N, p.E}), statistics = empty_accumulated(x, {2, p.B, p.N});
  if (p.B * p.N == 0) return {out, statistics};
  if (p.dtype == Dtype::f64)
    run_forward<double>(p, out.mutable_data_ptr(), statistics.mutable_data_ptr());
  else
    run_forward<float>(p, out.mutable_data_ptr(), statistics.mutable_data_ptr());
  return {out, statistics};
}

// to = the sum of the runs' sums, in their order; rounded once.
template <typename T>
void add_runs(const std::vector<T>& sums, int64_t offset, int64_t runs, const AddNorm& p, void* to) {
  for (int64_t e = 0; e < p.E; ++e) {
    T sum = 0;
    for (int64_t run = 0; run < runs; ++run) sum += sums[size_t((2 * run + offset) * room(p.E) + e)];
    if (p.wide_weight || p.dtype == Dtype::f32 || p.dtype == Dtype::f64)
      static_cast<T*>(to)[e] = sum;
    else if (p.dtype == Dtype::f16)
      store_scalar(static_cast<Half*>(to) + e, float(sum));
    else
      store_scalar(static_cast<BFloat16*>(to) + e, float(sum));
  }
}

struct Gradients {
  void *dx, *dresidual, *dweight, *dbias;  // or null
};

template <typename T>
void run_backward(const AddNorm& p, const Strided& dout, const void* statistics, const Gradients& to) {
  const auto weight = widened<T>(p.weight, p.E, p.weight_e, p.dtype, p.wide_weight);
  const auto kernel = kernels().norm_row_backward[int(p.dtype)];
  const T *mean = static_cast<const T*>(statistics), *rstd = mean + p.B * p.N;
  const int64_t rows = p.B * p.N, runs = std::min(kMostRuns, (rows + kRowsOfRun - 1) / kRowsOfRun);
  std::vector<T> sums(size_t(2 * runs * room(p.E)), T(0));
  const auto range = [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(5 * room(p.E) * int64_t(sizeof(T)));
    for (int64_t run = begin; run < end; ++run)
      for (int64_t row = run * rows / runs; row < (run + 1) * rows / runs; ++row) {
        const int64_t b = row / p.N, n = row % p.N;
        NormRow t{};
        t.E = p.E;
        t.x = row_at(p.x, b, n, p.dtype), t.x_e = p.x.e;
        t.residual = row_at(p.residual, b, n, p.dtype), t.residual_e = p.residual.e;
        t.dout = row_at(dout, b, n, p.dtype), t.dout_e = dout.e;
        t.weight = weight.data();
        t.dropout = dropout_of_image(p.seed, p.dropout_p, b);
        t.first = uint32_t(n * p.E);
        t.mean = const_cast<T*>(mean + row), t.rstd = const_cast<T*>(rstd + row);  // only read
        t.dx = row_at(to.dx, row, p.E, p.dtype), t.dresidual = row_at(to.dresidual, row, p.E, p.dtype);
        if (to.dweight) t.dweight = sums.data() + 2 * run * room(p.E);
        if (to.dbias) t.dbias = sums.data() + (2 * run + 1) * room(p.E);
        t.scratch = scratch;
        kernel(t);
      }
  };
  const int64_t grain = 1 + kWorthAThread * runs / std::max<int64_t>(1, rows * p.E);
  if (runs <= grain)
    range(0, runs);
  else
    torch::stable::parallel_for(0, runs, grain, range);
  if (to.dweight) add_runs(sums, 0, runs, p, to.dweight);
  if (to.dbias) add_runs(sums, 1, runs, p, to.dbias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward_cpu(
    const Tensor& dout, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& seed, double dropout_p, double eps, const Tensor& statistics, bool need_dx,
    bool need_dresidual, bool need_dweight, bool need_dbias) {
  const AddNorm p("dropout_add_layer_norm_backward", x, residual, weight, bias, seed, dropout_p, eps);
  const Strided upstream = p.checked_dout(dout, x);
  const void* kept = p.checked_statistics(statistics, x);
  const Shape shape{p.B, p.N, p.E};
  const Tensor dx = output_like(x, need_dx ? shape : Shape{0});
  const Tensor dresidual = output_like(x, need_dresidual ? shape : Shape{0});
  const Tensor dweight = output_like(weight, need_dweight ? Shape{p.E} : Shape{0});
  const Tensor dbias = output_like(weight, need_dbias ? Shape{p.E} : Shape{0});
  const auto data = [](const Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; };
  const Gradients to{data(dx, need_dx), data(dresidual, need_dresidual), data(dweight, need_dweight),
                     data(dbias, need_dbias)};
  if (p.dtype == Dtype::f64)
    run_backward<double>(p, upstream, kept, to);
  else
    run_backward<float>(p, upstream, kept, to);
  return {dx, dresidual, dweight, dbias};
}

Tensor relu_dropout_cpu(const Tensor& x, const std::optional<Tensor>& seed, double dropout_p) {
  const ReluDropout p("relu_dropout", x);
  const int64_t* seed_at = checked_seed(p.where, seed, dropout_p, "x", x);
  const Tensor out = output_like(x, {p.B, p.N, p.F});
  void* to = out.mutable_data_ptr();
  const auto run = kernels().relu_row[int(p.dtype)];
  for_each_row(p.B * p.N, p.F, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(2 * (p.F + 64) * sum_size(p.dtype));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.N, n = row % p.N;
      ReluRow t{};
      t.F = p.F;
      t.x = row_at(p.x, b, n, p.dtype), t.x_f = p.x.e;
      t.dropout = dropout_of_image(seed_at, dropout_p, b);
      t.first = uint32_t(n * p.F);
      t.out = row_at(to, row, p.F, p.dtype);
      t.scratch = scratch;
      run(t);
    }
  });
  return out;
}

Tensor relu_dropout_backward_cpu(const Tensor& dout, const Tensor& out, double dropout_p) {
  const ReluDropout p("relu_dropout_backward", out);
  if (!(dropout_p >= 0.0 && dropout_p < 1.0)) fail(p.where, "dropout_p", "in [0, 1)", std::to_string(dropout_p));
  const Strided upstream = p.checked_dout(dout, out);
  const Tensor dx = output_like(out, {p.B, p.N, p.F});
  void* to = dx.mutable_data_ptr();
  const auto run = kernels().relu_row_backward[int(p.dtype)];
  for_each_row(p.B * p.N, p.F, [&](int64_t begin, int64_t end) {
    void* scratch = thread_scratch(2 * (p.F + 64) * sum_size(p.dtype));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.N, n = row % p.N;
      ReluRow t{};
      t.F = p.F;
      t.x = row_at(p.x, b, n, p.dtype), t.x_f = p.x.e;
      t.dout = row_at(upstream, b, n, p.dtype), t.dout_f = upstream.e;
      t.dropout.kept = 1.0 / (1.0 - dropout_p);
      t.out = row_at(to, row, p.F, p.dtype);
      t.scratch = scratch;
      run(t);
    }
  });
  return dx;
}

}  // namespace
}  // namespace mlhead

// The only place where the schemas are written; the CUDA library adds implementations to them.
STABLE_TORCH_LIBRARY_FRAGMENT(mlhead_C, m) {
  m.def(
      "dropout_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? seed, float dropout_p, "
      "float eps) -> (Tensor, Tensor)");
  m.def(
      "dropout_add_layer_norm_backward(Tensor dout, Tensor x, Tensor residual, Tensor weight, Tensor bias, "
      "Tensor? seed, float dropout_p, float eps, Tensor statistics, bool need_dx, bool need_dresidual, "
      "bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("relu_dropout(Tensor x, Tensor? seed, float dropout_p) -> Tensor");
  m.def("relu_dropout_backward(Tensor dout, Tensor out, float dropout_p) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("dropout_add_layer_norm", TORCH_BOX(&mlhead::dropout_add_layer_norm_cpu));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&mlhead::dropout_add_layer_norm_backward_cpu));
  m.impl("relu_dropout", TORCH_BOX(&mlhead::relu_dropout_cpu));
  m.impl("relu_dropout_backward", TORCH_BOX(&mlhead::relu_dropout_backward_cpu));
}
