// Random bits for stochastic rounding (Gupta et al., arXiv 1502.02551).
//
// [note: random bits] They are a function of the optimizer's seed, the parameter's number, the
// steps taken, and the number of the element in the whole tensor (of a shard's: [note: runs] in
// core/extent.h), and of nothing else: neither threads nor launches nor the cut of a tensor into
// shards decide a bit, and a run that is resumed draws what it would have drawn. A word of 32 bits
// serves two neighbours with 16 bits each, or four with 8; its own index is theirs divided by 2 or
// 4. Two rounds of multiply and xor-shift (the constants of lowbias32, Chris Wellons) mix that
// index; a second word of the key comes between them, so that no two keys see one sequence in
// another order.
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

// Of one tensor at one step, for words whose indices share their upper 32 bits.
struct RandomStream {
  std::uint32_t first, second;

  FUSED_ADAMW_HD RandomStream(std::uint64_t key, std::uint32_t step, std::uint32_t upper) {
    first = mix(mix(static_cast<std::uint32_t>(key) + step) + upper);
    second = mix(first ^ static_cast<std::uint32_t>(key >> 32));
  }

  FUSED_ADAMW_HD std::uint32_t word(std::uint32_t lower) const {
    std::uint32_t x = lower ^ first;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x += second;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
  }
};

// Elements that share a word, as a power of two.
constexpr int kShareOf16Bits = 1, kShareOf8Bits = 2;

// The word that rounds state `k` where `word` rounds the parameter.
FUSED_ADAMW_HD std::uint32_t word_of_state(std::uint32_t word, int k) {
  const std::uint32_t odd = k == 0 ? 0x9e3779b1u : k == 1 ? 0x85ebca77u : 0xc2b2ae3du;
  const std::uint32_t product = word * odd;
  return product ^ product >> 16;  // whose lower half alone would follow from the word's
}

// An element's part of its word.
FUSED_ADAMW_HD std::uint32_t half_of(std::uint32_t word, std::int64_t index) {
  return index & 1 ? word >> 16 : word & 0xffffu;
}
FUSED_ADAMW_HD std::uint32_t byte_of(std::uint32_t word, std::int64_t index) {
  return word >> 8 * static_cast<int>(index & 3) & 0xffu;
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
