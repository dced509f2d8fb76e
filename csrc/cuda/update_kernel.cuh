// The kernel and its launch, compiled once for each storage (kernels_*.cu).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/update_chunk.h"
#include "rules/registry.h"

namespace fused_adamw::cuda {

// Blocks of 256 threads that a multiprocessor must be able to hold. An H200 wants about 48 KB of
// loads in flight, and a 16-byte access of each array is 4 KB a block: 4 blocks give a rule of
// three or four arrays 48 or 64 KB, at 64 registers a thread; one of two (SGD) needs 6, at 40. Five
// arrays (AMSGrad) need more than 64 registers, as do four that are mixed, of which a thread holds
// up to 32 bytes each: 3 blocks give them 80 instead of spills, and 48 KB or more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 4;  // of 256 threads; later multiprocessors hold 6 or more
#else
constexpr int kMostBlocks = 6;
#endif

template <class Functor, class Storage>
constexpr int blocks_per_multiprocessor() {
  const int arrays = kFirstState + Functor::kStates + std::is_same_v<Storage, Mixed>;
  return arrays > 4 ? 3 : arrays > 2 ? 4 : kMostBlocks;
}

template <class Functor, class Storage>
__global__ void __launch_bounds__(kThreads, (blocks_per_multiprocessor<Functor, Storage>()))
    update_kernel(const __grid_constant__ LaunchArguments<Functor> arguments) {
  update_chunk<Functor, Storage>(arguments, blockIdx.x, static_cast<int>(threadIdx.x));
}

// Launches every piece of the bucket and returns their number.
template <class Storage>
int launch_bucket(const Bucket& bucket, cudaStream_t stream) {
  int launches = 0;
  visit_functor(bucket.functor, [&](auto functor) {
    using Functor = decltype(functor);
    LaunchArguments<Functor> arguments;
    for_each_launch<Functor>(bucket, arguments, [&](const auto& launch, std::uint32_t blocks) {
      update_kernel<Functor, Storage><<<blocks, kThreads, 0, stream>>>(launch);
      check(cudaGetLastError(), "launching the update kernel");
      ++launches;
    });
  });
  return launches;
}

}  // namespace fused_adamw::cuda
