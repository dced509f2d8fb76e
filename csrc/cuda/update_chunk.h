// The body of the CUDA kernel: what one thread of one block does. Plain C++ with no CUDA built-ins,
// so that a host can play the grid and compare bits (cuda/host_grid.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/platform.h"
#include "cuda/launch_arguments.h"
#include "cuda/tick.h"
#include "rules/rule.h"

namespace fused_adamw::cuda {

constexpr int kAccessBytes = 16;

template <class T, int kCount>
struct alignas(kCount == 1 ? alignof(T) : kAccessBytes) Pack {
  T at[kCount];
};

// [note: loads] A thread reads its part of every array before it widens any of them, so that all
// loads are under way together. Till then it keeps them as they lie in memory.
template <int kBytes>
struct alignas(kAccessBytes) Raw {
  unsigned char bytes[kBytes];
};

template <class T, int kCount, int kBytes>
FUSED_ADAMW_HD void load(const T* from, Raw<kBytes>& to) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
  memcpy(&to, &pack, sizeof pack);
}

template <class T, int kCount, int kBytes>
FUSED_ADAMW_HD void widen(const Raw<kBytes>& from, float (&to)[kCount]) {
  Pack<T, kCount> pack;
  memcpy(&pack, &from, sizeof pack);
  FUSED_ADAMW_UNROLL
  for (int j = 0; j < kCount; ++j) to[j] = to_float(pack.at[j]);
}

template <class T, int kCount>
FUSED_ADAMW_HD void store(T* to, const float (&from)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(T) == 2 && kCount > 1) {  // [note: conversions]
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; j += 2) {
      const std::uint32_t pair = pair_of<T>(from[j], from[j + 1]);
      memcpy(&pack.at[j], &pair, sizeof pair);
    }
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) pack.at[j] = from_float<T>(from[j]);
  }
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// How an update reaches its arrays: all of one dtype that the compiler knows, or of several that
// are told apart when it runs, by branches that all threads take alike. `kPerThread` is what a
// thread holds of each array at once: a 16-byte access of the narrowest, two of a wider one.
// with_type(dtype, use) calls use(T{}) with the type of an array's elements.
template <class T>
struct Uniform {
  static constexpr int kWidest = sizeof(T);
  static constexpr int kPerThread = kAccessBytes / kWidest;

  template <class Use>
  FUSED_ADAMW_HD static void with_type(Dtype, Use&& use) {
    use(T{});
  }
};

struct Mixed {
  static constexpr int kWidest = sizeof(float);
  static constexpr int kPerThread = kAccessBytes / 2;

  template <class Use>
  FUSED_ADAMW_HD static void with_type(Dtype dtype, Use&& use) {
    if (dtype == Dtype::kFloat32) {
      use(float{});
    } else if (dtype == Dtype::kBfloat16) {
      use(bfloat16{});
    } else {
      use(float16{});
    }
  }
};

// Whether kernels are compiled for a whole step over a storage. Where every array is bfloat16 an
// average is not, so Mixed does it.
template <class Storage>
constexpr bool kHasWhole = true;
template <>
constexpr bool kHasWhole<Uniform<bfloat16>> = false;

// Calls visit(Storage{}) with the way to the arrays of a format.
template <class Visit>
void visit_storage(const Format& format, bool whole, Visit&& visit) {
  if (format.all(Dtype::kFloat32)) return visit(Uniform<float>{});
  if (format.all(Dtype::kBfloat16) && !whole) return visit(Uniform<bfloat16>{});
  visit(Mixed{});
}

// The arrays of one tensor.
template <class Functor, bool kWhole>
struct Arrays {
  static constexpr int kSlots = kFirstState + Functor::kStates;
  static constexpr int kPointers = kSlots + kWhole;
  void* slot[kPointers];

  FUSED_ADAMW_HD Arrays(const LaunchArguments<Functor, kWhole>& arguments, int tensor) {
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kPointers; ++k) slot[k] = arguments.slot[k][tensor];
  }

  FUSED_ADAMW_HD float* ema() const { return static_cast<float*>(slot[kPointers - 1]); }

  FUSED_ADAMW_HD bool aligned() const {
    std::uintptr_t bits = 0;
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kPointers; ++k) bits |= reinterpret_cast<std::uintptr_t>(slot[k]);
    return bits % kAccessBytes == 0;
  }
};

