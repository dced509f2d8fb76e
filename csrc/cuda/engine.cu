#include <cuda_runtime.h>

#include <string>

#include "cuda/check.h"
#include "cuda/engine.h"
#include "cuda/kernels.h"
#include "cuda/storages.h"

namespace fused_adamw::cuda {
namespace {

std::string version(int code) {
  return std::to_string(code / 1000) + "." + std::to_string(code % 1000 / 10);
}

}  // namespace

int update(const Bucket& bucket, void* stream) {
  const CurrentDevice current(bucket.device_index);
  const auto on_stream = static_cast<cudaStream_t>(stream);
  int launches = 0;
  visit_storage(bucket, [&](auto storage, auto whole) {
    launches = launch_bucket<decltype(storage), decltype(whole)::value>(bucket, on_stream);
  });
  return launches;
}

std::string unavailable_reason() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return "no NVIDIA driver was found on this machine";
  }
  // The extension carries the runtime it was built with; a driver of the same major version runs
  // it.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the NVIDIA driver is too old: it supports CUDA " + version(driver) +
           ", the extension was built with CUDA " + version(CUDART_VERSION);
  }
  if (driver < 12010) {
    return "the NVIDIA driver is too old: launches with 32 KB of arguments need CUDA 12.1, it "
           "supports " +
           version(driver);
  }
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) return std::string("CUDA reports: ") + cudaGetErrorString(status);
  if (devices == 0) return "no CUDA device is visible";
  return {};
}

}  // namespace fused_adamw::cuda
