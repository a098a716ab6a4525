// mlhead._C: the internal functions of csrc, for pytest (tests/test_csrc.py). Built with MLHEAD_BUILD_TESTS=1 only.
//
// Matrices are numpy arrays with any strides; 16-bit types are arrays of uint16 with the name of the type beside them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "gemm.h"

namespace py = pybind11;

namespace mlhead {

#if defined(MLHEAD_X86)
extern const Kernels wide_kernels;  // gemm_wide.cpp
#endif

namespace {

// The kernels of gemm_wide.cpp, where they can run.
const Kernels* wide() {
#if defined(MLHEAD_X86)
  if (kernels_by_name("avx2")) return &wide_kernels;
#endif
  return nullptr;
}

Dtype dtype_named(const std::string& name) {
  if (name == "f32") return Dtype::f32;
  if (name == "f64") return Dtype::f64;
  if (name == "f16") return Dtype::f16;
  if (name == "bf16") return Dtype::bf16;
  fail("dtype_named", "name", "one of f32, f64, f16, bf16", name);
}

VectorAxis axis_named(const std::string& name) {
  if (name == "n") return VectorAxis::n;
  if (name == "m") return VectorAxis::m;
  if (name == "k") return VectorAxis::k;
  fail("axis_named", "name", "one of n, m, k", name);
}

const Kernels& kernels_named(const std::string& name) {
  const Kernels* found = name == "wide" ? wide() : kernels_by_name(name.c_str());
  if (found == nullptr) fail("kernels_named", "name", "an instruction set of this processor", name);
  return *found;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names = {"baseline"};
  for (const char* name : {"avx2", "avx512"})
    if (kernels_by_name(name)) names.push_back(name);
  if (wide()) names.push_back("wide");
  return names;
}

int64_t stride(const py::array& x, int axis) {
  return x.strides(axis) / x.itemsize();
}

Gemm product(const std::string& dtype, const py::array& a, const py::array& b, py::array& c,
             const std::optional<py::array>& bias) {
  return {dtype_named(dtype), a.shape(0),
          b.shape(1),         a.shape(1),
          a.data(),           stride(a, 0),
          stride(a, 1),       b.data(),
          stride(b, 0),       stride(b, 1),
          c.mutable_data(),   stride(c, 0),
          stride(c, 1),       bias ? bias->data() : nullptr};
}

py::dict described(const Plan& p) {
  const char* axis = p.axis == VectorAxis::n ? "n" : p.axis == VectorAxis::m ? "m" : "k";
  return py::dict(py::arg("axis") = axis, py::arg("tile_m") = p.tile_m, py::arg("tile_n") = p.tile_n,
                  py::arg("block_m") = p.block_m, py::arg("block_k") = p.block_k, py::arg("pack_a") = p.pack_a,
                  py::arg("pack_b") = p.pack_b, py::arg("scratch_c") = p.scratch_c, py::arg("tiles_m") = p.tiles_m,
                  py::arg("tiles_n") = p.tiles_n);
}

py::dict plan(const std::string& dtype, const py::array& a, const py::array& b, py::array& c, int64_t lanes,
              int64_t copies, bool bias) {
  const Gemm gemm = product(dtype, a, b, c, bias ? std::optional<py::array>(b) : std::nullopt);
  return described(plan_gemm(gemm, lanes, copies));
}

// C = A B + bias by one instruction set, its tiles computed from the last to the first; `axis` and the block sizes
// replace those of the plan, so that a test reaches every path with small matrices.
py::dict gemm(const std::string& isa, const std::string& dtype, const py::array& a, const py::array& b, py::array& c,
              const std::optional<py::array>& bias, const std::optional<std::string>& axis,
              const std::optional<int64_t>& block_k, const std::optional<int64_t>& block_m, int64_t copies) {
  const Kernels& k = kernels_named(isa);
  const Gemm g = product(dtype, a, b, c, bias);
  Plan p = plan_gemm(g, k.lanes(g.dtype), copies, axis ? std::optional(axis_named(*axis)) : std::nullopt);
  if (block_k) p.block_k = *block_k;
  if (block_m) p.block_m = *block_m;
  for (int64_t tile = p.tiles_m * p.tiles_n; tile-- > 0;) k.run_tile[int(g.dtype)](g, p, tile);
  return described(p);
}

void column_sum(const std::string& isa, const std::string& dtype, const py::array& x, py::array& out) {
  kernels_named(isa).column_sum[int(dtype_named(dtype))](x.data(), x.shape(0), x.shape(1), stride(x, 0), stride(x, 1),
                                                         out.mutable_data());
}

float widened(const std::string& dtype, uint16_t bits) {
  return dtype_named(dtype) == Dtype::f16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}
uint16_t rounded(const std::string& dtype, float x) {
  return dtype_named(dtype) == Dtype::f16 ? to_half(x).bits : to_bfloat16(x).bits;
}

}  // namespace
}  // namespace mlhead

PYBIND11_MODULE(_C, m) {
  using namespace mlhead;
  m.def("instruction_sets", &instruction_sets);
  m.def("chosen_instruction_set", [] { return std::string(kernels().name); });
  m.def("lanes",
        [](const std::string& isa, const std::string& dtype) { return kernels_named(isa).lanes(dtype_named(dtype)); });
  m.def("plan", &plan, py::arg("dtype"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("lanes"),
        py::arg("copies") = 1, py::arg("bias") = false);
  m.def("gemm", &gemm, py::arg("isa"), py::arg("dtype"), py::arg("a"), py::arg("b"), py::arg("c"),
        py::arg("bias") = py::none(), py::arg("axis") = py::none(), py::arg("block_k") = py::none(),
        py::arg("block_m") = py::none(), py::arg("copies") = 1);
  m.def("column_sum", &column_sum);
  m.def("widened", py::vectorize([](uint16_t x) { return widened("f16", x); }));
  m.def("widened_bf16", py::vectorize([](uint16_t x) { return widened("bf16", x); }));
  m.def("rounded", py::vectorize([](float x) { return rounded("f16", x); }));
  m.def("rounded_bf16", py::vectorize([](float x) { return rounded("bf16", x); }));
  m.def("scratch_address", [](int64_t bytes) { return reinterpret_cast<uintptr_t>(thread_scratch(bytes)); });
  m.def("check_ndim", [](const Shape& got, const std::string& letters, size_t ndim) {
    check_ndim("op", "x", got, letters.c_str(), ndim);
  });
  m.def("check_shape", [](const Shape& got, const std::string& letters, const Shape& want) {
    check_shape("op", "x", got, letters.c_str(), want);
  });
  m.def("check_classes",
        [](int64_t classes, int64_t groups, int64_t per_group) { check_classes("op", classes, groups, per_group); });
}
