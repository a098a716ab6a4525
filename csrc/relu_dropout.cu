// ReLU and dropout on CUDA (see relu_dropout.h): elementwise, one read of every input and one write.
//
// A block of 256 threads handles 1024 neighbouring vectors of 16 bytes, of which each thread has four, 256 apart, all
// loaded before the first is used. Where the axes (N, F) of an image are one axis in memory the image is a row of N F
// numbers, else rows are F long; a vector lies within a row, so that one division finds the place of all its numbers.
// Tensors whose rows are not contiguous, or not aligned to vectors, are handled number by number.
//
// Dropout is a hash of the seed, the image and the place in (N, F): no mask in memory. Backward needs neither: the
// output is positive where the input is and nothing was dropped. All arithmetic is in fp32, fp64 for fp64.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, and its logic tested on a CPU (tests/cuda_on_cpu).
#include "relu_dropout.h"

#include <cuda_runtime.h>

#include "cuda_dropout.h"
#include "cuda_numbers.h"

namespace mlhead {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // vectors of a thread
constexpr int64_t kLargestGrid = 2147483647;

template <typename T>
constexpr int kWidest = 16 / int(sizeof(T));

// Rows of M numbers, `rows` to an image.
struct RowsOfImages {
  int64_t images, rows, M;
};

// Where a vector is: image, row of the image, and the first number of it in the row.
template <int WIDTH>
struct Place {
  int64_t b, n, m;

  __device__ Place(const RowsOfImages& shape, int64_t vector, bool small) {
    const int64_t vectors = shape.M / WIDTH;
    // 32-bit division takes a fraction of the instructions.
    const int64_t row = small ? int64_t(uint32_t(vector) / uint32_t(vectors)) : vector / vectors;
    m = (vector - row * vectors) * WIDTH;
    b = small ? int64_t(uint32_t(row) / uint32_t(shape.rows)) : row / shape.rows;
    n = row - b * shape.rows;
  }

  template <typename T>
  __device__ Vector<T, WIDTH> load(const ReluOperand& x) const {
    return *reinterpret_cast<const Vector<T, WIDTH>*>(static_cast<const T*>(x.data) + b * x.b + n * x.n + m * x.f);
  }
};

template <typename T, int WIDTH>
__device__ void store(void* result, int64_t vector, const Vector<T, WIDTH>& x) {
  *reinterpret_cast<Vector<T, WIDTH>*>(static_cast<T*>(result) + vector * WIDTH) = x;
}

// One block handles kEach vectors for each of its threads.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    relu_dropout(ReluCall p, RowsOfImages shape, int64_t vectors, DropoutArguments<SumOf<T>> dropout) {
  using Sum = SumOf<T>;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
  const bool small = vectors <= 0xffffffff;
  Vector<T, WIDTH> held[kEach];
#pragma unroll
  for (int v = 0; v < kEach; ++v)
    if (first + v * kThreads < vectors)
      held[v] = Place<WIDTH>(shape, first + v * kThreads, small).template load<T>(p.x);
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    const int64_t vector = first + v * kThreads;
    if (vector >= vectors) return;
    const Place<WIDTH> place(shape, vector, small);
    const ImageDropout<Sum> image(dropout, place.b);
    const uint32_t i = uint32_t(place.n) * uint32_t(shape.M) + uint32_t(place.m);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const Sum x = to_sum(held[v].x[w]);
      const Sum positive = x <= Sum(0) ? Sum(0) : x;  // a comparison that NaN fails lets it through
      held[v].x[w] = from_sum<T>(positive * image.factor(image.keeps(i + uint32_t(w))));
    }
    store(p.result, vector, held[v]);
  }
}

// One block handles kEach vectors for each of its threads.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads)
    relu_dropout_backward(ReluCall p, RowsOfImages shape, int64_t vectors, SumOf<T> kept) {
  using Sum = SumOf<T>;
  const int64_t first = int64_t(blockIdx.x) * (kThreads * kEach) + threadIdx.x;
  const bool small = vectors <= 0xffffffff;
  Vector<T, WIDTH> dout[kEach], out[kEach];
#pragma unroll
  for (int v = 0; v < kEach; ++v)
    if (first + v * kThreads < vectors) {
      const Place<WIDTH> place(shape, first + v * kThreads, small);
      dout[v] = place.template load<T>(p.dout);
      out[v] = place.template load<T>(p.out);
    }
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    const int64_t vector = first + v * kThreads;
    if (vector >= vectors) return;
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) {
      const Sum passed = to_sum(dout[v].x[w]) * kept;
      dout[v].x[w] = from_sum<T>(to_sum(out[v].x[w]) <= Sum(0) ? Sum(0) : passed);
    }
    store(p.result, vector, dout[v]);
  }
}

// Whether N and F are one axis in memory.
bool merged(const ReluOperand& x, const ReluCall& p) {
  return p.N == 1 || x.n == p.F * x.f;
}

template <typename T>
bool aligned(const ReluOperand& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.f == 1 && (x.b | x.n) % kWidest<T> == 0;
}

enum class Pass { forward, backward };

template <typename T>
const char* launch(Pass pass, const ReluCall& p, cudaStream_t stream) {
  using Sum = SumOf<T>;
  const ReluOperand &x = pass == Pass::forward ? p.x : p.dout, &y = pass == Pass::forward ? p.x : p.out;
  const bool one_axis = merged(x, p) && merged(y, p);
  const RowsOfImages shape{p.B, one_axis ? 1 : p.N, one_axis ? p.N * p.F : p.F};
  const bool wide =
      shape.M % kWidest<T> == 0 && aligned<T>(x) && aligned<T>(y) && reinterpret_cast<uintptr_t>(p.result) % 16 == 0;
  const int64_t vectors = p.B * p.N * p.F / (wide ? kWidest<T> : 1);
  const int64_t blocks = tiles(vectors, kThreads * kEach);
  if (blocks > kLargestGrid) return "the grid has more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(kThreads));
  config.stream = stream;
  const DropoutArguments<Sum> dropout(p.seed, p.dropout_p);
  cudaError_t error;
  if (pass == Pass::forward) {
    const auto kernel = wide ? relu_dropout<T, kWidest<T>> : relu_dropout<T, 1>;
    error = cudaLaunchKernelEx(&config, kernel, p, shape, vectors, dropout);
  } else {
    const auto kernel = wide ? relu_dropout_backward<T, kWidest<T>> : relu_dropout_backward<T, 1>;
    error = cudaLaunchKernelEx(&config, kernel, p, shape, vectors, Sum(dropout.kept));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_dtype(Pass pass, const ReluCall& p, cudaStream_t stream) {
  if (p.B == 0 || p.N == 0 || p.F == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch<float>(pass, p, stream);
    case Dtype::f64: return launch<double>(pass, p, stream);
    case Dtype::f16: return launch<__half>(pass, p, stream);
    default: return launch<__nv_bfloat16>(pass, p, stream);
  }
}

}  // namespace

const char* launch_relu_dropout(const ReluCall& p, cudaStream_t stream) {
  return launch_dtype(Pass::forward, p, stream);
}

const char* launch_relu_dropout_backward(const ReluCall& p, cudaStream_t stream) {
  return launch_dtype(Pass::backward, p, stream);
}

}  // namespace mlhead
