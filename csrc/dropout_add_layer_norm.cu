// Dropout, addition and layer norm on CUDA (see dropout_add_layer_norm.h): one read of every input, one write of every
// result.
//
// A row of up to 1024 features (512 in fp64) belongs to one warp, which keeps it in registers, 32 numbers to a thread
// in vectors of 16 bytes, and sums it with shuffles; a longer one to a block of 256 threads, 16 numbers to a thread in
// registers and what is beyond those read again, out of the caches, wherever it is needed. Where rows are not
// contiguous, or not aligned, numbers are loaded one by one, and a thread keeps half as many. The variance is that of
// centred values, not a difference of large sums. Forward keeps mean and 1 / std of every row; backward makes the
// normalized row again from them. Dropout is a hash of the seed, the image and the place in (N, E): no mask in memory.
//
// A block of the backward walks over a run of rows with its part of dweight and dbias in registers, which it writes
// once; a second kernel adds the parts in a fixed order. No atomics, and the runs hang on the shape alone, so the same
// bits on every run and every GPU. Rows that do not fit the registers have a kernel of their own for these parts.
//
// All arithmetic is in fp32, fp64 for fp64; each result is rounded once.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, and its logic tested on a CPU (tests/cuda_on_cpu).
#include "dropout_add_layer_norm.h"

#include <cuda_runtime.h>

#include "cuda_dropout.h"
#include "cuda_layer_norm_row.h"
#include "cuda_numbers.h"

namespace mlhead {
namespace {

constexpr int64_t kLargestGrid = 2147483647;
constexpr int64_t kRuns = 528;     // at most: 4 blocks for each multiprocessor of an H100
constexpr int64_t kLeastRows = 8;  // of a run

// A warp handles a row, or a block does.
template <typename T, int WIDTH, int LANES>
__global__ void __launch_bounds__(kThreads<LANES>) normalize(LayerNormCall p, DropoutArguments<SumOf<T>> dropout) {
  using Sum = SumOf<T>;
  using R = LayerNormRow<T, WIDTH, LANES>;
  const int64_t row = int64_t(blockIdx.x) * (kThreads<LANES> / LANES) + threadIdx.x / LANES;
  if (row >= p.B * p.N) return;  // whole warps: a block of one row has no such row
  const R r(p, dropout, row);

  // All loads of the row are under way before the first is used.
  typename R::Raw x[R::kVectors], residual[R::kVectors];
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v)
    if (R::place(v) < p.E) x[v] = r.load(p.x, R::place(v)), residual[v] = r.load(p.residual, R::place(v));
  Sum held[R::kVectors][WIDTH];
#pragma unroll
  for (int v = 0; v < R::kVectors; ++v)
    if (R::place(v) < p.E) r.add(x[v], residual[v], R::place(v), held[v]);

  // f(e, z) for every vector of the thread.
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v)
      if (R::place(v) < p.E) f(R::place(v), held[v]);
    if constexpr (R::kReads) {
#pragma unroll 1
      for (int64_t e = R::place(R::kVectors); e < p.E; e += LANES * WIDTH) {
        Sum z[WIDTH];
        r.add(r.load(p.x, e), r.load(p.residual, e), e, z);
        f(e, z);
      }
    }
  };

  Sum total = 0;
  for_each([&](int64_t, const Sum(&z)[WIDTH]) {
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) total += z[w];
  });
  const Sum mean = sum_of_row<LANES>(total) / Sum(p.E);
  Sum squares = 0;
  for_each([&](int64_t, const Sum(&z)[WIDTH]) {
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) squares += (z[w] - mean) * (z[w] - mean);
  });
  const Sum rstd = inverse_root(sum_of_row<LANES>(squares) / Sum(p.E) + Sum(p.eps));
  for_each([&](int64_t e, const Sum(&z)[WIDTH]) {
    Sum weight[WIDTH], bias[WIDTH], out[WIDTH];
    r.parameter(p.weight, p.weight_e, e, weight);
    r.parameter(p.bias, p.bias_e, e, bias);
#pragma unroll
    for (int w = 0; w < WIDTH; ++w) out[w] = (z[w] - mean) * rstd * weight[w] + bias[w];
    r.store(p.out, row, e, out);
  });
  if (threadIdx.x % LANES == 0) {
    Sum* const statistics = static_cast<Sum*>(p.statistics);
    statistics[row] = mean;
    statistics[p.B * p.N + row] = rstd;
  }
}

// Where the parts of dweight and dbias of a run go: null where not needed.
template <typename Sum>
struct Parts {
  Sum *dweight, *dbias;  // (runs, E)
};

// Blocks to a multiprocessor that leave every thread the registers it needs: up to 168 and up to 255.
template <int WIDTH, int LANES>
constexpr int kBlocks = LANES > kWarp ? 1
                        : WIDTH == 1  ? 3
                                      : 2;

