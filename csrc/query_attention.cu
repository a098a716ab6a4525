// Attention of queries over the positions of each image on CUDA (see query_attention.h).
//
// All four results are one kernel. A block of 256 threads handles one image, one head, a tile of rows of the result
// (queries for out and dq, positions for dk and dv) and a slice of its columns, and goes over the tiles of the other
// axis. At each it makes the scores of 64 queries by 64 positions (32 by 32 in fp64), going over the head's features in
// steps through shared memory, so that a head may have any width; turns them into weights p~ or ds in shared memory;
// and adds the product of the weights with the rows of v, k, q or dout to sums that stay in registers. No score is ever
// in global memory. Forward keeps the maximum and the sum of every row on the way (online softmax) and rescales; it
// leaves both to the gradients, which have delta = sum_e dout out from a kernel of its own, or, where one tile has all
// positions, take it from the tile. Heads wider than 96 are cut into slices, of which each makes the scores again.
//
// Scores are multiplied by 1 / sqrt(d) on their way into the exponent, and ds on its way out. Maximum and sum are kept
// for backward rather than lse = max + log sum: weights then are those of the forward and of sum 1, where the rounding
// of lse, and of the exponential of the one large weight, would be an error that ds does not cancel.
//
// dk and dv have a block each although they share the scores: with both sums in the registers of a thread there would
// be half as many blocks on a multiprocessor, and four products in one block save only one of five. dq of shared
// queries is the sum over images of chunks, each in a workspace, which a second kernel adds in a fixed order: no
// atomics, and the number of chunks hangs on the shape alone, so the same bits on every run and every GPU.
//
// fp16 and bf16 are multiplied on tensor cores; there p~ and ds are rounded to 16 bits between the two products, as
// they are in plain torch. Everything else is in fp32, and in fp64 for fp64.
//
// Not yet run on a GPU: compiled for sm_80, sm_90 and sm_100, and its logic tested on a CPU (tests/cuda_on_cpu).
#include "query_attention.h"

#include <cuda_runtime.h>

#include <cmath>

#include "cuda_attention_tiles.h"
#include "cuda_dropout.h"
#include "cuda_numbers.h"

