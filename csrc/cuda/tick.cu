// The kernels that work out a step on the device: see [note: tick].
#include "cuda/check.h"
#include "cuda/engine.h"
#include "cuda/tick.h"

namespace fused_adamw::cuda {
namespace {

constexpr int kTickThreads = 512;

__global__ void __launch_bounds__(kFoldLanes) fold_kernel(const FoldArguments arguments) {
  __shared__ double lane[kFoldLanes];
  const int thread = static_cast<int>(threadIdx.x);
  for (int group = 0; group < arguments.groups; ++group) {
    lane[thread] = fold_lane(arguments, group, thread);
    __syncthreads();
    for (int half = kFoldLanes / 2; half > 0; half /= 2) {
      if (thread < half) lane[thread] = lane[thread] + lane[thread + half];
      __syncthreads();
    }
    if (thread == 0) arguments.squares[group] = lane[0];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kTickThreads) tick_kernel(const TickArguments arguments) {
  const Decision decision = decide(arguments);
  if (!decision.skip) {
    for (int i = static_cast<int>(threadIdx.x); i < arguments.parameter_count; i += kTickThreads) {
      tick_parameter(arguments, decision, i);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) tick_groups(arguments, decision);
}

}  // namespace

void fold(const FoldArguments& arguments, int device, void* stream) {
  const CurrentDevice current(device);
  fold_kernel<<<1, kFoldLanes, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), "launching the kernel that folds the squares");
}

void tick(const TickArguments& arguments, int device, void* stream) {
  const CurrentDevice current(device);
  tick_kernel<<<1, kTickThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), "launching the kernel that works out the coefficients");
}

}  // namespace fused_adamw::cuda
