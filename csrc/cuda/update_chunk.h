// The body of the CUDA kernel: what one thread of one block does. Plain C++ with no CUDA built-ins,
// so that a host can play the grid and compare bits (cuda/host_grid.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/platform.h"
#include "cuda/launch_arguments.h"
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

// The arrays of one tensor.
template <class Functor>
struct Arrays {
  static constexpr int kSlots = kFirstState + Functor::kStates;
  void* slot[kSlots];

  FUSED_ADAMW_HD Arrays(const LaunchArguments<Functor>& arguments, int tensor) {
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kSlots; ++k) slot[k] = arguments.slot[k][tensor];
  }

  FUSED_ADAMW_HD bool aligned() const {
    std::uintptr_t bits = 0;
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kSlots; ++k) bits |= reinterpret_cast<std::uintptr_t>(slot[k]);
    return bits % kAccessBytes == 0;
  }
};

// Elements [begin, end) of one tensor, which are a multiple of kCount, so many at a time by each
// thread.
template <int kCount, class Storage, class Functor>
FUSED_ADAMW_HD void update_range(const Arrays<Functor>& arrays, const Format& format,
                                 const typename Functor::Coefficients& coefficients,
                                 std::int64_t begin, std::int64_t end, int thread) {
  constexpr int kStates = Functor::kStates, kSlots = kFirstState + kStates;
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
      Functor::update(coefficients, value[kParam][j], value[kGrad][j], state);
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
  }
}

// The tensor that chunk `block` belongs to: the last one that starts at or before it.
template <class Functor>
FUSED_ADAMW_HD int tensor_of(const LaunchArguments<Functor>& arguments, std::uint32_t block) {
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

template <class Functor, class Storage>
FUSED_ADAMW_HD void update_chunk(const LaunchArguments<Functor>& arguments, std::uint32_t block,
                                 int thread) {
  const int tensor = tensor_of(arguments, block);
  const std::int64_t begin =
      static_cast<std::int64_t>(block - arguments.first_chunk[tensor]) * kChunk;
  const std::int64_t left = arguments.numel[tensor] - begin;
  const std::int64_t end = begin + (left < kChunk ? left : kChunk);
  const typename Functor::Coefficients coefficients = arguments.rows[arguments.row[tensor]];

  const Arrays<Functor> arrays(arguments, tensor);
  // Whole packs, and what is left of the tensor, or all of one that is not aligned.
  constexpr int kPack = Storage::kPerThread;
  const std::int64_t rest = arrays.aligned() ? begin + (end - begin) / kPack * kPack : begin;
  update_range<kPack, Storage>(arrays, arguments.format, coefficients, begin, rest, thread);
  update_range<1, Storage>(arrays, arguments.format, coefficients, rest, end, thread);
}

}  // namespace fused_adamw::cuda
