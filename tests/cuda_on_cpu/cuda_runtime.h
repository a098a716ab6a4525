// Just enough of CUDA to run csrc/*.cu on a CPU: every thread of a block is a context of its own, blocks run one after
// another. A thread runs until it waits at a barrier, then the next one does, upwards in one block and downwards in the
// next: where a barrier is missing, one of the two reads what is not yet written, or no longer there. It shows wrong
// indexing, masks and barriers, not speed, and is no proof for a GPU. The tensor-core operations of nvcuda::wmma are done
// by every lane for itself.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
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

inline dim3 threadIdx, blockIdx;

// The threads of a block, run in turns.
struct Block {
  static constexpr size_t stack_bytes = 256 << 10;
  struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
  };
  std::vector<Thread> threads;
  std::function<void()> body;
  ucontext_t scheduler;
  bool moved = false;  // whether a barrier opened or a thread ended in this round

  void run(unsigned count, bool upwards) {
    if (threads.size() < count) threads.resize(count);
    for (unsigned t = 0; t < count; ++t) {
      Thread& thread = threads[t];
      if (!thread.stack) thread.stack.reset(new char[stack_bytes]);
      thread.done = false;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = stack_bytes;
      thread.context.uc_link = &scheduler;
      makecontext(&thread.context, start, 0);
    }
    for (unsigned left = count; left > 0;) {
      moved = false;
      for (unsigned i = 0; i < count; ++i) {
        const unsigned t = upwards ? i : count - 1 - i;
        if (threads[t].done) continue;
        threadIdx.x = t;
        swapcontext(&scheduler, &threads[t].context);
        if (threads[t].done) --left, moved = true;
      }
      if (left > 0 && !moved) {
        std::fprintf(stderr, "%u threads of a block wait at a barrier that the others never reach\n", left);
        std::abort();
      }
    }
  }
  static void start();
  void others() { swapcontext(&threads[threadIdx.x].context, &scheduler); }
};
inline Block block;
inline void Block::start() {
  block.body();
  block.threads[threadIdx.x].done = true;
}

struct Barrier {
  unsigned size = 0, arrived = 0, opened = 0;
  void arrive_and_wait() {
    const unsigned before = opened;
    if (++arrived == size) {
      arrived = 0, ++opened;
      block.moved = true;
    }
    while (opened == before) block.others();
  }
};
inline Barrier block_barrier;
inline void __syncthreads() {
  block_barrier.arrive_and_wait();
}

template <typename... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  block_barrier = {config->blockDim.x};
  block.body = [&] { kernel(arguments...); };
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    blockIdx.x = b;
    block.run(config->blockDim.x, b % 2 == 0);
  }
  return cudaSuccess;
}
