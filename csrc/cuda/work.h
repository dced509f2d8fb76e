// The work of one block: a chunk of one tensor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/platform.h"
#include "cuda/launch_arguments.h"
#include "cuda/params.h"
#include "cuda/storages.h"
#include "cuda/tick.h"
#include "rules/rule.h"

namespace fused_adamw::cuda {

// The arrays of one tensor.
template <class Functor, class Storage, bool kWhole>
struct Arrays {
  using Arguments = LaunchArguments<Functor, Storage, kWhole>;
  void* slot[Arguments::kPointers];
  float* scale[Arguments::kScales ? Arguments::kScales : 1];

  FUSED_ADAMW_HD Arrays(const Arguments& arguments, int tensor) {
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Arguments::kPointers; ++k) slot[k] = arguments.slot[k][tensor];
    if constexpr (Arguments::kScales > 0) {
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < Arguments::kScales; ++k) scale[k] = arguments.scale[k][tensor];
    }
  }

  FUSED_ADAMW_HD float* ema() const { return static_cast<float*>(slot[Arguments::kEma]); }
  FUSED_ADAMW_HD void* beside() const { return slot[Arguments::kBeside]; }

  FUSED_ADAMW_HD bool aligned() const {
    std::uintptr_t bits = 0;
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Arguments::kPointers; ++k) {
      bits |= reinterpret_cast<std::uintptr_t>(slot[k]);
    }
    return bits % kAccessBytes == 0;
  }
};

// The coefficients of a tensor.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD Row<Functor> row_of(const LaunchArguments<Functor, Storage, kWhole>& arguments,
                                   int tensor) {
  constexpr int kBytes = LaunchArguments<Functor, Storage, kWhole>::kRowBytes;
  const std::int64_t index = arguments.row[tensor];
  Row<Functor> row{};
  if (arguments.device_rows) {
    memcpy(&row, arguments.device_rows + index * kDeviceRow, kBytes);
  } else {
    memcpy(&row, arguments.rows[index], kBytes);
  }
  return row;
}

// Elements [begin, end) of a tensor, of which `arguments` say more.
template <class Functor, class Storage, bool kWhole>
struct Work {
  using Arguments = LaunchArguments<Functor, Storage, kWhole>;
  const Arguments& arguments;
  const int tensor;
  const std::int64_t begin, end;
  const Arrays<Functor, Storage, kWhole> arrays;

  FUSED_ADAMW_HD Work(const Arguments& arguments, std::uint32_t block)
      : Work(arguments, block, tensor_of(arguments, block)) {}

 private:
  FUSED_ADAMW_HD Work(const Arguments& arguments, std::uint32_t block, int tensor)
      : arguments(arguments),
        tensor(tensor),
        begin(static_cast<std::int64_t>(block - arguments.first_chunk[tensor]) * kChunk),
        end(begin +
            (arguments.numel[tensor] - begin < kChunk ? arguments.numel[tensor] - begin : kChunk)),
        arrays(arguments, tensor) {}
};

// The random bits of the chunk; `step`: steps taken.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD auto draws_of(const Work<Functor, Storage, kWhole>& work, std::uint32_t step) {
  if constexpr (Storage::kHasBeside) {
    return Draws<Storage::kShare>(work.arguments.key[work.tensor], step,
                                  work.arguments.extent[work.tensor], work.begin);
  } else {
    return std::false_type{};
  }
}

// All that a skipped step does.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void zero_gradients(const Work<Functor, Storage, kWhole>& work, int thread) {
  if (!work.arguments.zero_grads) return;
  Mixed::with_type(work.arguments.format.grad, [&](auto type) {
    using T = decltype(type);
    T* grad = static_cast<T*>(work.arrays.slot[kGrad]);
    for (std::int64_t i = work.begin + thread; i < work.end; i += kThreads) grad[i] = T{};
  });
}

}  // namespace fused_adamw::cuda