namespace mlhead {
namespace {

constexpr int64_t kLargestGrid = 2147483647;
constexpr int64_t kLargestSize = 1 << 30;  // of every axis, so that an index and what is added to it fit an int
constexpr int64_t kDqBlocks = 1024;  // that the chunks of dq aim at: several for every multiprocessor of a large GPU

// Blocks to a multiprocessor that leave every thread the registers it needs: up to 128, and up to 255 where addresses
// or sums take more.
template <int WIDTH>
constexpr int kBlocks = WIDTH == 1 ? 1 : 2;

// One block handles one head, a tile of rows and a slice of columns of the result, and one image: for dq, all images
// of a chunk. With a workspace, dq goes there unrounded, as (chunks, G, H d).
template <typename T, AttentionResult RESULT, int WIDTH>
__global__ void __launch_bounds__(kThreads, kBlocks<WIDTH>)
    attention(AttentionCall p, DropoutArguments<SumOf<T>> dropout, int slices, int chunk_images, SumOf<T>* workspace) {
  using Sum = SumOf<T>;
  using S = AttentionShared<T, RESULT, WIDTH>;
  constexpr bool kQueries = kRowsAreQueries<RESULT>, kOut = RESULT == AttentionResult::out;
  constexpr int kTile = S::kTile;
  constexpr int kParts = kThreads / kTile;  // threads that share a query
  alignas(128) __shared__ unsigned char memory[S::kBytes];
  __shared__ Sum of_rows[kParts][kTile];  // what the threads of a row tell each other
  __shared__ bool attended[kTile];
  const S shared(memory);

  // Slices and tiles of one head of one image are neighbours, and find its k and v in the L2 cache.
  const int G = int(p.G), L = int(p.L), H = int(p.H), d = int(p.d);
  const int N = kQueries ? G : L, others = kQueries ? L : G;
  int rest = int(blockIdx.x);
  const int width = ((d + slices - 1) / slices + 15) / 16 * 16, first_e = rest % slices * width;
  rest /= slices;
  const int row_tiles = (N + kTile - 1) / kTile, row0 = rest % row_tiles * kTile;
  rest /= row_tiles;
  const int h = rest % H, chunk = rest / H;
  const int rows = least(N - row0, kTile), columns = least(d - first_e, width);

  // In the tile of scores, a thread owns every so many positions of one query, so that the threads of a warp are in
  // different banks of shared memory.
  const int lane = int(threadIdx.x) % 32;
  const int r = int(threadIdx.x) / 32 * (32 / kParts) + lane % (32 / kParts), part = lane / (32 / kParts);
  const Sum scale = Sum(p.scale);
  Sum most = -Sum(INFINITY), total = 0;  // of the row: the maximum so far, and the thread's share of the sum
  bool met = false;                      // whether the thread has met a key

  typename S::Sums sums;
  const int images = RESULT == AttentionResult::dq ? chunk_images : 1, first_b = chunk * images;
  const int b_end = RESULT == AttentionResult::dq ? least(int(p.B) - first_b, images) + first_b : first_b + 1;
#pragma unroll 1
  for (int b = first_b; b < b_end; ++b) {
    const int64_t feature = int64_t(h) * d;
#pragma unroll 1
    for (int other0 = 0; other0 < others; other0 += kTile) {
      const int g0 = kQueries ? row0 : other0, l0 = kQueries ? other0 : row0;
      const int count = least(others - other0, kTile);
      const int queries = kQueries ? rows : count, positions = kQueries ? count : rows;
      if (int(threadIdx.x) < kTile) {
        const int l = int(threadIdx.x);
        attended[l] = l < positions && (!p.key_mask || p.key_mask[int64_t(b) * p.mask_b + int64_t(l0 + l) * p.mask_l]);
      }
      dot_products<S, T>(shared, {p.q, b, g0, feature, queries}, {p.k, b, l0, feature, positions}, d, Sum(1),
                         shared.scores);
      if constexpr (kNeedsDs<RESULT>)
        dot_products<S, T>(shared, {p.dout, b, g0, feature, queries}, {p.v, b, l0, feature, positions}, d, dropout.kept,
                           shared.dweights);

      const ImageDropout<Sum> image(dropout, b);
      const Sum* const scores = shared.scores + r * S::kPitch;
      T* const weights = shared.weights + r * S::kWeightPitch;
      const uint32_t i0 = (uint32_t(h) * uint32_t(G) + uint32_t(g0 + r)) * uint32_t(L) + uint32_t(l0);
      const auto score = [&](int c) { return attended[c] ? scores[c] : -Sum(INFINITY); };
      if constexpr (kOut) {
        const Sum before = most;
#pragma unroll 4
        for (int c = part; c < kTile; c += kParts) {
          if (score(c) > most) most = score(c);
          met |= attended[c];
        }
        of_rows[part][r] = most;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kParts; ++i)
          if (of_rows[i][r] > most) most = of_rows[i][r];
        // A row without a score above -infinity yet: any number that is not infinite makes its weights 0.
        const Sum offset = most == -Sum(INFINITY) ? Sum(0) : most;
        const Sum shrink = exponential((before - offset) * scale);
        total *= shrink;
#pragma unroll 4
        for (int c = part; c < kTile; c += kParts) {
          const Sum weight = exponential((score(c) - offset) * scale);
          total += weight;
          weights[c] = from_sum<T>(image.keeps(i0 + uint32_t(c)) ? weight : Sum(0));
        }
        if (other0 > 0) {
          for (int i = part; i < S::Sums::kFactorPitch; i += kParts)
            shared.factors[r * S::Sums::kFactorPitch + i] = shrink;
          __syncthreads();
          sums.scale_rows(shared.factors);
        }
      } else {
        const bool live = r < queries;
        Sum offset = 0, inverse = 0, delta = 0;
        if (live) {
          const Sum* const kept = static_cast<const Sum*>(p.kept) + (int64_t(b) * H + h) * 2 * G + g0 + r;
          offset = kept[0], inverse = kept[G];
        }
        if constexpr (kNeedsDs<RESULT>) {
          if (sees_whole_rows(L, kTile)) {
            // The tile has all positions, and tells delta more exactly than the rounded output.
#pragma unroll 4
            for (int c = part; c < kTile; c += kParts) {
              if (live && attended[c] && image.keeps(i0 + uint32_t(c)))
                delta += exponential((scores[c] - offset) * scale) * inverse * shared.dweights[r * S::kPitch + c];
            }
            of_rows[part][r] = delta;
            __syncthreads();
            delta = of_rows[0][r];
#pragma unroll
            for (int i = 1; i < kParts; ++i) delta += of_rows[i][r];
          } else if (live) {
            delta = static_cast<const Sum*>(p.delta)[(int64_t(b) * H + h) * G + g0 + r];
          }
        }
#pragma unroll 4
        for (int c = part; c < kTile; c += kParts) {
          Sum weight = inverse - inverse;  // 0, but NaN where the query's weights are
          if (live && attended[c]) {
            weight = exponential((scores[c] - offset) * scale) * inverse;
            const bool keeps = image.keeps(i0 + uint32_t(c));
            if constexpr (kNeedsDs<RESULT>) {
              const Sum difference = (keeps ? shared.dweights[r * S::kPitch + c] : Sum(0)) - delta;
              // A weight of 1 does not change; where it is kept, the difference is what rounding has left of 0.
              weight = weight == 1 && keeps ? 0 * difference : weight * difference;
            } else if (!keeps) {
              weight *= 0;
            }
          }
          weights[c] = from_sum<T>(weight);
        }
      }

      const AttentionOperand& operand = RESULT == AttentionResult::out  ? p.v
                                        : RESULT == AttentionResult::dq ? p.k
                                        : RESULT == AttentionResult::dk ? p.q
                                                                        : p.dout;
      const AttentionRows<T> x(operand, b, other0, feature + first_e, count);
      typename S::StageX stage;
      stage.load(x.data, x.n, x.e, count, columns);
#pragma unroll 1
      for (int k = 0; k < count; k += kStep<T>) {
        __syncthreads();
        stage.store(shared.x);
        __syncthreads();
        const int next = k + kStep<T>;
        if (next < count) stage.load(x.data + int64_t(next) * x.n, x.n, x.e, count - next, columns);
        sums.step(shared.weights + (kQueries ? k : k * S::kWeightPitch), S::kWeightPitch, shared.x, S::StageX::kPitch,
                  rows, columns);
      }
    }
  }

