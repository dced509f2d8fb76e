// The argument block of one launch: pointers, sizes and coefficients of hundreds of tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/bucket.h"
#include "core/pass.h"
#include "core/planner.h"
#include "core/square_sum.h"
#include "cuda/storages.h"

namespace fused_adamw::cuda {

// [note: geometry] One block updates one chunk of one tensor. The hardware hands blocks out as
// multiprocessors become free, which balances ragged lists without a queue of our own, and the
// search for a block's tensor is paid once a chunk. A chunk is 16384 elements: large enough that
// the search (ten steps in the constant cache) is noise beside 448 KB of traffic in float32, small
// enough that a model of 100M parameters gives 6000 blocks, so a last partial wave costs little.
constexpr int kThreads = 256;
static_assert(kThreads == kLanes * kSegments, "a warp adds up one segment of a chunk");

// Kernel arguments may take 32,764 bytes from CUDA 12.1 and compute capability 7.0 on, against
// 4,096 before: 600 tensors a launch instead of 70.
constexpr int kArgumentBytes = 32764;
constexpr int kRows = 104;

// How many tensors' arguments fit. `kWhole`: with what a step may do beside its rule (core/pass.h),
// unscaling and clipping apart, which every launch does.
template <class Functor, class Storage, bool kWhole>
struct LaunchCapacity {
  static constexpr bool kHasBeside = Storage::kHasBeside;
  static constexpr int kStates = Functor::kStates, kSlots = kFirstState + kStates;
  static constexpr int kEma = kSlots, kBeside = kSlots + kWhole;  // their places in `slot`
  static constexpr int kPointers = kSlots + kWhole + kHasBeside;
  static constexpr int kScales = Storage::kHasCodes ? kStates : 0;
  static constexpr int kBytesPerTensor =
      (kPointers + kScales) * static_cast<int>(sizeof(void*)) + sizeof(std::int64_t) +
      sizeof(std::uint32_t) + sizeof(std::int32_t) + (kWhole ? sizeof(std::uint32_t) : 0) +
      (kHasBeside ? sizeof(std::uint64_t) + sizeof(Extent) : 0);
  // A row's last number is of the random bits.
  static constexpr int kRowFloats =
      static_cast<int>(sizeof(Row<Functor>) / sizeof(float)) - !kHasBeside;
  static constexpr int kRowBytes = kRowFloats * static_cast<int>(sizeof(float));
  static constexpr int kTensors = (kArgumentBytes - kRows * kRowBytes - 64) / kBytesPerTensor;
};

// Of codes.
template <int kScales, int kTensors>
struct ScaleArguments {
  float* scale[kScales][kTensors];
};
template <int kTensors>
struct ScaleArguments<0, kTensors> {};

// Of what may be rounded stochastically: [note: random bits].
template <bool kIsThere, int kTensors>
struct RandomArguments {
  std::uint64_t key[kTensors];
  Extent extent[kTensors];
};
template <int kTensors>
struct RandomArguments<false, kTensors> {};

template <class Functor, class Storage, bool kWhole,
          class Capacity = LaunchCapacity<Functor, Storage, kWhole>>
struct LaunchArguments : Capacity,
                         ScaleArguments<Capacity::kScales, Capacity::kTensors>,
                         RandomArguments<Capacity::kHasBeside, Capacity::kTensors> {
  static constexpr int kTensors = Capacity::kTensors;

  // The average of the parameter, with kWhole, and what is beside it follow the states.
  void* slot[Capacity::kPointers][kTensors];
  std::int64_t numel[kTensors];
  std::int64_t chunk;     // index of the launch's first chunk in the whole list
  Observation* observed;  // one a chunk; or null
  float rows[kRows][Capacity::kRowFloats];
  std::uint32_t later[kWhole ? kTensors : 1];  // of the tensor's first chunk, from there on
  std::uint32_t first_chunk[kTensors + 1];     // the last entry in use is the number of blocks
  std::int32_t row[kTensors];                  // of `rows`, or of those on the device
  const float* device_rows;                    // null: `rows`
  const std::int32_t* skip;  // where it says so, gradients are zeroed at most; or null
  std::int32_t tensors;
  Format format;
  bool has_ema;
  bool zero_grads;
};

template <class Arguments>
constexpr LaunchLimits launch_limits() {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "the argument block must fit into a launch");
  return {Arguments::kTensors, kRows, kChunk};
}

