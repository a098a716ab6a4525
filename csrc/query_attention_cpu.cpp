// query_attention on a CPU, and the schemas of its private ops.
//
//     out[b,g,:] = concat_h drop(softmax_l(q_h[g] . k_h[b,l] / sqrt(d))) v_h[b,l]
//
// One thread takes one head of one image (backward: of a few images) at a time and keeps its scores in its own caches;
// q, k, v and dout are read where they lie. Queries shared by the batch are transposed once. The arithmetic
// is in attention_kernels.h.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "pages.h"
#include "query_attention_checks.h"

namespace mlhead {
namespace {

constexpr int64_t kMostQueries = 128;         // of a block
constexpr int64_t kFewestQueries = 24;        // three registers of AVX2: narrower products are bound by their loads
constexpr int64_t kForwardScores = 48 << 10;  // scores that forward keeps: 192 KiB in fp32, a share of L2
constexpr int64_t kWantedItems = 64;  // backward, enough for any number of cores that a batch of this size can use

int64_t forward_block(int64_t L) {
  return std::clamp(kForwardScores / L, kFewestQueries, kMostQueries);
}

Matrix head_of(const Strided& x, int64_t b, int64_t h, const QueryAttention& p) {
  const char* at = static_cast<const char*>(x.data) + (b * x.b + h * p.d * x.e) * element_size(p.dtype);
  return {at, x.n, x.e};
}

int64_t sum_size(const QueryAttention& p) {
  return p.dtype == Dtype::f64 ? 8 : 4;
}

// What both directions have in common.
AttentionTask task_of(const QueryAttention& p, int64_t b, int64_t h, int64_t most_queries) {
  AttentionTask t{};
  t.G = p.G, t.L = p.L, t.d = p.d;
  t.scale = p.scale;
  t.q = head_of(p.q, b, h, p), t.k = head_of(p.k, b, h, p), t.v = head_of(p.v, b, h, p);
  t.mask = p.key_mask ? p.key_mask + b * p.mask_b : nullptr;
  t.mask_l = p.mask_l;
  t.dropout = dropout_of_image(p.seed, p.dropout_p, b);
  t.first_query = uint32_t(h * p.G);
  t.most_queries = most_queries;
  return t;
}

// Shared queries, transposed once for all images; empty for queries of each image.
struct SharedQueries {
  int64_t bytes = 0;  // of a head
  Tensor packed;

  SharedQueries(const QueryAttention& p, const Tensor& like, int64_t most_queries)
      : packed(empty_accumulated(like, {0})) {
    if (!p.shared) return;
    const Kernels& k = kernels();
    bytes = k.packed_bytes[int(p.dtype)](p.G, p.d, most_queries);
    packed = empty_accumulated(like, {p.H * bytes / sum_size(p)});
    torch::stable::parallel_for(0, p.H, 1 + (1 << 15) / (p.G * p.d), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        k.pack_queries[int(p.dtype)](task_of(p, 0, h, most_queries), const_cast<void*>(of_head(h)));
    });
  }
  const void* of_head(int64_t h) const {
    return bytes ? static_cast<const char*>(packed.const_data_ptr()) + h * bytes : nullptr;
  }
};

// Runs f over items, on torch's own threads where they are worth it.
template <typename F>
void for_each_item(int64_t items, double multiply_adds_of_item, const F& f) {
  constexpr double worth_a_thread = 1 << 18;  // 20 us or so
  const int64_t grain = 1 + int64_t(worth_a_thread / std::max(1.0, multiply_adds_of_item));
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  };
  if (items <= grain) return range(0, items);
  torch::stable::parallel_for(0, items, grain, range);
}

std::tuple<Tensor, Tensor> query_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const std::optional<Tensor>& key_mask, const std::optional<Tensor>& seed,
                                               int64_t num_heads, double dropout_p) {
  const QueryAttention p("query_attention", q, k, v, key_mask, seed, num_heads, dropout_p);
  const Tensor out = output_like(q, {p.B, p.G, p.E}), kept = empty_accumulated(q, {p.B, p.H, 2, p.G});
  if (p.B == 0 || p.G == 0) return {out, kept};
  char* to = static_cast<char*>(out.mutable_data_ptr());
  char* kept_at = static_cast<char*>(kept.mutable_data_ptr());
  const int64_t most = forward_block(p.L), blocks = QueryBlocks(p.G, most).count;
  const SharedQueries shared(p, q, most);
  const auto run = kernels().attend_forward[int(p.dtype)];
  for_each_item(p.B * p.H * blocks, 2.0 * double(p.G) / double(blocks) * double(p.L) * double(p.d), [&](int64_t item) {
    const int64_t b = item / blocks / p.H, h = item / blocks % p.H;
    AttentionTask t = task_of(p, b, h, most);
    t.packed = shared.of_head(h);
    t.block = item % blocks;
    t.out = to + (b * p.G * p.E + h * p.d) * element_size(p.dtype);
    t.out_g = p.E;
    t.kept = kept_at + (b * p.H + h) * 2 * p.G * sum_size(p);
    run(t);
  });
  return {out, kept};
}

