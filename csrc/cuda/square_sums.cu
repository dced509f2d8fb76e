// The kernel that adds up the squares of gradients, and its launch.
#include "cuda/check.h"
#include "cuda/engine.h"
#include "cuda/reduce.cuh"
#include "cuda/update_chunk.h"

namespace fused_adamw::cuda {
namespace {

// 128 KB of loads in flight a multiprocessor in float32, 64 KB in 16 bits: 16 of every thread.
__global__ void __launch_bounds__(kThreads)
    square_sum_kernel(const __grid_constant__ GradientArguments arguments) {
  const double sum =
      fold_block(chunk_square_sum(arguments, blockIdx.x, static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) square_sum_of(arguments, blockIdx.x) = sum;
}

}  // namespace

void square_sums(const Bucket& bucket, double* partials, void* stream) {
  const CurrentDevice current(bucket.device_index);
  GradientArguments arguments;
  for_each_launch(bucket, partials, arguments, [&](const auto& launch, std::uint32_t blocks) {
    square_sum_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    check(cudaGetLastError(), "launching the kernel of the gradients' norm");
  });
}

}  // namespace fused_adamw::cuda
