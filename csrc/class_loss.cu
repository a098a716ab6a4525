// Losses of a block of raw logits on CUDA, and their gradient in place (see class_loss.h).
//
// A block of 128 threads handles one image and a run of its logits (g, n), 512 at a time: each thread has four, 128
// apart, all loaded before the first is used, so that a warp reads neighbouring numbers, also where groups are short.
// Where a thread is in (g, n) is carried from one logit to the next without a division. Loss and gradient come from
// one read of z, which the gradient overwrites. The loss is summed in every thread and then across them, always in the
// same order; where images are too few to fill the device their logits are split, and a second launch adds the parts in
// their order: no atomics, the same bits in every run.
//
// Sparse targets of 512 logits are found by two binary searches and written to shared memory. The softmax goes over the
// logits twice: for its statistics, with one exponential to a logit, and for its gradient.
//
// All arithmetic is in fp32, fp64 for fp64. Comparisons are written so that NaN fails them and passes into the results.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, and its logic tested on a CPU (tests/cuda_on_cpu).
#include "class_loss.h"

#include <cuda_runtime.h>

#include <cmath>

#include "cuda_class_loss.h"
#include "cuda_numbers.h"

namespace mlhead {
namespace {

constexpr int kThreads = 128;
constexpr int kEach = 4;  // logits that a thread has under way at once
constexpr int kTile = kThreads * kEach;
constexpr int64_t kLargestGrid = 2147483647;
// Blocks to a multiprocessor that leave every thread the registers it needs: up to 80, and up to 128 for fp64.
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 4 : 6;

__device__ inline int64_t first_at_least(const int64_t* targets, int64_t begin, int64_t end, int64_t c) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (targets[middle] < c)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The run of logits of one block of threads, and where this thread is in it.
template <typename T>
struct Run {
  using Sum = SumOf<T>;
  const LossBlock& p;
  Sum* const sparse;  // kTile numbers in shared memory
  int64_t b, begin, end;
  int64_t i, j;              // of the thread's next logit
  int64_t step_i, step_j;    // to the one after it
  int64_t from = 0, to = 0;  // the row's sparse targets

  __device__ Run(const LossBlock& p_, Sum* sparse_) : p(p_), sparse(sparse_) {
    b = blockIdx.x / p.splits;
    const int64_t logits = p.G * p.N, part = tiles(tiles(logits, kTile), p.splits) * kTile;
    begin = blockIdx.x % p.splits * part;
    end = smaller(begin + part, logits);
    i = (begin + threadIdx.x) / p.N, j = (begin + threadIdx.x) - i * p.N;
    step_i = kThreads / p.N, step_j = kThreads - step_i * p.N;
    if (p.offsets) from = p.offsets[b], to = p.offsets[b + 1];
  }

  __device__ int64_t class_of(int64_t e) const { return p.first + e / p.N * p.group_classes + e % p.N; }

  // Fills shared memory with the targets of the logits from e on. A thread's own logits are its alone to clear and
  // read.
  __device__ void find_sparse(int64_t e) const {
#pragma unroll
    for (int v = 0; v < kEach; ++v) sparse[threadIdx.x + v * kThreads] = 0;
    __syncthreads();
    const int64_t* const targets = static_cast<const int64_t*>(p.targets);
    const int64_t last = smaller(e + kTile, end) - 1;
    const int64_t first = first_at_least(targets, from, to, class_of(e));
    const int64_t beyond = first_at_least(targets, first, to, class_of(last) + 1);
    for (int64_t k = first + threadIdx.x; k < beyond; k += kThreads) {
      const int64_t c = targets[k] - p.first, group = c / p.group_classes, column = c - group * p.group_classes;
      if (column >= p.N) continue;                                   // in another block
      if (k + 1 < beyond && targets[k + 1] == targets[k]) continue;  // the last of several counts
      sparse[group * p.N + column - e] = p.values ? static_cast<const Sum*>(p.values)[k] : Sum(1);
    }
    __syncthreads();
  }

