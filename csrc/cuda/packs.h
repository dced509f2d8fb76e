// What a thread holds of an array at once, in memory and in registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/platform.h"
#include "cuda/storages.h"
#include "storage/scalar.h"

namespace fused_adamw::cuda {

template <class T, int kCount>
struct alignas(kCount == 1 ? alignof(T) : kAccessBytes) Pack {
  T at[kCount];
};

// [note: loads] A thread reads its part of every array before it widens any of them, so that all
// loads are under way together. Till then it keeps them as they lie in memory. In words: where
// elements are read one by one, they would otherwise take a register each.
template <int kBytes>
struct alignas(kAccessBytes) Raw {
  std::uint32_t words[(kBytes + 3) / 4];

  // The element that begins at byte `at`.
  template <class T>
  FUSED_ADAMW_HD T get(int at) const {
    const std::uint32_t word = words[at / 4] >> at % 4 * 8;
    T element;
    if constexpr (sizeof(T) == 4) {
      memcpy(&element, &word, sizeof element);
    } else if constexpr (sizeof(T) == 2) {
      const std::uint16_t bits = static_cast<std::uint16_t>(word);
      memcpy(&element, &bits, sizeof element);
    } else {
      element = static_cast<T>(word);
    }
    return element;
  }

  // Puts one there, where zeros were.
  template <class T>
  FUSED_ADAMW_HD void put(int at, T element) {
    std::conditional_t<sizeof(T) == 4, std::uint32_t,
                       std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint8_t>>
        bits;
    memcpy(&bits, &element, sizeof bits);
    words[at / 4] |= static_cast<std::uint32_t>(bits) << at % 4 * 8;
  }
};

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

// kCount elements, from or to byte `at` of what a thread holds: all of them by accesses of 16
// bytes, or one by one those that there are.
template <int kCount>
struct Wide {
  template <class T, int kBytes>
  FUSED_ADAMW_HD void load(const T* from, Raw<kBytes>& to, int at = 0) const {
    const auto pack = *reinterpret_cast<const InMemory<T>*>(from);
    memcpy(reinterpret_cast<unsigned char*>(to.words) + at, &pack, sizeof pack);
  }
  template <class T, int kBytes>
  FUSED_ADAMW_HD void store(T* to, const Raw<kBytes>& from, int at = 0) const {
    InMemory<T> pack;
    memcpy(&pack, reinterpret_cast<const unsigned char*>(from.words) + at, sizeof pack);
    *reinterpret_cast<InMemory<T>*>(to) = pack;
  }

 private:
  template <int kBytes>
  struct __attribute__((may_alias, aligned(kBytes < kAccessBytes ? kBytes : kAccessBytes))) Words {
    std::uint32_t words[kBytes / 4];
  };
  // By words: a compiler would take bytes apart to copy them.
  template <class T>
  using InMemory = std::conditional_t<kCount == 1, Pack<T, 1>, Words<kCount * sizeof(T)>>;
};

template <int kCount>
struct Ragged {
  int count;  // of elements that there are

  template <class T, int kBytes>
  FUSED_ADAMW_HD void load(const T* from, Raw<kBytes>& to, int at = 0) const {
    constexpr int kSize = sizeof(T);
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < (kCount * kSize + 3) / 4; ++w) to.words[at / 4 + w] = 0;
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j < count) to.put(at + j * kSize, from[j]);
    }
  }
  template <class T, int kBytes>
  FUSED_ADAMW_HD void store(T* to, const Raw<kBytes>& from, int at = 0) const {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (j < count) to[j] = from.template get<T>(at + j * static_cast<int>(sizeof(T)));
    }
  }
};

}  // namespace fused_adamw::cuda
