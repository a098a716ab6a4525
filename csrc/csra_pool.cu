// Pooling of csra_pool on CUDA: raw scores of a chunk of classifiers to logits, and their gradient, perhaps in place
// (see csra_pool.h).
//
// A block of 256 threads handles one image and a tile of neighbouring columns: 32 lanes across, one column each, or two
// where 16-bit scores may be read in pairs, and 8 rows of threads that share out the positions l. So a warp reads 128
// neighbouring bytes at a time (256 of fp64), and four positions of every thread are under way at once. What the eight
// rows have found is put together in shared memory, in their order: no atomics, the same bits on every run.
//
// Forward goes over its tile twice, for the maximum and for the sums of the softmax, and writes B N numbers; backward
// makes the same two rounds and writes the gradient in a third. The tile is small, L times 128 bytes (25 KB at L =
// 196), so later rounds come out of the caches: the traffic with device memory is at most B L N numbers read, and as
// many written by backward, and none of either where the caller's chunk stays in the L2 cache between the matrix
// products around it, which is what chunks are for. A softmax in one round would spend as many instructions, on
// rescaling its sums at every new maximum, and each time multiply all of a sum by one rounding error. Statistics are
// not saved by forward: the chunk's scores do not outlive it, and to make them again costs far more.
//
// Neighbouring columns may belong to different heads, so each thread looks up its own temperature and weight, in a
// table that travels with the launch, since both are on the host. All arithmetic is in fp32, fp64 for fp64.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, and its logic tested on a CPU (tests/cuda_on_cpu).
#include "csra_pool.h"

#include <cuda_runtime.h>

#include <cmath>

#include "cuda_numbers.h"

namespace mlhead {
namespace {

constexpr int kLanes = 32;  // threads along n
constexpr int kRows = 8;    // threads along l
constexpr int kThreads = kLanes * kRows;
constexpr int kBatch = 4;   // positions that a thread has under way at once
constexpr int kHeads = 32;  // in the table of one launch; a chunk with more is pooled by several launches
constexpr int64_t kLargestGrid = 2147483647;
constexpr int64_t kLargestL = 1 << 30;  // so that a position and what is added to it fit an int

// What a launch needs of its heads: temperatures and weights of those that it meets, and average / L. The first column
// of the chunk is class `offset` of the first of them.
template <typename Sum>
struct Heads {
  int64_t offset;
  Sum share;
  Sum temperature[kHeads], lam[kHeads];
};

// What belongs to one column besides its scores.
template <typename Sum>
struct Column {
  Sum scale, temperature, lam;
  Sum rate;   // exp(T x) = power(rate x)
  bool hard;  // T is infinite
};

// exp2f, at most 2 ulp off in fp32, with log2(e) inside the rate; exp in fp64.
__device__ inline float power(float x) {
  return exp2f(x);
}
__device__ inline double power(double x) {
  return exp(x);
}
__device__ inline float rate_of(float temperature) {
  return temperature * 1.44269504088896341f;
}
__device__ inline double rate_of(double temperature) {
  return temperature;
}

// The maximum of some positions of one column, and their sum. A NaN is no maximum, but stays in the sum.
template <typename Sum>
struct Maximum {
  Sum m, total;
  int at;  // the first position of m

  __device__ void merge(const Maximum& other) {
    total += other.total;
    if (other.m > m || (other.m == m && other.at < at)) {
      m = other.m;
      at = other.at;
    }
  }
};

// The softmax of some positions of one column of finite T. Offsets from the maximum, not scores, are summed: T (s - A)
// is then as exact for scores that are all large as for small ones. NaN and, as in torch, infinite scores make NaN.
template <typename Sum>
struct Softmax {
  Sum z;       // sum exp(T (s - m))
  Sum offset;  // sum exp(T (s - m)) (s - m)