  __device__ Sum bias(int64_t c) const {
    const int64_t at = c * p.bias_c;
    switch (p.bias_dtype) {
      case Dtype::f32: return Sum(static_cast<const float*>(p.bias)[at]);
      case Dtype::f64: return Sum(static_cast<const double*>(p.bias)[at]);
      case Dtype::f16: return Sum(to_sum(static_cast<const __half*>(p.bias)[at]));
      default: return Sum(to_sum(static_cast<const __nv_bfloat16*>(p.bias)[at]));
    }
  }

  __device__ Sum dense(int64_t c) const {
    const int64_t at = b * p.t_b + c * p.t_c;
    switch (p.target) {
      case LossTarget::i8: return Sum(static_cast<const int8_t*>(p.targets)[at]);
      case LossTarget::f32: return Sum(static_cast<const float*>(p.targets)[at]);
      case LossTarget::f64: return Sum(static_cast<const double*>(p.targets)[at]);
      case LossTarget::f16: return Sum(to_sum(static_cast<const __half*>(p.targets)[at]));
      default: return Sum(to_sum(static_cast<const __nv_bfloat16*>(p.targets)[at]));
    }
  }

  __device__ T* at(int64_t group, int64_t column) const {
    return static_cast<T*>(p.z) + b * p.z_b + group * p.z_g + column;
  }
  __device__ void advance(int64_t& group, int64_t& column) const {
    group += step_i, column += step_j;
    if (column >= p.N) ++group, column -= p.N;
  }

  // f(at, c, z, y) for every logit of the thread that exists, `at` being its place; missing(at) for every other.
  template <typename F, typename M>
  __device__ void for_each_logit(const F& f, const M& missing) {
    for (int64_t e = begin; e < end; e += kTile) {
      if (p.offsets) find_sparse(e);
      T held[kEach];
      int64_t group = i, column = j;  // of the next load; where each logit was is found again when it is used
#pragma unroll
      for (int v = 0; v < kEach; ++v) {
        if (e + threadIdx.x + v * kThreads < end) held[v] = *at(group, column);
        advance(group, column);
      }
#pragma unroll
      for (int v = 0; v < kEach; ++v, advance(i, j)) {
        if (e + threadIdx.x + v * kThreads >= end) break;
        const int64_t c = p.first + i * p.group_classes + j;
        if (c >= p.num_classes) {
          missing(at(i, j));
          continue;
        }
        Sum z = to_sum(held[v]);
        if (p.bias) z += bias(c);
        f(at(i, j), c, z, p.offsets ? sparse[threadIdx.x + v * kThreads] : dense(c));
      }
    }
  }
};

template <typename Sum>
__device__ Sum weight_of(const void* weights, int64_t at) {
  return weights ? static_cast<const Sum*>(weights)[at] : Sum(1);
}

// One block handles a run of one image's logits.
template <typename T, Loss LOSS>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) class_loss_gradient(LossBlock p, OptionsOf<SumOf<T>> o) {
  using Sum = SumOf<T>;
  __shared__ Sum sparse[kTile];
  Run<T> run(p, sparse);
  const Sum image = weight_of<Sum>(p.sample_weight, run.b * p.sample_b);
  const Sum scale = o.factor * weight_of<Sum>(p.dout, 0) * image;
  Sum sum = 0, top = 0, log_sum = 0, total = 0;
  if constexpr (LOSS == Loss::softmax) {
    const Sum* const statistics = static_cast<const Sum*>(p.statistics) + 4 * run.b;
    top = statistics[0], log_sum = log_of(statistics[1]), total = statistics[3];
  }
  run.for_each_logit(
      [&](T* at, int64_t c, Sum z, Sum y) {
        const Sum weight = weight_of<Sum>(p.class_weight, c);
        LossElement<Sum> element{0, 0};
        if constexpr (LOSS == Loss::softmax) {
          element.dz = total * exp_of(z - top - log_sum) - weight * (y * o.keep + o.smooth);
        } else if (y >= 0) {
          if constexpr (LOSS == Loss::bce)
            element = bce(z, y * o.keep + o.smooth, weight_of<Sum>(p.pos_weight, c));
          else
            element = asl(z, y, o, p.detach_focal);
          sum += element.loss * weight;
          element.dz *= weight;
        }
        if (p.need_dz) *at = from_sum<T>(element.dz * scale);
      },
      [&](T* at) {
        if (p.need_dz) *at = from_sum<T>(Sum(0));
      });
  if (LOSS == Loss::softmax || !p.row_loss) return;
  __shared__ Sum sums[kThreads];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x > 0) return;
  if (p.parts)
    static_cast<Sum*>(p.parts)[blockIdx.x] = sums[0] * image;
  else
    static_cast<Sum*>(p.row_loss)[run.b] += sums[0] * image;
}

