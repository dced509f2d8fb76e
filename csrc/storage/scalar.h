// How one value lives in memory: exact widening to binary32, and rounding to nearest even back.
// Integer arithmetic throughout, so that the compiler vectorises it and every engine agrees.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/platform.h"

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
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  // Read as binary32 the exponent is 112 too small: an exact product mends it, denormals included.
  const std::uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;  // infinity, NaN
  return float_of(sign | (special ? magnitude | 0x7f800000u : finite));
}

template <class T>
FUSED_ADAMW_HD T from_float(float x);

template <>
FUSED_ADAMW_HD float from_float<float>(float x) {
  return x;
}

template <>
FUSED_ADAMW_HD bfloat16 from_float<bfloat16>(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? 0x7fc0u : rounded)};
}

template <>
FUSED_ADAMW_HD float16 from_float<float16>(float x) {
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
}

}  // namespace fused_adamw
