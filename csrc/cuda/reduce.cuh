// Sums over the threads of a block.
#pragma once

#include "core/pass.h"
#include "core/square_sum.h"
#include "cuda/launch_arguments.h"

namespace fused_adamw::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline double from_lane_above(double value, int distance) {
  return __shfl_down_sync(kAllLanes, value, distance);
}

__device__ inline Observation from_lane_above(const Observation& value, int distance) {
  return {from_lane_above(value.grad, distance), from_lane_above(value.update, distance),
          from_lane_above(value.param, distance), from_lane_above(value.nonfinite, distance),
          from_lane_above(value.lost, distance)};
}

// The sum over all threads, for the first of them: by halves of each warp, then one warp after the
// other, as in [note: square sums].
template <class T>
__device__ T fold_block(T value) {
  for (int half = kLanes / 2; half > 0; half /= 2) value = value + from_lane_above(value, half);
  __shared__ T of_warp[kThreads / kLanes];
  if (threadIdx.x % kLanes == 0) of_warp[threadIdx.x / kLanes] = value;
  __syncthreads();
  T sum{};
  if (threadIdx.x == 0) {
    for (const T& one : of_warp) sum = sum + one;
  }
  return sum;
}

}  // namespace fused_adamw::cuda
