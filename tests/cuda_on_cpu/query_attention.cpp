// csrc/query_attention.cu for the CPU, behind C functions that test_cuda_on_cpu_attention.py calls on torch's memory.
#include "../../csrc/query_attention.cu"

extern "C" const char* attention_out(mlhead::AttentionCall* p) {
  return mlhead::launch_query_attention(*p, nullptr);
}
extern "C" const char* attention_delta(mlhead::AttentionCall* p) {
  return mlhead::launch_query_attention_delta(*p, nullptr);
}
extern "C" const char* attention_dq(mlhead::AttentionCall* p, int64_t chunks, void* workspace) {
  return mlhead::launch_query_attention_dq(*p, chunks, workspace, nullptr);
}
extern "C" const char* attention_dk(mlhead::AttentionCall* p) {
  return mlhead::launch_query_attention_dk(*p, nullptr);
}
extern "C" const char* attention_dv(mlhead::AttentionCall* p) {
  return mlhead::launch_query_attention_dv(*p, nullptr);
}
extern "C" int64_t attention_dq_chunks(mlhead::AttentionCall* p) {
  return mlhead::dq_chunks(*p);
}
extern "C" int64_t attention_dq_workspace(mlhead::AttentionCall* p, int64_t chunks) {
  return mlhead::dq_workspace_elements(*p, chunks);
}
