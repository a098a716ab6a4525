// What every op's CUDA form needs beside its kernels: the device and stream of a call, and what to say when a launch
// fails.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "shim.h"

namespace mlhead {

// The device of a call, made current while it lasts, with its current stream.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    if (cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, t.get_device_index()) != cudaSuccess)
      multiprocessors_ = 1;
  }
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 1;
};

inline void check_launch(const char* where, const char* problem) {
  if (problem) throw std::runtime_error(std::string(where) + ": the CUDA kernel was not launched: " + problem);
}

}  // namespace mlhead
