// The kernel and its launch, compiled once for each storage (kernels_*.cu).
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/reduce.cuh"
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

template <class Functor, class Storage, bool kWhole>
constexpr int blocks_per_multiprocessor() {
  // Coded, a thread holds 16 elements and their new states until all of a block are known.
  if (Storage::kHasCodes) return 2;
  constexpr bool kTold = std::is_base_of_v<Mixed, Storage>;  // when it runs
  // The average is one array more, what is observed takes registers too; mixed, 2 blocks of 128
  // registers still have 48 KB of loads in flight.
  if (kTold && kWhole) return 2;
  // Three states beside what a parameter is joined with: 6 arrays, of which 2 blocks have 48 KB.
  if (Storage::kHasBeside) return Functor::kStates > 2 ? 2 : 3;
  const int arrays = kFirstState + Functor::kStates + kTold + 2 * kWhole;
  return arrays > 4 ? 3 : arrays > 2 ? 4 : kMostBlocks;
}

// A thread, whose team is its neighbours in the warp: [note: teams].
struct Lane {
  static constexpr int kPlayed = 1;

  template <int kTeam>
  __device__ static void share(std::uint32_t (&largest)[1]) {
    FUSED_ADAMW_UNROLL
    for (int distance = 1; distance < kTeam; distance *= 2) {
      largest[0] = max(largest[0], __shfl_xor_sync(kAllLanes, largest[0], distance));
    }
  }
};

template <class Functor, class Storage, bool kWhole>
__global__ void __launch_bounds__(kThreads, (blocks_per_multiprocessor<Functor, Storage, kWhole>()))
    update_kernel(const __grid_constant__ LaunchArguments<Functor, Storage, kWhole> arguments) {
  Observation observed[1]{};
  update_chunk<Lane>(arguments, blockIdx.x, static_cast<int>(threadIdx.x), observed);
  if constexpr (kWhole) {
    if (arguments.observed == nullptr) return;
    const Observation sum = fold_block(observed[0]);
    if (threadIdx.x == 0) observation_of(arguments, blockIdx.x) = sum;
  }
}

template <class Storage, bool kWhole>
int launch_bucket(const Bucket& bucket, cudaStream_t stream) {
  int launches = 0;
  visit_functor(bucket.functor, [&](auto functor) {
    using Functor = decltype(functor);
    LaunchArguments<Functor, Storage, kWhole> arguments;
    for_each_launch(bucket, arguments, [&](const auto& launch, std::uint32_t blocks) {
      update_kernel<Functor, Storage, kWhole><<<blocks, kThreads, 0, stream>>>(launch);
      check(cudaGetLastError(), "launching the update kernel");
      ++launches;
    });
  });
  return launches;
}

}  // namespace fused_adamw::cuda
