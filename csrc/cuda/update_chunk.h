// The body of the CUDA kernel: what one thread of one block does. Plain C++ with no CUDA built-ins,
// so that a host can play the grid and compare bits (cuda/host_grid.cpp).
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "cuda/launch_arguments.h"

namespace fused_adamw::cuda {

constexpr int kAccessBytes = 16;

constexpr int smaller(int x, int y) { return x < y ? x : y; }

// Elements a thread holds at once: a 16-byte access of the narrowest array, two of a wider one.
template <class Format>
constexpr int kElementsPerThread =
    kAccessBytes / smaller(sizeof(typename Format::Param),
                           smaller(sizeof(typename Format::Grad), sizeof(typename Format::State)));

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
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) pack.at[j] = from_float<T>(from[j]);
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j < count) to[j] = from_float<T>(from[j]);
    }
  }
}

// The arrays of one tensor, typed.
template <class Rule, class Format>
struct Arrays {
  typename Format::Param* param;
  const typename Format::Grad* grad;
  typename Format::State* state[Rule::kStates];

  FUSED_ADAMW_HD Arrays(const LaunchArguments<Rule>& arguments, int tensor) {
    param = static_cast<typename Format::Param*>(arguments.slot[kParam][tensor]);
    grad = static_cast<const typename Format::Grad*>(arguments.slot[kGrad][tensor]);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Rule::kStates; ++k) {
      state[k] = static_cast<typename Format::State*>(arguments.slot[kFirstState + k][tensor]);
    }
  }

  FUSED_ADAMW_HD bool aligned() const {
    auto bits = reinterpret_cast<std::uintptr_t>(param) | reinterpret_cast<std::uintptr_t>(grad);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Rule::kStates; ++k) bits |= reinterpret_cast<std::uintptr_t>(state[k]);
    return bits % kAccessBytes == 0;
  }
};

// Elements [begin, end) of one tensor, kCount at a time by each thread: full and ragged packs
// through the same equations.
template <int kCount, class Rule, class Format>
FUSED_ADAMW_HD void update_range(const Arrays<Rule, Format>& arrays,
                                 const typename Rule::Coefficients& coefficients,
                                 std::int64_t begin, std::int64_t end, int thread) {
  for (std::int64_t i = begin + thread * kCount; i < end; i += kThreads * kCount) {
    const int count = end - i < kCount ? static_cast<int>(end - i) : kCount;
    float param[kCount], grad[kCount], state[Rule::kStates][kCount];
    load(arrays.param + i, count, param);
    load(arrays.grad + i, count, grad);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Rule::kStates; ++k) load(arrays.state[k] + i, count, state[k]);

    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      float s[Rule::kStates];
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < Rule::kStates; ++k) s[k] = state[k][j];
      Rule::update(coefficients, param[j], grad[j], s);
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < Rule::kStates; ++k) state[k][j] = s[k];
    }

    store(arrays.param + i, count, param);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < Rule::kStates; ++k) store(arrays.state[k] + i, count, state[k]);
  }
}

// The tensor that chunk `block` belongs to: the last one that starts at or before it.
template <class Rule>
FUSED_ADAMW_HD int tensor_of(const LaunchArguments<Rule>& arguments, std::uint32_t block) {
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

template <class Rule, class Format>
FUSED_ADAMW_HD void update_chunk(const LaunchArguments<Rule>& arguments, std::uint32_t block,
                                 int thread) {
  const int tensor = tensor_of(arguments, block);
  const std::int64_t begin =
      static_cast<std::int64_t>(block - arguments.first_chunk[tensor]) * kChunk;
  const std::int64_t left = arguments.numel[tensor] - begin;
  const std::int64_t end = begin + (left < kChunk ? left : kChunk);
  const typename Rule::Coefficients coefficients = arguments.rows[arguments.row[tensor]];

  const Arrays<Rule, Format> arrays(arguments, tensor);
  if (arrays.aligned()) {
    update_range<kElementsPerThread<Format>>(arrays, coefficients, begin, end, thread);
  } else {
    update_range<1>(arrays, coefficients, begin, end, thread);
  }
}

}  // namespace fused_adamw::cuda