// Elements [begin, end) of one tensor, which are a multiple of kCount, so many at a time by each
// thread.
template <int kCount, class Storage, class Functor, bool kWhole>
FUSED_ADAMW_HD void update_range(const LaunchArguments<Functor, kWhole>& arguments,
                                 const Arrays<Functor, kWhole>& arrays, const Row<Functor>& row,
                                 std::int64_t begin, std::int64_t end, int thread,
                                 Observation& observed) {
  constexpr int kStates = Functor::kStates, kSlots = kFirstState + kStates;
  const Format format = arguments.format;
  FUSED_ADAMW_NO_UNROLL  // the rest of a tensor is not worth the registers
      for (std::int64_t i = begin + thread * kCount; i < end; i += kThreads * kCount) {
    Raw<kCount * Storage::kWidest> raw[kSlots];
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      Storage::with_type(format.of_slot(k), [&](auto type) {
        using T = decltype(type);
        load<T, kCount>(static_cast<const T*>(arrays.slot[k]) + i, raw[k]);
      });
    }
    Raw<kCount * sizeof(float)> raw_ema{};
    if constexpr (kWhole) {
      if (arguments.has_ema) load<float, kCount>(arrays.ema() + i, raw_ema);
    }
    float value[kSlots][kCount];
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      Storage::with_type(format.of_slot(k),
                         [&](auto type) { widen<decltype(type)>(raw[k], value[k]); });
    }

    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      StateArray<kStates> state;
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) state[k] = value[kFirstState + k][j];
      Functor::update(row.rule, value[kParam][j], value[kGrad][j] * row.pass.grad_factor, state);
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) value[kFirstState + k][j] = state[k];
    }

    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      if (k == kGrad) continue;
      Storage::with_type(format.of_slot(k), [&](auto type) {
        store(static_cast<decltype(type)*>(arrays.slot[k]) + i, value[k]);
      });
    }

    if constexpr (kWhole) {
      if (arguments.has_ema || arguments.observed != nullptr) {  // they follow what was stored
        Storage::with_type(format.param, [&](auto type) {
          using T = decltype(type);
          FUSED_ADAMW_UNROLL
          for (int j = 0; j < kCount; ++j)
            value[kParam][j] = to_float(from_float<T>(value[kParam][j]));
        });
      }
      if (arguments.observed != nullptr) {
        float before[kCount];
        Storage::with_type(format.param,
                           [&](auto type) { widen<decltype(type)>(raw[kParam], before); });
        FUSED_ADAMW_UNROLL
        for (int j = 0; j < kCount; ++j) {
          observed = observed + observe(value[kGrad][j], before[j], value[kParam][j]);
        }
      }
      if (arguments.has_ema) {
        float ema[kCount];
        widen<float>(raw_ema, ema);
        FUSED_ADAMW_UNROLL
        for (int j = 0; j < kCount; ++j) {
          ema[j] = averaged(ema[j], value[kParam][j], row.pass.ema_weight);
        }
        store(arrays.ema() + i, ema);
      }
      if (arguments.zero_grads) {
        const float zero[kCount] = {};
        Storage::with_type(format.grad, [&](auto type) {
          store(static_cast<decltype(type)*>(arrays.slot[kGrad]) + i, zero);
        });
      }
    }
  }
}

// All that a skipped step does.
template <class Functor, bool kWhole>
FUSED_ADAMW_HD void zero_gradients(const LaunchArguments<Functor, kWhole>& arguments,
                                   const Arrays<Functor, kWhole>& arrays, std::int64_t begin,
                                   std::int64_t end, int thread) {
  if (!arguments.zero_grads) return;
  Mixed::with_type(arguments.format.grad, [&](auto type) {
    using T = decltype(type);
    T* grad = static_cast<T*>(arrays.slot[kGrad]);
    for (std::int64_t i = begin + thread; i < end; i += kThreads) grad[i] = T{};
  });
}

// What thread `thread` of block `block` does; returns what it observed.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD Observation update_chunk(const LaunchArguments<Functor, kWhole>& arguments,
                                        std::uint32_t block, int thread) {
  const int tensor = tensor_of(arguments, block);
  const std::int64_t begin =
      static_cast<std::int64_t>(block - arguments.first_chunk[tensor]) * kChunk;
  const std::int64_t left = arguments.numel[tensor] - begin;
  const std::int64_t end = begin + (left < kChunk ? left : kChunk);
  const Arrays<Functor, kWhole> arrays(arguments, tensor);
  if (arguments.skip && *arguments.skip) {
    if constexpr (kWhole) zero_gradients(arguments, arrays, begin, end, thread);
    return {};
  }
  const int index = arguments.row[tensor];
  const Row<Functor> row =
      arguments.device_rows
          ? *reinterpret_cast<const Row<Functor>*>(arguments.device_rows +
                                                   static_cast<std::int64_t>(index) * kDeviceRow)
          : arguments.rows[index];

  // Whole packs, and what is left of the tensor, or all of one that is not aligned.
  constexpr int kPack = Storage::kPerThread;
  const std::int64_t rest = arrays.aligned() ? begin + (end - begin) / kPack * kPack : begin;
  Observation observed{};
  update_range<kPack, Storage>(arguments, arrays, row, begin, rest, thread, observed);
  update_range<1, Storage>(arguments, arrays, row, rest, end, thread, observed);
  return observed;
}

// Where the block's observation goes.
template <class Functor, bool kWhole>
FUSED_ADAMW_HD Observation& observation_of(const LaunchArguments<Functor, kWhole>& arguments,
                                           std::uint32_t block) {
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