  __device__ void merge(const Softmax& other) {
    z += other.z;
    offset += other.offset;
  }
};

// What every row of threads has found of every column of the tile.
template <typename Sum, int TILE>
struct Shared {
  Maximum<Sum> maximum[kRows][TILE];
  Softmax<Sum> softmax[kRows][TILE];
};

// The part of one thread: WIDTH neighbouring columns of one image, every 8th position.
template <typename T, int WIDTH>
struct Part {
  using Sum = SumOf<T>;
  static constexpr int kTile = kLanes * WIDTH;
  int64_t b, n;  // image, first column
  int row, lane;
  int end;      // of the positions: L, or 0 for a thread beyond the last column
  const T* at;  // the first position of column n
  T* to;        // of ds
  int64_t s_l;
  Column<Sum> column[WIDTH];

  __device__ Part(const CsraScores& p, const Heads<Sum>& heads) {
    row = int(threadIdx.x) / kLanes, lane = int(threadIdx.x) % kLanes;
    const int64_t tiles_n = tiles(p.N, kTile);
    b = blockIdx.x / tiles_n;
    n = blockIdx.x % tiles_n * kTile + lane * WIDTH;
    end = n < p.N ? int(p.L) : 0;
    s_l = p.s_l;
    at = static_cast<const T*>(p.scores) + b * p.s_b + n;
    to = p.ds ? static_cast<T*>(p.ds) + b * p.s_b + n : nullptr;
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      const int64_t own = smaller(n + v, p.N - 1);
      const int h = int((heads.offset + own) / p.classes);
      column[v].scale = p.scale ? static_cast<const Sum*>(p.scale)[own] : Sum(1);
      column[v].temperature = heads.temperature[h];
      column[v].lam = heads.lam[h];
      column[v].rate = rate_of(column[v].temperature);
      column[v].hard = column[v].temperature == Sum(INFINITY);
    }
  }

  __device__ Vector<T, WIDTH> load(int l) const { return *reinterpret_cast<const Vector<T, WIDTH>*>(at + l * s_l); }

  __device__ void scale(const Vector<T, WIDTH>& held, Sum (&s)[WIDTH]) const {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) s[v] = to_sum(held.x[v]) * column[v].scale;
  }

  __device__ void store(int l, const Sum (&x)[WIDTH]) const {
    Vector<T, WIDTH> held;
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) held.x[v] = from_sum<T>(x[v]);
    *reinterpret_cast<Vector<T, WIDTH>*>(to + l * s_l) = held;
  }

  // f(l, s) for every position of the thread, from the first to the last. The loads of a batch wait for nothing.
  template <typename F>
  __device__ void for_each_position(const F& f) const {
    for (int first = row; first < end; first += kRows * kBatch) {
      Vector<T, WIDTH> held[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * kRows < end) held[i] = load(first + i * kRows);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * kRows >= end) break;
        Sum s[WIDTH];
        scale(held[i], s);
        f(first + i * kRows, s);
      }
    }
  }

  // Merges what all rows of threads have found, the same in every one. Each call needs shared memory of its own.
  template <typename Found>
  __device__ void merge_rows(Found (&shared)[kRows][kTile], Found (&found)[WIDTH]) const {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) shared[row][lane * WIDTH + v] = found[v];
    __syncthreads();
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      found[v] = shared[0][lane * WIDTH + v];
#pragma unroll 1
      for (int other = 1; other < kRows; ++other) found[v].merge(shared[other][lane * WIDTH + v]);
    }
  }

  // The statistics of whole columns, in every thread.
  __device__ void gather(Shared<Sum, kTile>& shared, Maximum<Sum> (&maximum)[WIDTH],
                         Softmax<Sum> (&softmax)[WIDTH]) const {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) maximum[v] = {-Sum(INFINITY), 0, row}, softmax[v] = {0, 0};
    for_each_position([&](int l, const Sum(&s)[WIDTH]) {
#pragma unroll
      for (int v = 0; v < WIDTH; ++v) maximum[v].merge({s[v], s[v], l});
    });
    merge_rows(shared.maximum, maximum);
    for_each_position([&](int, const Sum(&s)[WIDTH]) {
#pragma unroll
      for (int v = 0; v < WIDTH; ++v) {
        const Sum distance = s[v] - maximum[v].m, e = power(distance * column[v].rate);
        softmax[v].merge({e, e * distance});
      }
    });
    merge_rows(shared.softmax, softmax);
  }
};

