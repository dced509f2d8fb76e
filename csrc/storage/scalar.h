// How one value lives in memory: exact widening to binary32, and rounding to nearest even back.
//
// [note: conversions] On a host in integer arithmetic, which the compiler vectorises. A GPU has
// instructions for them, to round even two neighbours at once: with the same bits, but for the
// payload of a NaN, which no engine promises.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/platform.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FUSED_ADAMW_ROUNDS_PAIRS  // to either dtype, and a single number to bfloat16
#endif

namespace fused_adamw {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

FUSED_ADAMW_HD std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSED_ADAMW_HD float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FUSED_ADAMW_HD float to_float(float x) { return x; }

FUSED_ADAMW_HD float to_float(bfloat16 x) {
  return float_of(static_cast<std::uint32_t>(x.bits) << 16);
}

FUSED_ADAMW_HD float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float widened;
  asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(x.bits));
  return widened;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  // Read as binary32 the exponent is 112 too small: an exact product mends it, denormals included.
  const std::uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;  // infinity, NaN
  return float_of(sign | (special ? magnitude | 0x7f800000u : finite));
#endif
}

template <class T>
FUSED_ADAMW_HD T from_float(float x);

template <>
FUSED_ADAMW_HD float from_float<float>(float x) {
  return x;
}

// The upper half is the bfloat16 nearest to x, unless x is a NaN: one whose lower half is not zero
// may be carried into infinity or zero.
FUSED_ADAMW_HD std::uint32_t rounded_to_bfloat16(float x) {
  const std::uint32_t u = bits_of(x);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

template <>
FUSED_ADAMW_HD bfloat16 from_float<bfloat16>(float x) {
#if defined(FUSED_ADAMW_ROUNDS_PAIRS)
  bfloat16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  return {static_cast<std::uint16_t>(x != x ? 0x7fc0u : rounded_to_bfloat16(x) >> 16)};
#endif
}

template <>
FUSED_ADAMW_HD float16 from_float<float16>(float x) {
#if defined(__CUDA_ARCH__)
  float16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const std::uint32_t u = bits_of(x);
  const std::uint32_t sign = (u >> 16) & 0x8000u;
  const std::uint32_t magnitude = u & 0x7fffffffu;
  // From 2^-14: rebias the exponent and round away 13 bits; a carry past 65504 gives infinity.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below: adding 1/2 lines the last place of a float16 denormal up with that of binary32.
  const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x47800000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return {static_cast<std::uint16_t>(sign | h)};
#endif
}

// Two neighbours of a 16-bit array as one word, the first in the lower half (little-endian): so
// they can be taken apart and put together within the lanes of a 32-bit vector.
template <class T>
FUSED_ADAMW_HD float first_of(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair & 0xffffu)});
}

template <class T>
FUSED_ADAMW_HD float second_of(std::uint32_t pair) {
  return to_float(T{static_cast<std::uint16_t>(pair >> 16)});
}

template <class T>
FUSED_ADAMW_HD std::uint32_t pair_of(float first, float second) {
#if defined(FUSED_ADAMW_ROUNDS_PAIRS)
  std::uint32_t pair;  // whose upper half these instructions name first
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return from_float<T>(first).bits | static_cast<std::uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

}  // namespace fused_adamw