// One block handles a run of rows, each of which a warp handles, or the block.
template <typename T, int WIDTH, int LANES>
__global__ void __launch_bounds__(kThreads<LANES>, kBlocks<WIDTH, LANES>)
    normalize_backward(LayerNormCall p, DropoutArguments<SumOf<T>> dropout, int64_t rows_per_run,
                       Parts<SumOf<T>> parts) {
  using Sum = SumOf<T>;
  using R = LayerNormRow<T, WIDTH, LANES>;
  constexpr int kRows = kThreads<LANES> / LANES;
  const int64_t rows = p.B * p.N, run = blockIdx.x;
  const int64_t last = smaller((run + 1) * rows_per_run, rows);
  const Sum* const statistics = static_cast<const Sum*>(p.statistics);
  Sum dweight[R::kVectors][WIDTH] = {}, dbias[R::kVectors][WIDTH] = {};

#pragma unroll 1
  for (int64_t row = run * rows_per_run + threadIdx.x / LANES; row < last; row += kRows) {
    const R r(p, dropout, row);
    const Sum mean = statistics[row], rstd = statistics[rows + row];
    typename R::Raw x[R::kVectors], residual[R::kVectors], dout[R::kVectors];
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v)
      if (R::place(v) < p.E) {
        x[v] = r.load(p.x, R::place(v)), residual[v] = r.load(p.residual, R::place(v));
        dout[v] = r.load(p.dout, R::place(v));
      }

    const auto normalize_again = [&](const typename R::Raw& x_, const typename R::Raw& residual_, int64_t e,
                                     Sum(&n)[WIDTH]) {
      const uint32_t kept_ = r.add(x_, residual_, e, n);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) n[w] = (n[w] - mean) * rstd;
      return kept_;
    };
    // The sums of g and g n grow by those of a vector.
    Sum sum_g = 0, sum_gn = 0;
    const auto add = [&](int64_t e, const typename R::Raw& dout_, const Sum(&n)[WIDTH]) {
      Sum weight[WIDTH];
      r.parameter(p.weight, p.weight_e, e, weight);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        const Sum g = to_sum(dout_.x[w]) * weight[w];
        sum_g += g, sum_gn += g * n[w];
      }
    };
    Sum normalized[R::kVectors][WIDTH];
    uint32_t kept = 0;
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v) {
      if (R::place(v) >= p.E) continue;
      kept |= normalize_again(x[v], residual[v], R::place(v), normalized[v]) << (v * WIDTH);
      add(R::place(v), dout[v], normalized[v]);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) {
        dweight[v][w] += to_sum(dout[v].x[w]) * normalized[v][w];
        dbias[v][w] += to_sum(dout[v].x[w]);
      }
    }
    // f(e, dout, n, kept) for every vector that is not held.
    const auto for_each_beyond = [&](const auto& f) {
      if constexpr (R::kReads) {
#pragma unroll 1
        for (int64_t e = R::place(R::kVectors); e < p.E; e += LANES * WIDTH) {
          Sum n[WIDTH];
          const uint32_t kept_ = normalize_again(r.load(p.x, e), r.load(p.residual, e), e, n);
          f(e, r.load(p.dout, e), n, kept_);
        }
      }
    };
    for_each_beyond([&](int64_t e, const typename R::Raw& dout_, const Sum(&n)[WIDTH], uint32_t) { add(e, dout_, n); });

    if (!p.dx && !p.dresidual) continue;
    const Sum mean_g = sum_of_row<LANES>(sum_g) / Sum(p.E), mean_gn = sum_of_row<LANES>(sum_gn) / Sum(p.E);
    // g is made again: to keep it would take the registers of a block.
    const auto write = [&](int64_t e, const typename R::Raw& dout_, const Sum(&n)[WIDTH], uint32_t kept_) {
      Sum weight[WIDTH], dz[WIDTH];
      r.parameter(p.weight, p.weight_e, e, weight);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) dz[w] = (to_sum(dout_.x[w]) * weight[w] - mean_g - n[w] * mean_gn) * rstd;
      if (p.dresidual) r.store(p.dresidual, row, e, dz);
#pragma unroll
      for (int w = 0; w < WIDTH; ++w) dz[w] *= r.image.factor(kept_ >> w & 1);
      if (p.dx) r.store(p.dx, row, e, dz);
    };