// One block handles a run of one image's logits.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) class_loss_statistics(LossBlock p, OptionsOf<SumOf<T>> o) {
  using Sum = SumOf<T>;
  __shared__ Sum sparse[kTile];
  __shared__ LossStatistics<Sum> found[kThreads];
  Run<T> run(p, sparse);
  LossStatistics<Sum> own{-Sum(INFINITY), 0, 0, 0};
  run.for_each_logit(
      [&](T*, int64_t c, Sum z, Sum y) {
        const Sum v = weight_of<Sum>(p.class_weight, c) * (y * o.keep + o.smooth);
        own.score += v * z;
        own.total += v;
        // One exponential, since either the logit or the maximum is the larger; equal infinities have no difference.
        const Sum e = z == -Sum(INFINITY) ? Sum(0) : z == own.top ? Sum(1) : exp_of(-magnitude(z - own.top));
        const bool above = z > own.top;
        own.sum = above ? own.sum * e + 1 : own.sum + e;
        own.top = above ? z : own.top;
      },
      [](T*) {});
  found[threadIdx.x] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) found[threadIdx.x].merge(found[threadIdx.x + half]);
  }
  if (threadIdx.x > 0) return;
  if (p.parts)
    static_cast<LossStatistics<Sum>*>(p.parts)[blockIdx.x] = found[0];
  else
    static_cast<LossStatistics<Sum>*>(p.statistics)[run.b].merge(found[0]);
}

// One thread adds the parts of one image to its loss, or merges them into its statistics.
template <typename Sum>
__global__ void __launch_bounds__(kThreads) class_loss_parts(LossBlock p, bool statistics) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.B) return;
  if (statistics) {
    const LossStatistics<Sum>* const parts = static_cast<const LossStatistics<Sum>*>(p.parts) + b * p.splits;
    LossStatistics<Sum> all = parts[0];
    for (int64_t split = 1; split < p.splits; ++split) all.merge(parts[split]);
    static_cast<LossStatistics<Sum>*>(p.statistics)[b].merge(all);
  } else {
    const Sum* const parts = static_cast<const Sum*>(p.parts) + b * p.splits;
    Sum all = 0;
    for (int64_t split = 0; split < p.splits; ++split) all += parts[split];
    static_cast<Sum*>(p.row_loss)[b] += all;
  }
}

