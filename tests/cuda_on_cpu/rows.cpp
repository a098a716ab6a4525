// csrc/dropout_add_layer_norm.cu, or with MLHEAD_RELU_DROPOUT csrc/relu_dropout.cu, for the CPU, behind C functions
// that test_cuda_on_cpu_rows.py calls on torch's memory.
#include "cuda_runtime.h"

// The exchange between the threads of a warp: all of them write, wait, read, and wait again.
struct Warp {
  Barrier all{32};
  double slots[32];
};
inline Warp warps[32];

template <typename T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  warp.slots[lane] = x;
  warp.all.arrive_and_wait();
  const T other = T(warp.slots[lane ^ unsigned(distance)]);
  warp.all.arrive_and_wait();
  return other;
}

#ifdef MLHEAD_RELU_DROPOUT

#include "../../csrc/relu_dropout.cu"

extern "C" const char* relu_forward(mlhead::ReluCall* p) {
  return mlhead::launch_relu_dropout(*p, nullptr);
}
extern "C" const char* relu_backward(mlhead::ReluCall* p) {
  return mlhead::launch_relu_dropout_backward(*p, nullptr);
}

#else

#include "../../csrc/dropout_add_layer_norm.cu"

extern "C" const char* norm_forward(mlhead::LayerNormCall* p) {
  return mlhead::launch_dropout_add_layer_norm(*p, nullptr);
}
extern "C" const char* norm_backward(mlhead::LayerNormCall* p, void* workspace) {
  return mlhead::launch_dropout_add_layer_norm_backward(*p, workspace, nullptr);
}
extern "C" int64_t norm_workspace(mlhead::LayerNormCall* p) {
  return mlhead::layer_norm_workspace_elements(*p);
}

#endif
