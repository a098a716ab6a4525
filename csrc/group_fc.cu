// Group fully-connected layer on CUDA: one grouped matrix product in three roles (see group_fc.h).
//
// A block of 128 threads makes one tile of c. Operand tiles go through registers into shared memory, in the order in
// which they lie in device memory: the inner axis of a tile is the axis that is contiguous in the usual layout, so
// neighbouring threads read neighbouring addresses, 16 bytes each where alignment allows, and nothing is transposed on
// the way; the tensor cores take either order. The next tiles are loaded while the current ones are multiplied.
//
// fp16 and bf16 run on tensor cores (mma through nvcuda::wmma, sm_80 or later) and accumulate in fp32; fp32 and fp64
// run on the ordinary units, so fp32 is never rounded to TF32. Where k is long and the grid small, k is cut into parts
// whose sums are added by a second kernel in a fixed order: no atomics, the same bits on every run.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, its logic tested on CPU threads.

#include "group_fc.h"

#include <cuda_runtime.h>

#include "cuda_numbers.h"
#include "cuda_tiles.h"

namespace mlhead {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kLargestGrid = 2147483647;

template <typename T>
struct Traits {
  using Sum = T;
  static constexpr int M = 64, N = std::is_same<T, double>::value ? 32 : 64, K = 16;
};
template <>
struct Traits<__half> {
  using Sum = float;
  static constexpr int M = 64, N = 64, K = 32;
};
template <>
struct Traits<__nv_bfloat16> : Traits<__half> {};

// How a role lays out its operand tiles: whether k is the inner axis of a, and n the inner axis of b.
template <Product ROLE>
struct Layout {
  static constexpr bool a_inner_is_k = ROLE != Product::dweight;
  static constexpr bool b_inner_is_n = ROLE != Product::dh;
};

template <typename T, Product ROLE, int WIDTH>
struct Shared {
  using R = Traits<T>;
  using Sum = typename R::Sum;
  template <int OUTER, int INNER>
  using Stage = TileStage<T, kThreads, OUTER, INNER, WIDTH>;
  using StageA = std::conditional_t<Layout<ROLE>::a_inner_is_k, Stage<R::M, R::K>, Stage<R::K, R::M>>;
  using StageB = std::conditional_t<Layout<ROLE>::b_inner_is_n, Stage<R::K, R::N>, Stage<R::N, R::K>>;
  using Multiply = TileProduct<T, kThreads, R::M, R::N, R::K, Layout<ROLE>::a_inner_is_k, Layout<ROLE>::b_inner_is_n>;
  static constexpr int kOutPitch = R::N + 16 / int(sizeof(Sum));
  static constexpr int kA = (Layout<ROLE>::a_inner_is_k ? R::M : R::K) * StageA::kPitch;
  static constexpr int kB = (Layout<ROLE>::b_inner_is_n ? R::K : R::N) * StageB::kPitch;
  static constexpr int kOperandBytes = (kA + kB) * int(sizeof(T));
  static constexpr int kOutBytes = R::M * kOutPitch * int(sizeof(Sum));
  static constexpr int kBytes = kOperandBytes > kOutBytes ? kOperandBytes : kOutBytes;
};

// One block handles one tile of M x N of one group, over one part of k. With `parts` > 1 it writes its unrounded sums
// into workspace (parts, groups, M, N), else the rounded result into c.
template <typename T, Product ROLE, int WIDTH>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_product(GroupedProduct p, int64_t parts, int64_t part_k, typename Traits<T>::Sum* workspace) {
  using S = Shared<T, ROLE, WIDTH>;
  using R = Traits<T>;
  using Sum = typename R::Sum;
  // The result tile takes the place of the operands, which are not needed any more by then.
  alignas(128) __shared__ unsigned char memory[S::kBytes];
  T* const tile_a = reinterpret_cast<T*>(memory);
  T* const tile_b = tile_a + S::kA;
  Sum* const tile_c = reinterpret_cast<Sum*>(memory);

  const int64_t tiles_m = tiles(p.M, R::M), tiles_n = tiles(p.N, R::N);
  int64_t rest = blockIdx.x;
  const int64_t m0 = rest % tiles_m * R::M;
  rest /= tiles_m;
  const int64_t n0 = rest % tiles_n * R::N;
  rest /= tiles_n;
  const int64_t g = rest % p.groups, part = rest / p.groups;

  const int64_t left = p.C - g * p.J;
  const int64_t classes = left < 0 ? 0 : smaller(left, p.J);
  const int64_t n_end = ROLE == Product::dh ? p.N : classes;  // columns past it have no terms
  const int64_t k_end = smaller(ROLE == Product::dh ? classes : p.K, (part + 1) * part_k);

  const T* const a = static_cast<const T*>(p.a) + g * p.a_g + m0 * p.a_m;
  const T* const b = static_cast<const T*>(p.b) + g * p.b_g + n0 * p.b_n;
  typename S::StageA stage_a;
  typename S::StageB stage_b;
  const auto most = [](int64_t left, int64_t tile) { return int(smaller(left, tile)); };
  const auto load = [&](int64_t k) {
    if constexpr (Layout<ROLE>::a_inner_is_k)
      stage_a.load(a + k * p.a_k, p.a_m, p.a_k, most(p.M - m0, R::M), most(k_end - k, R::K));
    else
      stage_a.load(a + k * p.a_k, p.a_k, p.a_m, most(k_end - k, R::K), most(p.M - m0, R::M));
    if constexpr (Layout<ROLE>::b_inner_is_n)
      stage_b.load(b + k * p.b_k, p.b_k, p.b_n, most(k_end - k, R::K), most(n_end - n0, R::N));
    else
      stage_b.load(b + k * p.b_k, p.b_n, p.b_k, most(n_end - n0, R::N), most(k_end - k, R::K));
  };

  typename S::Multiply multiply;
  const int64_t k_begin = part * part_k;
  if (k_begin < k_end && n0 < n_end) {  // the same for all threads of the block
    load(k_begin);
    for (int64_t k = k_begin; k < k_end; k += R::K) {
      __syncthreads();
      stage_a.store(tile_a);
      stage_b.store(tile_b);
      __syncthreads();
      if (k + R::K < k_end) load(k + R::K);
      multiply.step(tile_a, S::StageA::kPitch, tile_b, S::StageB::kPitch);
    }
  }
  __syncthreads();
  multiply.finish(tile_c, S::kOutPitch);
  __syncthreads();

  // Forward writes the classes there are; the gradients write every column, 0 where there is no class.
  const int64_t n_written = ROLE == Product::forward ? classes : p.N;
#pragma unroll 1
  for (int i = threadIdx.x; i < R::M * R::N; i += kThreads) {
    const int64_t m = m0 + i / R::N, n = n0 + i % R::N;
    if (m >= p.M || n >= n_written) continue;
    Sum sum = n < n_end ? tile_c[i / R::N * S::kOutPitch + i % R::N] : Sum(0);
    if (parts > 1) {
      workspace[((part * p.groups + g) * p.M + m) * p.N + n] = sum;
    } else {
      if (ROLE == Product::forward && p.bias) sum += to_sum(static_cast<const T*>(p.bias)[(g * p.J + n) * p.bias_c]);
      static_cast<T*>(p.c)[g * p.c_g + m * p.c_m + n] = from_sum<T>(sum);
    }
  }
}

// One thread handles one element of c: the sums of all parts, in their order.
template <typename T>
__global__ void __launch_bounds__(256)
    add_parts(GroupedProduct p, int64_t parts, const typename Traits<T>::Sum* workspace) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, elements = p.groups * p.M * p.N;
  if (i >= elements) return;
  typename Traits<T>::Sum sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += workspace[part * elements + i];
  const int64_t n = i % p.N, m = i / p.N % p.M, g = i / p.N / p.M;
  static_cast<T*>(p.c)[g * p.c_g + m * p.c_m + n] = from_sum<T>(sum);
}

