// The CUDA kernels of query_attention behind raw pointers: this header and query_attention.cu know nothing of torch.
//
// With s[b, h, g, l] = q_h[g] . k_h[b, l], -inf where a key is masked, p = softmax_l(s / sqrt(d)), p~ the weights after
// dropout, delta[b, h, g] = sum_e dout out over head h and ds = p (dropout'(dout v^T) - delta), each result is a
// product of weights with rows of another tensor:
//
//     out[b, g]  = sum_l p~ v[b, l]
//     dv[b, l]   = sum_g p~ dout[b, g]
//     dk[b, l]   = sum_g ds q[g] / sqrt(d)
//     dq[g]      = sum_l ds k[b, l] / sqrt(d)      summed over the images too where all share the queries
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtypes.h"

namespace mlhead {

enum class AttentionResult { out, dq, dk, dv };

// A tensor of three axes (image, query or position, feature). Strides are in elements, any but negative.
struct AttentionOperand {
  const void* data;
  int64_t b, n, e;
};

// One call. Head h owns the features h d to (h + 1) d - 1; `Sum` below is fp32, and fp64 for fp64.
struct AttentionCall {
  Dtype dtype;
  bool shared;  // dq is summed over the images: q has one (G, E) for all of them, with q.b = 0
  int64_t B, G, L, H, d;
  AttentionOperand q, k, v;
  AttentionOperand dout, out;  // backward
  const bool* key_mask;        // (B, L), true where a key may be attended; or null
  int64_t mask_b, mask_l;
  const int64_t* seed;  // in device memory; null without dropout
  double dropout_p;
  double scale;  // 1 / sqrt(d)
  void* kept;    // Sum (B, H, 2, G), contiguous: max_l s and 1 / sum_l exp((s - max) / sqrt(d)), both 0 without a key;
                 // written by forward, read by backward
  void* delta;   // Sum (B, H, G), contiguous: written by the delta kernel if L is large, read by dq and dk
  void* result;  // out or dq, dk, dv: of the dtype, contiguous
};

// Into how many chunks the images of dq are cut, a function of shape and dtype alone: each chunk of shared queries is
// summed by blocks of its own. Per-image queries have B.
int64_t dq_chunks(const AttentionCall& p);

// Elements of Sum that dq needs as a workspace.
int64_t dq_workspace_elements(const AttentionCall& p, int64_t chunks);

// Each returns null, or what went wrong. Nothing is launched where the result has no elements.
const char* launch_query_attention(const AttentionCall& p, cudaStream_t stream);
const char* launch_query_attention_delta(const AttentionCall& p, cudaStream_t stream);
const char* launch_query_attention_dq(const AttentionCall& p, int64_t chunks, void* workspace, cudaStream_t stream);
const char* launch_query_attention_dk(const AttentionCall& p, cudaStream_t stream);
const char* launch_query_attention_dv(const AttentionCall& p, cudaStream_t stream);

}  // namespace mlhead