#pragma unroll
    for (int v = 0; v < R::kVectors; ++v)
      if (R::place(v) < p.E) write(R::place(v), dout[v], normalized[v], kept >> (v * WIDTH));
    for_each_beyond(write);
  }

  // The warps' sums are added in their order.
  __shared__ Sum merged[LANES == kWarp ? kCapacity<T, WIDTH, LANES> : 1];
  const auto finish = [&](const Sum(&sums)[R::kVectors][WIDTH], Sum* part) {
    if (!part) return;
    part += run * p.E;
    if constexpr (LANES > kWarp) {
#pragma unroll
      for (int v = 0; v < R::kVectors; ++v)
#pragma unroll
        for (int w = 0; w < WIDTH; ++w)
          if (R::place(v) < p.E) part[R::place(v) + w] = sums[v][w];
    } else {
#pragma unroll 1
      for (int turn = 0; turn < kRows; ++turn) {
        if (int(threadIdx.x) / LANES == turn) {
#pragma unroll
          for (int v = 0; v < R::kVectors; ++v)
#pragma unroll
            for (int w = 0; w < WIDTH; ++w) {
              Sum& to = merged[(v * WIDTH + w) * LANES + int(threadIdx.x) % LANES];  // no two lanes in one bank
              to = turn == 0 ? sums[v][w] : to + sums[v][w];
            }
        }
        __syncthreads();
      }
      for (int e = int(threadIdx.x); e < int(p.E); e += kThreads<LANES>) {
        const int vector = e / WIDTH;
        part[e] = merged[(vector / LANES * WIDTH + e % WIDTH) * LANES + vector % LANES];
      }
      __syncthreads();
    }
  };
  finish(dweight, parts.dweight);
  finish(dbias, parts.dbias);
}

// One block handles 256 columns of a run of rows that are too long to be held: the parts of dweight and dbias.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    sum_columns(LayerNormCall p, DropoutArguments<SumOf<T>> dropout, int64_t rows_per_run, Parts<SumOf<T>> parts) {
  using Sum = SumOf<T>;
  const int64_t rows = p.B * p.N, tiles_e = tiles(p.E, kBlock), run = blockIdx.x / tiles_e;
  const int64_t e = blockIdx.x % tiles_e * kBlock + threadIdx.x, last = smaller((run + 1) * rows_per_run, rows);
  const Sum* const statistics = static_cast<const Sum*>(p.statistics);
  if (e >= p.E) return;
  Sum dweight = 0, dbias = 0;
  for (int64_t row = run * rows_per_run; row < last; ++row) {
    const LayerNormRow<T, 1, kBlock> r(p, dropout, row);
    const Sum dout = to_sum(r.load(p.dout, e).x[0]);
    Sum z[1];
    r.add(r.load(p.x, e), r.load(p.residual, e), e, z);
    dweight += dout * ((z[0] - statistics[row]) * statistics[rows + row]);
    dbias += dout;
  }
  if (parts.dweight) parts.dweight[run * p.E + e] = dweight;
  if (parts.dbias) parts.dbias[run * p.E + e] = dbias;
}

constexpr int kColumns = 32, kLanes = kBlock / kColumns;

// One block handles 32 columns of dweight or dbias, of type W: each thread adds every 8th part, and then the first row
// of threads what the others have, in their order.
template <typename Sum, typename W>
__global__ void __launch_bounds__(kBlock)
    sum_parts(Parts<Sum> parts, int64_t runs, int64_t E, void* dweight, void* dbias) {
  __shared__ Sum of_lanes[kLanes][kColumns];
  const int64_t tiles_e = tiles(E, kColumns);
  const bool of_weight = dweight && int64_t(blockIdx.x) < tiles_e;
  const Sum* const from = of_weight ? parts.dweight : parts.dbias;
  W* const result = static_cast<W*>(of_weight ? dweight : dbias);
  const int column = int(threadIdx.x) % kColumns, lane = int(threadIdx.x) / kColumns;
  const int64_t e = blockIdx.x % tiles_e * kColumns + column;
  Sum sum = 0;
  if (e < E) {
#pragma unroll 8
    for (int64_t run = lane; run < runs; run += kLanes) sum += from[run * E + e];
  }
  of_lanes[lane][column] = sum;
  __syncthreads();
  if (lane > 0 || e >= E) return;
  for (int other = 1; other < kLanes; ++other) sum += of_lanes[other][column];
  result[e] = from_sum<W>(sum);
}

int64_t rows_per_run(const LayerNormCall& p) {
  const int64_t rows = tiles(p.B * p.N, kRuns);
  return rows > kLeastRows ? rows : kLeastRows;
}

int64_t runs_of(const LayerNormCall& p) {
  return tiles(p.B * p.N, rows_per_run(p));
}

template <typename T>
bool aligned(const LayerNormOperand& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.e == 1 && (x.b | x.n) % kWidest<T> == 0;
}

// Whether all that a pass touches may be read and written 16 bytes at a time.
template <typename T>
bool wide(const LayerNormCall& p, bool backward) {
  const void* const contiguous[] = {p.weight, p.bias, p.out, p.dx, p.dresidual};
  for (const void* data : contiguous)
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) return false;
  return p.E % kWidest<T> == 0 && p.weight_e == 1 && p.bias_e == 1 && aligned<T>(p.x) && aligned<T>(p.residual) &&
         (!backward || aligned<T>(p.dout));
}