// One block handles 32 columns; each of its 8 rows of threads sums every 8th row, then the first adds the eight.
template <typename T>
__global__ void __launch_bounds__(256)
    column_sum(const T* x, int64_t rows, int64_t columns, int64_t stride_row, int64_t stride_column, T* out) {
  using Sum = typename Traits<T>::Sum;
  __shared__ Sum sums[8][33];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  Sum sum = 0;
  if (c < columns)
    for (int64_t r = row; r < rows; r += 8) sum += to_sum(x[r * stride_row + c * stride_column]);
  sums[row][lane] = sum;
  __syncthreads();
  if (row > 0 || c >= columns) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  out[c] = from_sum<T>(sum);
}

// Launches and says what went wrong, if anything did.
template <typename... Parameters, typename... Arguments>
const char* start(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                  Arguments... arguments) {
  if (blocks > kLargestGrid) return "the grid has more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
int64_t tiles_of(const GroupedProduct& p) {
  return p.groups * tiles(p.M, Traits<T>::M) * tiles(p.N, Traits<T>::N);
}

// Whether every row of both operands may be read 16 bytes at a time.
template <typename T, Product ROLE>
bool aligned(const GroupedProduct& p) {
  constexpr int64_t width = 16 / int64_t(sizeof(T));
  const bool a_k = Layout<ROLE>::a_inner_is_k, b_n = Layout<ROLE>::b_inner_is_n;
  const bool inner = (a_k ? p.a_k : p.a_m) == 1 && (b_n ? p.b_n : p.b_k) == 1;
  const int64_t others = p.a_g | p.b_g | (a_k ? p.a_m : p.a_k) | (b_n ? p.b_k : p.b_n);
  const bool bases = (reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b)) % 16 == 0;
  return inner && others % width == 0 && bases;
}