template <class Functor, class Storage, bool kWhole>
void pack(const Bucket& bucket, const Launch& launch,
          LaunchArguments<Functor, Storage, kWhole>& arguments) {
  using Arguments = LaunchArguments<Functor, Storage, kWhole>;
  arguments.tensors = static_cast<std::int32_t>(launch.tensors.size());
  arguments.format = bucket.format;
  arguments.has_ema = bucket.has_ema;
  arguments.zero_grads = bucket.zero_grads;
  arguments.observed = reinterpret_cast<Observation*>(bucket.observed);
  // Chunks are numbered by class and param group, which a launch's tensors are not sorted by.
  arguments.chunk = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t tensor : launch.tensors) {
    arguments.chunk =
        std::min(arguments.chunk, bucket.tensors[static_cast<std::size_t>(tensor)].chunk);
  }
  for (std::size_t i = 0; i < launch.tensors.size(); ++i) {
    const TensorEntry& tensor = bucket.tensors[static_cast<std::size_t>(launch.tensors[i])];
    for (int s = 0; s < Arguments::kSlots; ++s) arguments.slot[s][i] = tensor.slot[s];
    if constexpr (kWhole) {
      arguments.slot[Arguments::kEma][i] = tensor.ema;
      arguments.later[i] = static_cast<std::uint32_t>(tensor.chunk - arguments.chunk);
    }
    if constexpr (Arguments::kHasBeside) {
      arguments.slot[Arguments::kBeside][i] = tensor.beside;
      arguments.key[i] = tensor.key;
      arguments.extent[i] = tensor.extent;
    }
    if constexpr (Arguments::kScales > 0) {
      for (int k = 0; k < Arguments::kScales; ++k) arguments.scale[k][i] = tensor.scale[k];
    }
    arguments.numel[i] = tensor.numel;
    arguments.first_chunk[i] = launch.first_chunk[i];
    arguments.row[i] = bucket.device_rows ? tensor.row : launch.row_of[i];
  }
  arguments.first_chunk[launch.tensors.size()] = launch.first_chunk.back();
  arguments.device_rows = bucket.device_rows;
  arguments.skip = bucket.skip;
  for (std::size_t r = 0; r < launch.rows.size() && !bucket.device_rows; ++r) {
    memcpy(arguments.rows[r],
           bucket.coefficients.data() + launch.rows[r] * bucket.coefficients_per_row,
           Arguments::kRowBytes);
  }
}

// The gradients of one launch whose squares are added up.
struct GradientArguments {
  static constexpr int kTensors = (kArgumentBytes - 64) / (8 + 8 + 8 + 4);

  const void* grad[kTensors];
  std::int64_t numel[kTensors];
  std::int64_t chunk[kTensors];  // index of its first chunk in the whole list
  double* partials;              // one a chunk
  std::uint32_t first_chunk[kTensors + 1];
  std::int32_t tensors;
  Dtype dtype;
};

inline void pack(const Bucket& bucket, const Launch& launch, double* partials,
                 GradientArguments& arguments) {
  arguments.tensors = static_cast<std::int32_t>(launch.tensors.size());
  arguments.dtype = bucket.format.grad;
  arguments.partials = partials;
  for (std::size_t i = 0; i < launch.tensors.size(); ++i) {
    const TensorEntry& tensor = bucket.tensors[static_cast<std::size_t>(launch.tensors[i])];
    arguments.grad[i] = tensor.slot[kGrad];
    arguments.numel[i] = tensor.numel;
    arguments.chunk[i] = tensor.chunk;
    arguments.first_chunk[i] = launch.first_chunk[i];
  }
  arguments.first_chunk[launch.tensors.size()] = launch.first_chunk.back();
}

// The tensor that chunk `block` of a launch belongs to: the last one that starts at or before it.
template <class Arguments>
FUSED_ADAMW_HD int tensor_of(const Arguments& arguments, std::uint32_t block) {
  int low = 0, high = arguments.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (arguments.first_chunk[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

inline std::vector<Launch> plan(const Bucket& bucket, const LaunchLimits& limits) {
  std::vector<std::int64_t> numels;
  std::vector<std::int32_t> rows;
  for (const TensorEntry& tensor : bucket.tensors) {
    numels.push_back(tensor.numel);
    rows.push_back(bucket.device_rows ? 0 : tensor.row);
  }
  return plan_launches(numels, rows, limits);
}

// Plans a bucket and calls run(arguments, blocks) for each launch.
template <class Arguments, class Run>
void for_each_launch(const Bucket& bucket, Arguments& arguments, Run&& run) {
  for (const Launch& launch : plan(bucket, launch_limits<Arguments>())) {
    pack(bucket, launch, arguments);
    run(arguments, launch.first_chunk.back());
  }
}

// The same for the squares of the gradients, whatever the rows.
template <class Run>
void for_each_launch(const Bucket& bucket, double* partials, GradientArguments& arguments,
                     Run&& run) {
  static_assert(sizeof arguments <= kArgumentBytes, "the argument block must fit into a launch");
  const std::int64_t rows = static_cast<std::int64_t>(bucket.tensors.size()) + 1;
  for (const Launch& launch :
       plan(bucket, {GradientArguments::kTensors, static_cast<int>(rows), kChunk})) {
    pack(bucket, launch, partials, arguments);
    run(arguments, launch.first_chunk.back());
  }
}

}  // namespace fused_adamw::cuda