// One block handles every `step`-th run of kTile numbers, or none where the factor is 1.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_by(T* x, int64_t numel, const SumOf<T>* factor, int64_t step) {
  const SumOf<T> by = *factor;
  if (by == 1) return;
  for (int64_t first = int64_t(blockIdx.x) * kTile + threadIdx.x; first < numel; first += step) {
    T held[kEach];
#pragma unroll
    for (int v = 0; v < kEach; ++v)
      if (first + v * kThreads < numel) held[v] = x[first + v * kThreads];
#pragma unroll
    for (int v = 0; v < kEach; ++v)
      if (first + v * kThreads < numel) x[first + v * kThreads] = from_sum<T>(to_sum(held[v]) * by);
  }
}

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), int64_t blocks, cudaStream_t stream, A... arguments) {
  if (blocks > kLargestGrid) return "the grid has more than 2^31 - 1 blocks";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(kThreads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch_gradient(const LossBlock& p, cudaStream_t stream) {
  const auto kernel = p.loss == Loss::bce   ? class_loss_gradient<T, Loss::bce>
                      : p.loss == Loss::asl ? class_loss_gradient<T, Loss::asl>
                                            : class_loss_gradient<T, Loss::softmax>;
  const char* const problem = launch(kernel, p.B * p.splits, stream, p, OptionsOf<SumOf<T>>(p));
  if (problem || p.loss == Loss::softmax || !p.row_loss || !p.parts) return problem;
  return launch(class_loss_parts<SumOf<T>>, tiles(p.B, kThreads), stream, p, false);
}

template <typename T>
const char* launch_statistics(const LossBlock& p, cudaStream_t stream) {
  const char* const problem = launch(class_loss_statistics<T>, p.B * p.splits, stream, p, OptionsOf<SumOf<T>>(p));
  if (problem || !p.parts) return problem;
  return launch(class_loss_parts<SumOf<T>>, tiles(p.B, kThreads), stream, p, true);
}

template <typename T>
const char* launch_scale(void* x, int64_t numel, const void* factor, int multiprocessors, cudaStream_t stream) {
  const int64_t blocks = smaller(tiles(numel, kTile), 16 * int64_t(multiprocessors));
  return launch(scale_by<T>, blocks, stream, static_cast<T*>(x), numel, static_cast<const SumOf<T>*>(factor),
                blocks * kTile);
}

bool nothing(const LossBlock& p) {
  return p.G == 0 || p.B == 0 || p.N == 0;
}

// With one group nothing is a group apart.
LossBlock divisible(LossBlock p) {
  if (p.G == 1) p.group_classes = p.num_classes > 0 ? p.num_classes : 1;
  return p;
}

}  // namespace

int64_t loss_splits(const LossBlock& p, int multiprocessors) {
  if (nothing(p)) return 1;
  const int64_t all = tiles(p.G * p.N, kTile), wanted = 16 * int64_t(multiprocessors) / p.B;
  const int64_t splits = wanted < 1 ? 1 : smaller(wanted, all);
  return tiles(all, tiles(all, splits));
}

const char* launch_class_loss_gradient(const LossBlock& p, cudaStream_t stream) {
  if (nothing(p) || (!p.need_dz && !p.row_loss)) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch_gradient<float>(divisible(p), stream);
    case Dtype::f64: return launch_gradient<double>(divisible(p), stream);
    case Dtype::f16: return launch_gradient<__half>(divisible(p), stream);
    default: return launch_gradient<__nv_bfloat16>(divisible(p), stream);
  }
}

const char* launch_class_loss_statistics(const LossBlock& p, cudaStream_t stream) {
  if (nothing(p)) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch_statistics<float>(divisible(p), stream);
    case Dtype::f64: return launch_statistics<double>(divisible(p), stream);
    case Dtype::f16: return launch_statistics<__half>(divisible(p), stream);
    default: return launch_statistics<__nv_bfloat16>(divisible(p), stream);
  }
}

const char* launch_scale_by(Dtype dtype, void* x, int64_t numel, const void* factor, int multiprocessors,
                            cudaStream_t stream) {
  if (numel == 0) return nullptr;
  switch (dtype) {
    case Dtype::f32: return launch_scale<float>(x, numel, factor, multiprocessors, stream);
    case Dtype::f64: return launch_scale<double>(x, numel, factor, multiprocessors, stream);
    case Dtype::f16: return launch_scale<__half>(x, numel, factor, multiprocessors, stream);
    default: return launch_scale<__nv_bfloat16>(x, numel, factor, multiprocessors, stream);
  }
}

}  // namespace mlhead
