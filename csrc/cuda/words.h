// Numbers of 8 and 16 bits, four at a time: as words, taken apart and put together by a GPU's
// instructions for it. What they mean is in storage/; here are no conversions one by one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/platform.h"
#include "core/state_kind.h"
#include "storage/beside.h"
#include "storage/codes.h"

namespace fused_adamw::cuda {

// A word of four of the bytes 0 to 3 of `low` and 4 to 7 of `high`: a digit of `selector` in base
// 16 says which, the last one for the lowest byte; 8 more, and it is the byte's sign eight times.
FUSED_ADAMW_HD std::uint32_t permuted(std::uint32_t low, std::uint32_t high,
                                      std::uint32_t selector) {
#if defined(__CUDA_ARCH__)
  std::uint32_t word;  // __byte_perm() knows no signs
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(low), "r"(high), "r"(selector));
  return word;
#else
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  std::uint32_t word = 0;
  for (int k = 0; k < 4; ++k) {
    const std::uint32_t digit = selector >> 4 * k & 0xfu;
    const auto byte = static_cast<std::uint32_t>(bytes >> (digit & 7u) * 8 & 0xffu);
    word |= (digit < 8u ? byte : byte < 0x80u ? 0u : 0xffu) << 8 * k;
  }
  return word;
#endif
}

// The lower word of both, one above the other, shifted to the right by less than 32.
FUSED_ADAMW_HD std::uint32_t funnel(std::uint32_t low, std::uint32_t high, int shift) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> shift);
#endif
}

// The uppermost bytes of four words, or their signs; the first one's is the lowest.
FUSED_ADAMW_HD std::uint32_t uppermost(const std::uint32_t (&of)[4]) {
  return permuted(permuted(of[0], of[1], 0x0073), permuted(of[2], of[3], 0x0073), 0x5410);
}
FUSED_ADAMW_HD std::uint32_t signs(const std::uint32_t (&of)[4]) {
  return permuted(permuted(of[0], of[1], 0x00fb), permuted(of[2], of[3], 0x00fb), 0x5410);
}

// [note: carried] The bits of a value plus 0x8000 have the parameter of a remainder as their upper
// half; their lower half is the remainder with its sign turned round.
FUSED_ADAMW_HD float without_carry(std::uint32_t carried) { return float_of(carried - 0x8000u); }
// `random`: what is added before the bits are cut.
FUSED_ADAMW_HD std::uint32_t with_carry(float x, std::uint32_t random) {
  return x != x ? kQuietNan + 0x8000u : bits_of(x) + random + 0x8000u;
}

// Pairs of bfloat16, the first the lower half; `random` has a half for each.
FUSED_ADAMW_HD std::uint32_t pair_rounded_away(float first, float second) {
  return permuted(with_carry(first, 0), with_carry(second, 0), 0x7632);
}
FUSED_ADAMW_HD std::uint32_t pair_rounded_stochastically(float first, float second,
                                                         std::uint32_t random) {
  const std::uint32_t x = first != first ? kQuietNan : bits_of(first) + (random & 0xffffu);
  const std::uint32_t y = second != second ? kQuietNan : bits_of(second) + (random >> 16);
  return permuted(x, y, 0x7632);
}

// Four neighbours' parameters and remainders, from and to the words that have them: two words of
// parameters, and two or one of remainders. `random` has a byte for each.
template <class Kind>
struct Four;
template <class Kind>
constexpr bool kHasFour = !std::is_same_v<Kind, Compensation>;

template <>
struct Four<Remainder16> {
  FUSED_ADAMW_HD static void values(const std::uint32_t* params, const std::uint32_t* remainders,
                                    float* value) {
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < 2; ++w) {
      const std::uint32_t lower = remainders[w] ^ 0x80008000u;
      value[2 * w] = without_carry(permuted(params[w], lower, 0x1054));
      value[2 * w + 1] = without_carry(permuted(params[w], lower, 0x3276));
    }
  }
  FUSED_ADAMW_HD static void store(const float* value, std::uint32_t, std::uint32_t* params,
                                   std::uint32_t* remainders) {
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < 2; ++w) {
      const std::uint32_t x = with_carry(value[2 * w], 0), y = with_carry(value[2 * w + 1], 0);
      params[w] = permuted(x, y, 0x7632);
      remainders[w] = permuted(x, y, 0x5410) ^ 0x80008000u;
    }
  }
};

template <>
struct Four<Remainder8> {
  FUSED_ADAMW_HD static void values(const std::uint32_t* params, const std::uint32_t* remainders,
                                    float* value) {
    // With zeros for the lowest bytes.
    const std::uint32_t even = (remainders[0] ^ 0x80808080u) & 0x00ff00ffu;
    const std::uint32_t odd = (remainders[0] ^ 0x80808080u) & 0xff00ff00u;
    value[0] = without_carry(permuted(params[0], even, 0x1045));
    value[1] = without_carry(permuted(params[0], odd, 0x3254));
    value[2] = without_carry(permuted(params[1], even, 0x1067));
    value[3] = without_carry(permuted(params[1], odd, 0x3276));
  }
  FUSED_ADAMW_HD static void store(const float* value, std::uint32_t random, std::uint32_t* params,
                                   std::uint32_t* remainders) {
    std::uint32_t x[4];
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = with_carry(value[j], permuted(random, 0, 0x4440u + j));
    params[0] = permuted(x[0], x[1], 0x7632);
    params[1] = permuted(x[2], x[3], 0x7632);
    const std::uint32_t first = permuted(x[0], x[1], 0x0051), second = permuted(x[2], x[3], 0x0051);
    remainders[0] = permuted(first, second, 0x5410) ^ 0x80808080u;
  }
};

// The larger of a magnitude, as bits, and that of another number. A NaN's payload is whatever it
// is.
FUSED_ADAMW_HD std::uint32_t larger_magnitude(std::uint32_t magnitude, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;  // in one instruction
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(float_of(magnitude)), "f"(fabsf(x)));
  return bits_of(larger);
#else
  const std::uint32_t other = bits_of(x) & 0x7fffffffu;
  return other > magnitude ? other : magnitude;
#endif
}

// The codes of four numbers of a block, the first one's the lowest byte.
template <StateKind kKind>
FUSED_ADAMW_HD std::uint32_t codes_of(const float (&x)[4], float factor) {
  using Codes = Codes<kKind>;
  std::uint32_t bits[4], code[4];
  FUSED_ADAMW_UNROLL
  for (int j = 0; j < 4; ++j) {
    bits[j] = bits_of(x[j]);
    code[j] = Codes::shifted_code(x[j], factor) << (24 - Codes::kShift);
  }
  std::uint32_t word = uppermost(code);
  if constexpr (Codes::kIsSigned) {
    // To negate a byte below 128: its complement plus one, which must not be carried on.
    const std::uint32_t negative = signs(bits);
    word = ((word ^ negative) & 0x7f7f7f7fu) + (negative & 0x01010101u);
    word ^= negative & 0x80808080u;
  } else if (((word - 0x01010101u) & ~word & 0x80808080u) != 0) {  // a byte is 0
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (Codes::magnitude_bits(x[j]) != 0 && (word >> 8 * j & 0xffu) == 0) word |= 1u << 8 * j;
    }
  }
  return word;
}

}  // namespace fused_adamw::cuda
