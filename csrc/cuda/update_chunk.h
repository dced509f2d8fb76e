// The body of the CUDA kernel: what one thread of one block does. Plain C++ with no CUDA built-ins,
// so that a host can play the grid and compare bits (cuda/host_grid.cpp).
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "cuda/launch_arguments.h"
#include "cuda/storages.h"
#include "cuda/update_coded.h"
#include "cuda/update_range.h"
#include "cuda/work.h"

namespace fused_adamw::cuda {

// What threads `thread` and following of block `block` do, as many as `Lanes` plays together, which
// is one on a GPU; and what they observed: [note: teams].
template <class Lanes, class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_chunk(const LaunchArguments<Functor, Storage, kWhole>& arguments,
                                 std::uint32_t block, int thread,
                                 Observation (&observed)[Lanes::kPlayed]) {
  const Work<Functor, Storage, kWhole> work(arguments, block);
  if (arguments.skip && *arguments.skip) {
    if constexpr (kWhole) {
      for (int l = 0; l < Lanes::kPlayed; ++l) zero_gradients(work, thread + l);
    }
    return;
  }
  const Row<Functor> row = row_of(arguments, work.tensor);
  if constexpr (Storage::kHasCodes) {
    update_coded<Lanes>(work, row, thread, observed);
  } else {
    for (int l = 0; l < Lanes::kPlayed; ++l) update_packs(work, row, thread + l, observed[l]);
  }
}

// Where the block's observation goes.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD Observation& observation_of(
    const LaunchArguments<Functor, Storage, kWhole>& arguments, std::uint32_t block) {
  const int tensor = tensor_of(arguments, block);
  return arguments.observed[arguments.chunk + arguments.later[tensor] +
                            (block - arguments.first_chunk[tensor])];
}

// One lane of a segment's squares: [note: square sums].
template <class T>
FUSED_ADAMW_HD double lane_square_sum(const T* grad, std::int64_t count, int lane) {
  double sum = 0.0;
  if (count == kSegment) {
    constexpr int kRounds = kSegment / kLanes, kAtOnce = 16;  // loads under way
    FUSED_ADAMW_NO_UNROLL
    for (int round = 0; round < kRounds; round += kAtOnce) {
      T loaded[kAtOnce];
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kAtOnce; ++k) loaded[k] = grad[(round + k) * kLanes + lane];
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum += square(to_float(loaded[k]));
    }
  } else {
    for (std::int64_t i = lane; i < count; i += kLanes) sum += square(to_float(grad[i]));
  }
  return sum;
}

// What thread `thread` of block `block` adds up.
FUSED_ADAMW_HD double chunk_square_sum(const GradientArguments& arguments, std::uint32_t block,
                                       int thread) {
  const int tensor = tensor_of(arguments, block);
  const std::int64_t begin =
      static_cast<std::int64_t>(block - arguments.first_chunk[tensor]) * kChunk +
      thread / kLanes * kSegment;
  const std::int64_t left = arguments.numel[tensor] - begin;
  if (left <= 0) return 0.0;
  const std::int64_t count = left < kSegment ? left : kSegment;
  double sum = 0.0;
  Mixed::with_type(arguments.dtype, [&](auto type) {
    using T = decltype(type);
    sum = lane_square_sum(static_cast<const T*>(arguments.grad[tensor]) + begin, count,
                          thread % kLanes);
  });
  return sum;
}

// Where the block's sum goes.
FUSED_ADAMW_HD double& square_sum_of(const GradientArguments& arguments, std::uint32_t block) {
  const int tensor = tensor_of(arguments, block);
  return arguments.partials[arguments.chunk[tensor] + (block - arguments.first_chunk[tensor])];
}

}  // namespace fused_adamw::cuda
