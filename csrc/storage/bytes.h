// Bytes of words, taken apart and put together.
#pragma once

#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

// A word of four of the bytes 0 to 3 of `low` and 4 to 7 of `high`: a digit of `selector` in base
// 16 says which, the last one for the lowest byte. One instruction of a GPU.
FUSED_ADAMW_HD std::uint32_t permuted(std::uint32_t low, std::uint32_t high,
                                      std::uint32_t selector) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, selector);
#else
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  std::uint32_t word = 0;
  for (int k = 0; k < 4; ++k) {
    word |= static_cast<std::uint32_t>(bytes >> (selector >> 4 * k & 7u) * 8 & 0xffu) << 8 * k;
  }
  return word;
#endif
}

}  // namespace fused_adamw
