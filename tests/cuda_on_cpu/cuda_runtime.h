// Just enough of CUDA to run csrc/*.cu on a CPU: every thread of a block is a thread here, blocks run one after
// another, __syncthreads is a barrier. It shows wrong indexing, masks and missing barriers, not speed, and is no proof
// for a GPU. The tensor-core operations of nvcuda::wmma are done by every lane for itself.
#pragma once

#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() {
  block_barrier->arrive_and_wait();
}

template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  const unsigned threads = config->blockDim.x;
  std::barrier<> inside(threads), between(threads);
  block_barrier = &inside;
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; ++t)
    all.emplace_back([&, t] {
      threadIdx.x = t;
      for (unsigned b = 0; b < config->gridDim.x; ++b) {
        blockIdx.x = b;
        kernel(arguments...);
        between.arrive_and_wait();
      }
    });
  for (auto& thread : all) thread.join();
  return cudaSuccess;
}
