// The argument block of one launch: pointers, sizes and coefficients of hundreds of tensors.
#pragma once

#include <cstdint>

#include "core/bucket.h"
#include "core/planner.h"

namespace fused_adamw::cuda {

// [note: geometry] One block updates one chunk of one tensor. The hardware hands blocks out as
// multiprocessors become free, which balances ragged lists without a queue of our own, and the
// search for a block's tensor is paid once a chunk. A chunk is 16384 elements: large enough that
// the search (ten steps in the constant cache) is noise beside 448 KB of traffic in float32, small
// enough that a model of 100M parameters gives 6000 blocks, so a last partial wave costs little.
constexpr int kThreads = 256;
constexpr std::int64_t kChunk = 16384;

// Kernel arguments may take 32,764 bytes from CUDA 12.1 and compute capability 7.0 on, against
// 4,096 before: 600 tensors a launch instead of 70.
constexpr int kArgumentBytes = 32764;
constexpr int kRows = 128;

template <class Functor>
struct LaunchArguments {
  static constexpr int kSlots = kFirstState + Functor::kStates;
  static constexpr int kBytesPerTensor =
      kSlots * static_cast<int>(sizeof(void*)) + sizeof(std::int64_t) + sizeof(std::uint32_t) + 2;
  static constexpr int kTensors =
      (kArgumentBytes - kRows * static_cast<int>(sizeof(typename Functor::Coefficients)) - 24) /
      kBytesPerTensor;

  void* slot[kSlots][kTensors];
  std::int64_t numel[kTensors];
  typename Functor::Coefficients rows[kRows];
  std::uint32_t first_chunk[kTensors + 1];  // the last entry in use is the number of blocks
  std::int32_t tensors;
  std::uint16_t row[kTensors];
  Format format;
};

template <class Functor>
constexpr LaunchLimits launch_limits() {
  using Arguments = LaunchArguments<Functor>;
  static_assert(sizeof(Arguments) <= kArgumentBytes, "the argument block must fit into a launch");
  return {Arguments::kTensors, kRows, kChunk};
}

template <class Functor>
void pack(const Bucket& bucket, const Launch& launch, LaunchArguments<Functor>& arguments) {
  using Coefficients = typename Functor::Coefficients;
  arguments.tensors = static_cast<std::int32_t>(launch.tensors.size());
  arguments.format = bucket.format;
  for (std::size_t i = 0; i < launch.tensors.size(); ++i) {
    const TensorEntry& tensor = bucket.tensors[static_cast<std::size_t>(launch.tensors[i])];
    for (int s = 0; s < LaunchArguments<Functor>::kSlots; ++s)
      arguments.slot[s][i] = tensor.slot[s];
    arguments.numel[i] = tensor.numel;
    arguments.first_chunk[i] = launch.first_chunk[i];
    arguments.row[i] = static_cast<std::uint16_t>(launch.row_of[i]);
  }
  arguments.first_chunk[launch.tensors.size()] = launch.first_chunk.back();
  for (std::size_t r = 0; r < launch.rows.size(); ++r) {
    arguments.rows[r] = *reinterpret_cast<const Coefficients*>(
        bucket.coefficients.data() + launch.rows[r] * bucket.coefficients_per_row);
  }
}

// Plans a bucket and calls run(arguments, blocks) for each launch.
template <class Functor, class Run>
void for_each_launch(const Bucket& bucket, LaunchArguments<Functor>& arguments, Run&& run) {
  std::vector<std::int64_t> numels;
  std::vector<std::int32_t> rows;
  for (const TensorEntry& tensor : bucket.tensors) {
    numels.push_back(tensor.numel);
    rows.push_back(tensor.row);
  }
  for (const Launch& launch : plan_launches(numels, rows, launch_limits<Functor>())) {
    pack(bucket, launch, arguments);
    run(arguments, launch.first_chunk.back());
  }
}

}  // namespace fused_adamw::cuda
