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

// Reads `count` of kCount elements; a full pack is read by 16-byte accesses.
template <int kCount, class T>
FUSED_ADAMW_HD void load(const T* from, int count, float (&to)[kCount]) {
  if (count == kCount) {
    const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) to[j] = to_float(pack.at[j]);
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) to[j] = j < count ? to_float(from[j]) : 0.0f;
  }
}

template <int kCount, class T>
FUSED_ADAMW_HD void store(T* to, int count, const float (&from)[kCount]) {
  if (count == kCount) {
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
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j < count) to[j] = from_float<T>(from[j]);
    }
  }
}

// How an update reaches its arrays: all of one dtype that the compiler knows, or of several that
// are told apart when it runs, by branches that all threads take alike. `kPerThread` is what a
// thread holds of each array at once: a 16-byte access of the narrowest, two of a wider one.
template <class T>
struct Uniform {
  static constexpr int kPerThread = kAccessBytes / static_cast<int>(sizeof(T));

  template <int kCount>
  FUSED_ADAMW_HD static void load_slot(const void* array, Dtype, std::int64_t i, int count,
                                       float (&to)[kCount]) {
    load(static_cast<const T*>(array) + i, count, to);
  }
  template <int kCount>
  FUSED_ADAMW_HD static void store_slot(void* array, Dtype, std::int64_t i, int count,
                                        const float (&from)[kCount]) {
    store(static_cast<T*>(array) + i, count, from);
  }
};

struct Mixed {
  static constexpr int kPerThread = kAccessBytes / 2;

  template <int kCount>
  FUSED_ADAMW_HD static void load_slot(const void* array, Dtype dtype, std::int64_t i, int count,
                                       float (&to)[kCount]) {
    if (dtype == Dtype::kFloat32) {
      load(static_cast<const float*>(array) + i, count, to);
    } else if (dtype == Dtype::kBfloat16) {
      load(static_cast<const bfloat16*>(array) + i, count, to);
    } else {
      load(static_cast<const float16*>(array) + i, count, to);
    }
  }
  template <int kCount>
  FUSED_ADAMW_HD static void store_slot(void* array, Dtype dtype, std::int64_t i, int count,
                                        const float (&from)[kCount]) {
    if (dtype == Dtype::kFloat32) {
      store(static_cast<float*>(array) + i, count, from);
    } else if (dtype == Dtype::kBfloat16) {
      store(static_cast<bfloat16*>(array) + i, count, from);
    } else {
      store(static_cast<float16*>(array) + i, count, from);
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

// Elements [begin, end) of one tensor, kCount at a time by each thread: full and ragged packs
// through the same equations.
template <int kCount, class Storage, class Functor>
FUSED_ADAMW_HD void update_range(const Arrays<Functor>& arrays, const Format& format,
                                 const typename Functor::Coefficients& coefficients,
                                 std::int64_t begin, std::int64_t end, int thread) {
  constexpr int kStates = Functor::kStates;
  for (std::int64_t i = begin + thread * kCount; i < end; i += kThreads * kCount) {
    const int count = end - i < kCount ? static_cast<int>(end - i) : kCount;
    float value[Arrays<Functor>::kSlots][kCount];
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kFirstState + kStates; ++k) {
      Storage::load_slot(arrays.slot[k], format.of_slot(k), i, count, value[k]);
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
    for (int k = 0; k < kFirstState + kStates; ++k) {
      if (k == kGrad) continue;
      Storage::store_slot(arrays.slot[k], format.of_slot(k), i, count, value[k]);
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
  if (arrays.aligned()) {
    update_range<Storage::kPerThread, Storage>(arrays, arguments.format, coefficients, begin, end,
                                               thread);
  } else {
    update_range<1, Storage>(arrays, arguments.format, coefficients, begin, end, thread);
  }
}

}  // namespace fused_adamw::cuda