// Blocks to a multiprocessor that leave every thread the registers it needs: up to 64, and up to 128 for fp64.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;

// One block handles one image and a tile of columns.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) pool(CsraScores p, Heads<SumOf<T>> heads) {
  using Sum = SumOf<T>;
  __shared__ Shared<Sum, kLanes * WIDTH> shared;
  const Part<T, WIDTH> part(p, heads);
  Maximum<Sum> maximum[WIDTH];
  Softmax<Sum> softmax[WIDTH];
  part.gather(shared, maximum, softmax);
  if (part.row > 0 || part.end == 0) return;
  Sum* const pooled = static_cast<Sum*>(p.pooled) + part.b * p.pooled_b + part.n;
#pragma unroll
  for (int v = 0; v < WIDTH; ++v) {
    const Column<Sum>& column = part.column[v];
    const Sum attention = column.hard ? maximum[v].m : maximum[v].m + softmax[v].offset / softmax[v].z;
    pooled[v] = heads.share * maximum[v].total + column.lam * attention;
  }
}

// One block handles one image and a tile of columns.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) pool_backward(CsraScores p, Heads<SumOf<T>> heads) {
  using Sum = SumOf<T>;
  __shared__ Shared<Sum, kLanes * WIDTH> shared;
  const Part<T, WIDTH> part(p, heads);
  Maximum<Sum> maximum[WIDTH];
  Softmax<Sum> softmax[WIDTH];
  part.gather(shared, maximum, softmax);

  Sum dlogit[WIDTH], inverse[WIDTH], offset[WIDTH];
#pragma unroll
  for (int v = 0; v < WIDTH; ++v) {
    const int64_t c = (p.first + smaller(part.n + v, p.N - 1)) % p.classes;
    dlogit[v] = to_sum(static_cast<const T*>(p.dlogits)[part.b * p.d_b + c * p.d_c]);
    inverse[v] = 1 / softmax[v].z;
    offset[v] = softmax[v].offset * inverse[v];  // A - m
  }
  part.for_each_position([&](int l, const Sum(&s)[WIDTH]) {
    Sum scaled[WIDTH];
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      const Column<Sum>& column = part.column[v];
      Sum slope;  // of the attention
      if (column.hard) {
        slope = l == maximum[v].at ? Sum(1) : Sum(0);
      } else {
        const Sum distance = s[v] - maximum[v].m;
        slope = power(distance * column.rate) * inverse[v] * (1 + column.temperature * (distance - offset[v]));
      }
      const Sum ds = dlogit[v] * (heads.share + column.lam * slope);
      scaled[v] = ds * column.scale;
    }
    part.store(l, scaled);
  });
}

// One block handles one classifier: every thread every 256th feature, and the threads' sums in their order.
template <typename S, typename G>
__global__ void __launch_bounds__(kThreads) unit_rows_backward(UnitRows p) {
  using Sum = SumOf<S>;
  __shared__ Sum sums[kThreads];
  const int64_t n = blockIdx.x;
  const Sum norm = static_cast<const Sum*>(p.norm)[n];
  const S* const weight = static_cast<const S*>(p.weight) + n * p.w_n;
  G* const dw = static_cast<G*>(p.dw) + n * p.dw_n;
  Sum along = 0;
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) along += to_sum(dw[d]) * (to_sum(weight[d * p.w_d]) / norm);
  sums[threadIdx.x] = along;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  along = sums[0];
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    const Sum rest = to_sum(dw[d]) - (to_sum(weight[d * p.w_d]) / norm) * along;
    dw[d] = from_sum<G>(p.divide ? rest / norm : rest);
  }
}

// Whether columns may be read and written in vectors of WIDTH.
template <typename T, int WIDTH>
bool aligned(const CsraScores& p) {
  const uintptr_t begins = reinterpret_cast<uintptr_t>(p.scores) | reinterpret_cast<uintptr_t>(p.ds);
  return begins % (sizeof(T) * WIDTH) == 0 && (p.s_b | p.s_l | p.N) % WIDTH == 0;
}

