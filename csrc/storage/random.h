// Random bits for stochastic rounding (Gupta et al., arXiv 1502.02551).
//
// [note: random bits] They are a function of the optimizer's seed, the parameter's number, the
// steps taken, and the index of the element in the whole tensor, and of nothing else: neither
// threads nor launches nor the cut of a tensor into shards decide a bit, and a run that is resumed
// draws what it would have drawn. Two rounds of multiply and xor-shift (the constants of lowbias32,
// Chris Wellons) mix a counter; a second word of the key comes between them, so that no two keys
// see one sequence in another order.
#pragma once

#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

FUSED_ADAMW_HD std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Of the elements of one tensor at one step whose global indices share their upper 32 bits.
struct RandomStream {
  static constexpr std::uint32_t kFactor = 0x846ca68bu;
  std::uint32_t first, second;  // the second times kFactor

  FUSED_ADAMW_HD RandomStream(std::uint64_t key, std::uint32_t step, std::uint32_t upper) {
    first = mix(mix(static_cast<std::uint32_t>(key) + step) + upper);
    second = mix(first ^ static_cast<std::uint32_t>(key >> 32)) * kFactor;
  }

  // 32 bits for an element.
  FUSED_ADAMW_HD std::uint32_t bits(std::uint32_t lower) const { return finished(folded(lower)); }

  // In two parts, since folded(lower + j) is folded(lower) ^ j where `lower` is a multiple of a
  // power of two, at most 2^16, that is above j.
  FUSED_ADAMW_HD std::uint32_t folded(std::uint32_t lower) const {
    const std::uint32_t x = lower ^ first;
    return x ^ x >> 16;
  }
  FUSED_ADAMW_HD std::uint32_t finished(std::uint32_t x) const {
    x *= 0x7feb352du;
    x = (x ^ x >> 15) * kFactor + second;
    return x ^ x >> 16;
  }
};

// 16 of an element's bits for each of its numbers: the parameter, or state `k`.
FUSED_ADAMW_HD std::uint32_t bits_of_param(std::uint32_t bits) { return bits & 0xffffu; }
FUSED_ADAMW_HD std::uint32_t bits_of_state(std::uint32_t bits, int k) {
  const std::uint32_t odd = k == 0 ? 0x9e3779b1u : k == 1 ? 0x85ebca77u : 0xc2b2ae3du;
  return bits * odd >> 16;
}

// The key of a parameter's streams: splitmix64 (Steele, Lea & Flood, OOPSLA 2014).
inline std::uint64_t splitmix(std::uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
inline std::uint64_t random_key(std::uint64_t seed, std::uint64_t parameter) {
  return splitmix(splitmix(seed) + parameter);
}

}  // namespace fused_adamw
