// CUDA's error codes as exceptions, and its current device as a scope.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fused_adamw::cuda {

inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " while " + doing);
}

// Makes `device` current for a scope and puts the previous one back.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "reading the current device");
    if (device != previous_) check(cudaSetDevice(device), "choosing the tensors' device");
    changed_ = device != previous_;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace fused_adamw::cuda