  __syncthreads();
  if constexpr (kOut) {
    // Keys whose scores are all -infinity have no weights, as in softmax; without any key the sum is 0.
    of_rows[part][r] = met && most == -Sum(INFINITY) ? Sum(NAN) : total;
    __syncthreads();
    total = of_rows[0][r];
#pragma unroll
    for (int i = 1; i < kParts; ++i) total += of_rows[i][r];
    __syncthreads();
    if (part == 0) {
      of_rows[0][r] = total == 0 ? Sum(0) : dropout.kept / total;
      if (first_e == 0 && r < rows) {
        Sum* const kept = static_cast<Sum*>(p.kept) + (int64_t(chunk) * H + h) * 2 * G + row0 + r;
        kept[0] = total == 0 ? Sum(0) : most;
        kept[G] = total == 0 ? Sum(0) : 1 / total;
      }
    }
  }
  sums.finish(shared.sums, S::kSumPitch);
  __syncthreads();
  const Sum factor = RESULT == AttentionResult::dv ? dropout.kept : scale;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * kSlice; i += kThreads) {
    const int m = i / kSlice, c = i % kSlice;
    if (c >= columns) continue;
    const Sum sum = shared.sums[m * S::kSumPitch + c] * (kOut ? of_rows[0][m] : factor);
    const int64_t at = ((int64_t(chunk) * N + row0 + m) * H + h) * d + first_e + c;
    if (RESULT == AttentionResult::dq && workspace)
      workspace[at] = sum;
    else
      static_cast<T*>(p.result)[at] = from_sum<T>(sum);
  }
}

// One thread handles one row: delta[b, h, g] = sum_e dout[b, g, e] out[b, g, e] over head h.
template <typename T>
__global__ void __launch_bounds__(256) row_products(AttentionCall p) {
  // Neighbouring threads have neighbouring heads, whose features follow each other in memory.
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.B * p.G * p.H) return;
  const int64_t h = i % p.H, g = i / p.H % p.G, b = i / p.H / p.G;
  const AttentionRows<T> x(p.dout, b, g, h * p.d, 1), y(p.out, b, g, h * p.d, 1);
  SumOf<T> sum = 0;
#pragma unroll 8
  for (int64_t e = 0; e < p.d; ++e) sum += to_sum(x.data[e * x.e]) * to_sum(y.data[e * y.e]);
  static_cast<SumOf<T>*>(p.delta)[(b * p.H + h) * p.G + g] = sum;
}

// One thread handles one element of dq: the sums of all chunks, in their order.
template <typename T>
__global__ void __launch_bounds__(256) add_chunks(const SumOf<T>* workspace, int64_t chunks, int64_t elements, T* dq) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= elements) return;
  SumOf<T> sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += workspace[chunk * elements + i];
  dq[i] = from_sum<T>(sum);
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

int64_t slices_of(const AttentionCall& p) {
  return tiles(p.d, kSlice);
}

int side_of(Dtype dtype) {
  return dtype == Dtype::f64 ? kSide<double> : kSide<float>;
}

