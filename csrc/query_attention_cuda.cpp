// The CUDA form of query_attention: checks, outputs and workspaces on the stable ABI; the kernels are in
// query_attention.cu.
#include "query_attention.h"

#include "cuda_device.h"
#include "query_attention_checks.h"

namespace mlhead {
namespace {

AttentionOperand operand_of(const Strided& x) {
  return {x.data, x.b, x.n, x.e};
}

AttentionCall call_of(const QueryAttention& a) {
  AttentionCall p{};
  p.dtype = a.dtype, p.shared = a.shared;
  p.B = a.B, p.G = a.G, p.L = a.L, p.H = a.H, p.d = a.d;
  p.q = operand_of(a.q), p.k = operand_of(a.k), p.v = operand_of(a.v);
  p.key_mask = a.key_mask, p.mask_b = a.mask_b, p.mask_l = a.mask_l;
  p.seed = a.seed, p.dropout_p = a.dropout_p;
  p.scale = a.scale;
  return p;
}

std::tuple<Tensor, Tensor> query_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& key_mask,
                                                const std::optional<Tensor>& seed, int64_t num_heads,
                                                double dropout_p) {
  const QueryAttention a("query_attention", q, k, v, key_mask, seed, num_heads, dropout_p);
  const Device device(q);
  const Tensor out = empty_like_h(q, {a.B, a.G, a.E}), kept = empty_accumulated(q, {a.B, a.H, 2, a.G});
  AttentionCall p = call_of(a);
  p.kept = kept.mutable_data_ptr(), p.result = out.mutable_data_ptr();
  check_launch(a.where, launch_query_attention(p, device.stream()));
  return {out, kept};
}

std::tuple<Tensor, Tensor, Tensor> query_attention_backward_cuda(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                                 const Tensor& v, const std::optional<Tensor>& key_mask,
                                                                 const std::optional<Tensor>& seed, int64_t num_heads,
                                                                 double dropout_p, const Tensor& out,
                                                                 const Tensor& kept, bool need_dq, bool need_dk,
                                                                 bool need_dv) {
  const QueryAttention a("query_attention_backward", q, k, v, key_mask, seed, num_heads, dropout_p);
  AttentionCall p = call_of(a);
  p.dout = operand_of(a.checked_output("dout", dout, q));
  p.out = operand_of(a.checked_output("out", out, q));
  p.kept = const_cast<void*>(a.checked_kept(kept, q, {a.B, a.H, 2, a.G}));  // backward only reads it
  const Device device(q);

  // Workspaces go back to torch's allocator, which keeps them until the stream has passed this point.
  const bool need_ds = need_dq || need_dk;
  const Tensor delta = empty_accumulated(q, need_ds ? Shape{a.B, a.H, a.G} : Shape{0});
  if (need_ds) {
    p.delta = delta.mutable_data_ptr();
    check_launch(a.where, launch_query_attention_delta(p, device.stream()));
  }
  const Tensor dq = empty_like_h(q, need_dq ? a.shape_of_q() : Shape{0});
  if (need_dq) {
    p.result = dq.mutable_data_ptr();
    const int64_t chunks = dq_chunks(p), elements = dq_workspace_elements(p, chunks);
    const Tensor workspace = empty_accumulated(q, {elements});
    check_launch(a.where, launch_query_attention_dq(p, chunks, elements ? workspace.mutable_data_ptr() : nullptr,
                                                    device.stream()));
  }
  const Tensor dk = empty_like_h(q, need_dk ? Shape{a.B, a.L, a.E} : Shape{0});
  if (need_dk) {
    p.result = dk.mutable_data_ptr();
    check_launch(a.where, launch_query_attention_dk(p, device.stream()));
  }
  const Tensor dv = empty_like_h(q, need_dv ? Shape{a.B, a.L, a.E} : Shape{0});
  if (need_dv) {
    p.result = dv.mutable_data_ptr();
    check_launch(a.where, launch_query_attention_dv(p, device.stream()));
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace mlhead

// The schemas are in query_attention_cpu.cpp.
STABLE_TORCH_LIBRARY_IMPL(mlhead_C, CUDA, m) {
  m.impl("query_attention", TORCH_BOX(&mlhead::query_attention_cuda));
  m.impl("query_attention_backward", TORCH_BOX(&mlhead::query_attention_backward_cuda));
}
