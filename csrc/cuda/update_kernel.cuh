// The kernel and its launch, compiled once for each storage (kernels_*.cu).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/update_chunk.h"
#include "rules/registry.h"

namespace fused_adamw::cuda {

// 4 blocks of 256 threads a multiprocessor: at most 64 registers a thread, and 64 KB of loads in
// flight where a rule has four arrays (a 16-byte access of each is 4 KB a block); an H200 needs
// about 48 KB. Five arrays (AMSGrad), or four that are mixed and may take two accesses each, do not
// fit into 64 registers: 3 blocks give a thread 80 instead of spills, and still 48 KB in flight or
// more.
template <class Functor, class Storage>
constexpr int kBlocksPerMultiprocessor =
    kFirstState + Functor::kStates + std::is_same_v<Storage, Mixed> > 4 ? 3 : 4;

template <class Functor, class Storage>
__global__ void __launch_bounds__(kThreads, (kBlocksPerMultiprocessor<Functor, Storage>))
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