// Whether the rows of every head of an operand may be read in vectors of WIDTH, which divides d.
template <typename T, int WIDTH>
bool aligned(const AttentionOperand& x) {
  return x.e == 1 && (x.b | x.n) % WIDTH == 0 && reinterpret_cast<uintptr_t>(x.data) % (sizeof(T) * WIDTH) == 0;
}

template <typename T, AttentionResult RESULT>
const char* launch(const AttentionCall& p, int64_t chunks, void* workspace, cudaStream_t stream) {
  constexpr int width = sizeof(T) == 8 ? 1 : 16 / int(sizeof(T));
  const bool wide = width > 1 && p.d % width == 0 && aligned<T, width>(p.q) && aligned<T, width>(p.k) &&
                    aligned<T, width>(p.v) && (RESULT == AttentionResult::out || aligned<T, width>(p.dout));
  const auto kernel = wide ? attention<T, RESULT, width> : attention<T, RESULT, 1>;
  const int64_t N = kRowsAreQueries<RESULT> ? p.G : p.L, slices = slices_of(p);
  for (const int64_t size : {p.B, p.G, p.L, p.H, p.d})
    if (size > kLargestSize) return "there are more than 2^30 images, queries, positions, heads or features of a head";
  const int64_t blocks = chunks * p.H * tiles(N, kSide<T>) * slices;
  const int64_t chunk_images = RESULT == AttentionResult::dq && p.shared ? tiles(p.B, chunks) : 1;
  SumOf<T>* const sums = static_cast<SumOf<T>*>(workspace);
  const DropoutArguments<SumOf<T>> dropout(p.seed, p.dropout_p);
  const char* problem = start(kernel, blocks, kThreads, stream, p, dropout, slices, chunk_images, sums);
  if (problem || !workspace) return problem;
  const int64_t elements = p.G * p.H * p.d;
  return start(add_chunks<T>, tiles(elements, 256), 256, stream, sums, chunks, elements, static_cast<T*>(p.result));
}

template <AttentionResult RESULT>
const char* launch_dtype(const AttentionCall& p, int64_t chunks, void* workspace, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::f32: return launch<float, RESULT>(p, chunks, workspace, stream);
    case Dtype::f64: return launch<double, RESULT>(p, chunks, workspace, stream);
    case Dtype::f16: return launch<__half, RESULT>(p, chunks, workspace, stream);
    default: return launch<__nv_bfloat16, RESULT>(p, chunks, workspace, stream);
  }
}

template <typename T>
const char* launch_delta(const AttentionCall& p, cudaStream_t stream) {
  return start(row_products<T>, tiles(p.B * p.G * p.H, 256), 256, stream, p);
}

}  // namespace

int64_t dq_chunks(const AttentionCall& p) {
  if (!p.shared) return p.B;
  const int64_t blocks = p.H * tiles(p.G, side_of(p.dtype)) * slices_of(p);
  if (p.B <= 1 || blocks == 0) return 1;
  // No chunk is empty.
  return tiles(p.B, tiles(p.B, tiles(kDqBlocks, blocks)));
}

int64_t dq_workspace_elements(const AttentionCall& p, int64_t chunks) {
  return p.shared && chunks > 1 ? chunks * p.G * p.H * p.d : 0;
}

const char* launch_query_attention(const AttentionCall& p, cudaStream_t stream) {
  if (p.B == 0 || p.G == 0) return nullptr;
  return launch_dtype<AttentionResult::out>(p, p.B, nullptr, stream);
}

const char* launch_query_attention_delta(const AttentionCall& p, cudaStream_t stream) {
  if (p.B == 0 || p.G == 0 || sees_whole_rows(p.L, side_of(p.dtype))) return nullptr;
  switch (p.dtype) {
    case Dtype::f32: return launch_delta<float>(p, stream);
    case Dtype::f64: return launch_delta<double>(p, stream);
    case Dtype::f16: return launch_delta<__half>(p, stream);
    default: return launch_delta<__nv_bfloat16>(p, stream);
  }
}

const char* launch_query_attention_dq(const AttentionCall& p, int64_t chunks, void* workspace, cudaStream_t stream) {
  if (p.G == 0 || chunks == 0) return nullptr;
  return launch_dtype<AttentionResult::dq>(p, chunks, workspace, stream);
}

const char* launch_query_attention_dk(const AttentionCall& p, cudaStream_t stream) {
  if (p.B == 0) return nullptr;
  return launch_dtype<AttentionResult::dk>(p, p.B, nullptr, stream);
}

const char* launch_query_attention_dv(const AttentionCall& p, cudaStream_t stream) {
  if (p.B == 0) return nullptr;
  return launch_dtype<AttentionResult::dv>(p, p.B, nullptr, stream);
}

}  // namespace mlhead