template <typename T, Product ROLE>
const char* launch(const GroupedProduct& p, int64_t parts, void* workspace, cudaStream_t stream) {
  using Sum = typename Traits<T>::Sum;
  const int64_t part_k = tiles(tiles(p.K, Traits<T>::K), parts) * Traits<T>::K;
  constexpr int width = sizeof(T) == 8 ? 1 : 16 / int(sizeof(T));
  const auto kernel = aligned<T, ROLE>(p) ? grouped_product<T, ROLE, width> : grouped_product<T, ROLE, 1>;
  Sum* const sums = static_cast<Sum*>(workspace);
  const char* problem = start(kernel, tiles_of<T>(p) * parts, kThreads, stream, p, parts, part_k, sums);
  if (problem || parts == 1) return problem;
  return start(add_parts<T>, tiles(p.groups * p.M * p.N, 256), 256, stream, p, parts, sums);
}

template <typename T>
const char* launch_role(const GroupedProduct& p, int64_t parts, void* workspace, cudaStream_t stream) {
  switch (p.product) {
    case Product::forward: return launch<T, Product::forward>(p, parts, workspace, stream);
    case Product::dh: return launch<T, Product::dh>(p, parts, workspace, stream);
    default: return launch<T, Product::dweight>(p, parts, workspace, stream);
  }
}

template <typename T>
const char* launch_sum(const void* x, int64_t rows, int64_t columns, int64_t stride_row, int64_t stride_column,
                       void* out, cudaStream_t stream) {
  return start(column_sum<T>, tiles(columns, 32), 256, stream, static_cast<const T*>(x), rows, columns, stride_row,
               stride_column, static_cast<T*>(out));
}

}  // namespace

int64_t parts_of(const GroupedProduct& p, int multiprocessors) {
  if (p.product == Product::forward) return 1;
  const int64_t blocks = p.dtype == Dtype::f64   ? tiles_of<double>(p)
                         : p.dtype == Dtype::f32 ? tiles_of<float>(p)
                                                 : tiles_of<__half>(p);
  const int64_t steps = tiles(p.K, p.dtype == Dtype::f64 || p.dtype == Dtype::f32 ? 16 : 32);
  // Two blocks for each multiprocessor, at least 8 steps and at most 32 parts; no part may be empty.
  const int64_t wanted = tiles(2 * int64_t(multiprocessors), blocks > 0 ? blocks : 1);
  const int64_t most = smaller(smaller(wanted, steps / 8), 32);
  return most <= 1 ? 1 : tiles(steps, tiles(steps, most));
}

int64_t workspace_elements(const GroupedProduct& p, int64_t parts) {
  return parts > 1 ? parts * p.groups * p.M * p.N : 0;
}

const char* launch_grouped_product(const GroupedProduct& p, int64_t parts, void* workspace, cudaStream_t stream) {
  if (p.groups == 0 || p.M == 0 || p.N == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch_role<float>(p, parts, workspace, stream);
    case Dtype::f64: return launch_role<double>(p, parts, workspace, stream);
    case Dtype::f16: return launch_role<__half>(p, parts, workspace, stream);
    default: return launch_role<__nv_bfloat16>(p, parts, workspace, stream);
  }
}

const char* launch_column_sum(Dtype dtype, const void* x, int64_t rows, int64_t columns, int64_t stride_row,
                              int64_t stride_column, void* out, cudaStream_t stream) {
  if (columns == 0) return nullptr;
  switch (dtype) {
    case Dtype::f32: return launch_sum<float>(x, rows, columns, stride_row, stride_column, out, stream);
    case Dtype::f64: return launch_sum<double>(x, rows, columns, stride_row, stride_column, out, stream);
    case Dtype::f16: return launch_sum<__half>(x, rows, columns, stride_row, stride_column, out, stream);
    default: return launch_sum<__nv_bfloat16>(x, rows, columns, stride_row, stride_column, out, stream);
  }
}

}  // namespace mlhead