template <typename... P, typename... A>
const char* launch_kernel(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, const A&... with) {
  if (blocks > kLargestGrid) return "the grid has more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, P(with)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int WIDTH, int LANES>
const char* launch_forward(const LayerNormCall& p, cudaStream_t stream) {
  const DropoutArguments<SumOf<T>> dropout(p.seed, p.dropout_p);
  return launch_kernel(normalize<T, WIDTH, LANES>, tiles(p.B * p.N, kThreads<LANES> / LANES), kThreads<LANES>, stream,
                       p, dropout);
}

template <typename T, int WIDTH>
const char* launch_forward(const LayerNormCall& p, cudaStream_t stream) {
  if (p.E <= kCapacity<T, WIDTH, kWarp>) return launch_forward<T, WIDTH, kWarp>(p, stream);
  return launch_forward<T, WIDTH, kBlock>(p, stream);
}

template <typename T>
const char* launch_forward(const LayerNormCall& p, cudaStream_t stream) {
  return wide<T>(p, false) ? launch_forward<T, kWidest<T>>(p, stream) : launch_forward<T, 1>(p, stream);
}

// The gradients of the rows and, where these fit the registers, the parts of those of weight and bias; else only the
// parts, by another kernel.
template <typename T, int WIDTH>
const char* launch_rows_backward(const LayerNormCall& p, const Parts<SumOf<T>>& parts, cudaStream_t stream) {
  using Sum = SumOf<T>;
  const bool parameters = p.dweight || p.dbias, held = p.E <= kCapacity<T, WIDTH, kBlock>;
  const DropoutArguments<Sum> dropout(p.seed, p.dropout_p);
  if (p.dx || p.dresidual || (parameters && held)) {
    const bool warps = p.E <= kCapacity<T, WIDTH, kWarp>;
    const auto kernel = warps ? normalize_backward<T, WIDTH, kWarp> : normalize_backward<T, WIDTH, kBlock>;
    const int threads = warps ? kThreads<kWarp> : kThreads<kBlock>;
    const char* const problem =
        launch_kernel(kernel, runs_of(p), threads, stream, p, dropout, rows_per_run(p), held ? parts : Parts<Sum>{});
    if (problem) return problem;
  }
  if (!parameters || held) return nullptr;
  return launch_kernel(sum_columns<T>, runs_of(p) * tiles(p.E, kBlock), kBlock, stream, p, dropout, rows_per_run(p),
                       parts);
}

template <typename T>
const char* launch_backward(const LayerNormCall& p, SumOf<T>* workspace, cudaStream_t stream) {
  using Sum = SumOf<T>;
  const int64_t runs = runs_of(p);
  Parts<Sum> parts{};
  if (p.dweight) parts.dweight = workspace;
  if (p.dbias) parts.dbias = p.dweight ? workspace + runs * p.E : workspace;
  if (runs > 0) {
    const char* const problem = wide<T>(p, true) ? launch_rows_backward<T, kWidest<T>>(p, parts, stream)
                                                 : launch_rows_backward<T, 1>(p, parts, stream);
    if (problem) return problem;
  }
  const int64_t blocks = tiles(p.E, kColumns) * ((p.dweight != nullptr) + (p.dbias != nullptr));
  if (blocks == 0) return nullptr;
  const auto kernel = p.parameters_accumulated ? sum_parts<Sum, Sum> : sum_parts<Sum, T>;
  return launch_kernel(kernel, blocks, kBlock, stream, parts, runs, p.E, p.dweight, p.dbias);
}

}  // namespace

int64_t layer_norm_workspace_elements(const LayerNormCall& p) {
  return runs_of(p) * p.E * ((p.dweight != nullptr) + (p.dbias != nullptr));
}

const char* launch_dropout_add_layer_norm(const LayerNormCall& p, cudaStream_t stream) {
  if (p.B == 0 || p.N == 0) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch_forward<float>(p, stream);
    case Dtype::f64: return launch_forward<double>(p, stream);
    case Dtype::f16: return launch_forward<__half>(p, stream);
    default: return launch_forward<__nv_bfloat16>(p, stream);
  }
}

const char* launch_dropout_add_layer_norm_backward(const LayerNormCall& p, void* workspace, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::f32: return launch_backward<float>(p, static_cast<float*>(workspace), stream);
    case Dtype::f64: return launch_backward<double>(p, static_cast<double*>(workspace), stream);
    case Dtype::f16: return launch_backward<__half>(p, static_cast<float*>(workspace), stream);
    default: return launch_backward<__nv_bfloat16>(p, static_cast<float*>(workspace), stream);
  }
}

}  // namespace mlhead
