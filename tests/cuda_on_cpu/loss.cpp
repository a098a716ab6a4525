// csrc/class_loss.cu for the CPU, behind C functions that test_cuda_on_cpu_loss.py calls on torch's memory.
#include "../../csrc/class_loss.cu"

extern "C" const char* loss_gradient(mlhead::LossBlock* p) {
  return mlhead::launch_class_loss_gradient(*p, nullptr);
}
extern "C" const char* loss_statistics(mlhead::LossBlock* p) {
  return mlhead::launch_class_loss_statistics(*p, nullptr);
}
extern "C" int64_t splits_of(mlhead::LossBlock* p, int multiprocessors) {
  return mlhead::loss_splits(*p, multiprocessors);
}
extern "C" const char* scale_by(int dtype, void* x, int64_t numel, const void* factor, int multiprocessors) {
  return mlhead::launch_scale_by(mlhead::Dtype(dtype), x, numel, factor, multiprocessors, nullptr);
}