enum class Pass { forward, backward };

// The columns of at most kHeads heads.
template <typename T>
const char* launch_heads(Pass pass, const CsraScores& p, cudaStream_t stream) {
  using Sum = SumOf<T>;
  constexpr int width = sizeof(T) == 2 ? 2 : 1;
  const bool wide = width > 1 && aligned<T, width>(p);
  const int64_t blocks = p.B * tiles(p.N, kLanes * (wide ? width : 1));
  if (blocks > kLargestGrid) return "the grid has more than 2^31 - 1 blocks";
  Heads<Sum> heads{};
  heads.offset = p.first % p.classes;
  heads.share = Sum(p.average / double(p.L));
  const int64_t begin = p.first / p.classes, end = (p.first + p.N - 1) / p.classes + 1;
  for (int64_t h = begin; h < end; ++h) {
    heads.temperature[h - begin] = Sum(p.temperatures[h]);
    heads.lam[h - begin] = Sum(p.lam[h]);
  }
  const auto kernel = pass == Pass::forward ? (wide ? pool<T, width> : pool<T, 1>)
                                            : (wide ? pool_backward<T, width> : pool_backward<T, 1>);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(kThreads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, heads);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// p without the columns before n, and none after n + columns.
template <typename T>
CsraScores columns_of(const CsraScores& p, int64_t n, int64_t columns) {
  using Sum = SumOf<T>;
  CsraScores part = p;
  part.N = columns;
  part.first = p.first + n;
  part.scores = static_cast<const T*>(p.scores) + n;
  if (p.ds) part.ds = static_cast<T*>(p.ds) + n;
  if (p.scale) part.scale = static_cast<const Sum*>(p.scale) + n;
  if (p.pooled) part.pooled = static_cast<Sum*>(p.pooled) + n;
  return part;
}

template <typename T>
const char* launch(Pass pass, const CsraScores& p, cudaStream_t stream) {
  for (int64_t n = 0; n < p.N;) {
    const int64_t column = p.first + n;
    const int64_t columns = smaller(p.N - n, (column / p.classes + kHeads) * p.classes - column);
    const char* problem = launch_heads<T>(pass, columns_of<T>(p, n, columns), stream);
    if (problem) return problem;
    n += columns;
  }
  return nullptr;
}

const char* launch_dtype(Pass pass, const CsraScores& p, cudaStream_t stream) {
  if (p.B == 0 || p.N == 0) return nullptr;
  if (p.L > kLargestL) return "there are more than 2^30 positions";
  switch (p.dtype) {
    case Dtype::f32: return launch<float>(pass, p, stream);
    case Dtype::f64: return launch<double>(pass, p, stream);
    case Dtype::f16: return launch<__half>(pass, p, stream);
    default: return launch<__nv_bfloat16>(pass, p, stream);
  }
}

template <typename S>
const char* launch_unit_rows(const UnitRows& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(p.N));
  config.blockDim = dim3(unsigned(kThreads));
  config.stream = stream;
  const auto kernel = p.dw_accumulated ? unit_rows_backward<S, SumOf<S>> : unit_rows_backward<S, S>;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_unit_rows_backward(const UnitRows& p, cudaStream_t stream) {
  if (p.N == 0 || p.D == 0) return nullptr;
  if (p.N > kLargestGrid) return "there are more than 2^31 - 1 classifiers";
  switch (p.dtype) {
    case Dtype::f32: return launch_unit_rows<float>(p, stream);
    case Dtype::f64: return launch_unit_rows<double>(p, stream);
    case Dtype::f16: return launch_unit_rows<__half>(p, stream);
    default: return launch_unit_rows<__nv_bfloat16>(p, stream);
  }
}

const char* launch_csra_pool(const CsraScores& p, cudaStream_t stream) {
  return launch_dtype(Pass::forward, p, stream);
}

const char* launch_csra_pool_backward(const CsraScores& p, cudaStream_t stream) {
  return launch_dtype(Pass::backward, p, stream);
}

}  // namespace mlhead