// dq (images or 1, G, E) = the sums over the parts (parts, G, E), in the order of the parts.
template <typename S, typename T>
void add_parts(const T* parts, int64_t count, int64_t size, S* dq) {
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T sum = parts[i];
      for (int64_t part = 1; part < count; ++part) sum += parts[part * size + i];
      store_scalar(dq + i, sum);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> query_attention_backward_cpu(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                                const Tensor& v, const std::optional<Tensor>& key_mask,
                                                                const std::optional<Tensor>& seed, int64_t num_heads,
                                                                double dropout_p, const Tensor& out, const Tensor& kept,
                                                                bool need_dq, bool need_dk, bool need_dv) {
  const QueryAttention p("query_attention_backward", q, k, v, key_mask, seed, num_heads, dropout_p);
  const Strided upstream = p.checked_output("dout", dout, q), kept_out = p.checked_output("out", out, q);
  char* kept_at = static_cast<char*>(const_cast<void*>(p.checked_kept(kept, q, {p.B, p.H, 2, p.G})));  // only read
  const Tensor dq = output_like(q, need_dq ? p.shape_of_q() : Shape{0});
  const Tensor dk = output_like(q, need_dk ? Shape{p.B, p.L, p.E} : Shape{0});
  const Tensor dv = output_like(q, need_dv ? Shape{p.B, p.L, p.E} : Shape{0});
  const int64_t size = element_size(p.dtype);
  if (p.B == 0 || p.G == 0) {  // sums over nothing
    for (const Tensor& t : {dq, dk, dv}) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel() * size));
    return {dq, dk, dv};
  }

  // Shared queries: images are taken in runs, each with a sum of its own, whose number depends on the shape alone.
  const int64_t parts = p.shared ? std::min(p.B, (kWantedItems + p.H - 1) / p.H) : p.B;
  const Tensor sums = empty_accumulated(q, {need_dq ? parts * p.G * p.E : 0});
  const SharedQueries shared(p, q, kMostQueries);
  const auto run = kernels().attend_backward[int(p.dtype)];
  const auto at = [&](const Tensor& t, int64_t b, int64_t h) {
    return static_cast<char*>(t.mutable_data_ptr()) + (b * p.L * p.E + h * p.d) * size;
  };
  const double work = 5.0 * double(p.G) * double(p.L) * double(p.d) * double(p.B) / double(parts);
  for_each_item(parts * p.H, work, [&](int64_t item) {
    const int64_t part = item / p.H, h = item % p.H;
    const int64_t first = part * p.B / parts, last = (part + 1) * p.B / parts;
    for (int64_t b = first; b < last; ++b) {
      AttentionTask t = task_of(p, b, h, kMostQueries);
      t.packed = shared.of_head(h);
      t.dout = head_of(upstream, b, h, p), t.kept_out = head_of(kept_out, b, h, p);
      t.kept = kept_at + (b * p.H + h) * 2 * p.G * sum_size(p);
      t.dk = need_dk ? at(dk, b, h) : nullptr;
      t.dv = need_dv ? at(dv, b, h) : nullptr;
      t.dk_l = p.E;
      if (need_dq) t.dq = static_cast<char*>(sums.mutable_data_ptr()) + (part * p.G * p.E + h * p.d) * sum_size(p);
      t.dq_g = p.E;
      t.add_to_dq = b > first;
      run(t);
    }
  });
  if (need_dq) {
    const int64_t count = p.shared ? parts : 1, numbers = p.shared ? p.G * p.E : p.B * p.G * p.E;
    void* to = dq.mutable_data_ptr();
    const void* from = sums.const_data_ptr();
    const float* f = static_cast<const float*>(from);
    switch (p.dtype) {
      case Dtype::f32: add_parts(f, count, numbers, static_cast<float*>(to)); break;
      case Dtype::f64: add_parts(static_cast<const double*>(from), count, numbers, static_cast<double*>(to)); break;
      case Dtype::f16: add_parts(f, count, numbers, static_cast<Half*>(to)); break;
      case Dtype::bf16: add_parts(f, count, numbers, static_cast<BFloat16*>(to)); break;
    }
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace mlhead

// The only place where the schemas are written; the CUDA library adds implementations to them.
STABLE_TORCH_LIBRARY_FRAGMENT(mlhead_C, m) {
  m.def(
      "query_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, int num_heads, float dropout_p) "
      "-> (Tensor, Tensor)");
  m.def(
      "query_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? seed, "
      "int num_heads, float dropout_p, Tensor out, Tensor kept, bool need_dq, bool need_dk, bool need_dv) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CPU, m) {
  m.impl("query_attention", TORCH_BOX(&mlhead::query_attention_cpu));
  m.impl("query_attention_backward", TORCH_BOX(&mlhead::query_attention_backward_cpu));
}
