// What keeps a 16-bit parameter's lower bits beside it, so that small steps are not rounded away.
//
// [note: beside] A rule sees the full value, and the full value is what decay and steps act on:
//
//   master        a float32 copy: the value itself
//   remainder16   value = parameter and remainder as one float32: nothing is lost
//   remainder8    the same with the lowest 8 bits rounded stochastically, so that steps below them
//                 act in expectation
//   compensation  value = parameter + what rounding left of it, in bfloat16 (Kahan, CACM 1965)
//
// A remainder is signed, so that the parameter is the nearest bfloat16 and not the one below. Of
// two at the same distance it is the one away from zero: of a remainder of 16 bits there is no
// other, and a master's parameter is rounded likewise, so that the two train one and the same
// model.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "storage/random.h"
#include "storage/scalar.h"

namespace fused_adamw {

enum class Beside : std::uint8_t {
  kNothing,
  kMaster,
  kRemainder16,
  kRemainder8,
  kCompensation,
};
constexpr const char* kBesideNames[] = {"", "master", "remainder16", "remainder8", "compensation"};

FUSED_ADAMW_HD constexpr int besides_size(Beside beside) {
  return beside == Beside::kMaster ? 4 : beside == Beside::kRemainder8 ? 1 : 2;
}

constexpr std::uint32_t kBfloat16Nan = 0x7fc0u, kQuietNan = 0x7fc00000u;

// To the nearest bfloat16, away from zero if there are two.
FUSED_ADAMW_HD bfloat16 rounded_away(float x) {
  return {static_cast<std::uint16_t>(x != x ? kBfloat16Nan : (bits_of(x) + 0x8000u) >> 16)};
}

// Up with the probability of what is cut off; `random` has 16 bits.
FUSED_ADAMW_HD bfloat16 rounded_stochastically(float x, std::uint32_t random) {
  return {static_cast<std::uint16_t>(x != x ? kBfloat16Nan : (bits_of(x) + random) >> 16)};
}

// `Element` beside a bfloat16; `random` has 8 bits, of which only Remainder8 makes use.
struct Remainder16 {
  using Element = std::int16_t;

  FUSED_ADAMW_HD static float value(bfloat16 param, Element remainder) {
    return float_of((static_cast<std::uint32_t>(param.bits) << 16) +
                    static_cast<std::uint32_t>(static_cast<std::int32_t>(remainder)));
  }
  FUSED_ADAMW_HD static void store(float x, std::uint32_t, bfloat16& param, Element& remainder) {
    param = rounded_away(x);
    remainder = static_cast<Element>(x != x ? 0 : bits_of(x) & 0xffffu);
  }
};

struct Remainder8 {
  using Element = std::int8_t;

  FUSED_ADAMW_HD static float value(bfloat16 param, Element remainder) {
    return float_of((static_cast<std::uint32_t>(param.bits) << 16) +
                    (static_cast<std::uint32_t>(static_cast<std::int32_t>(remainder)) << 8));
  }
  FUSED_ADAMW_HD static void store(float x, std::uint32_t random, bfloat16& param,
                                   Element& remainder) {
    // By masks: a compiler would branch around what a NaN does not need.
    const std::uint32_t number = x == x ? 0xffffff00u : 0u;
    const std::uint32_t rounded = ((bits_of(x) + random) & number) | (kQuietNan & ~number);
    param = {static_cast<std::uint16_t>((rounded + 0x8000u) >> 16)};
    remainder = static_cast<Element>(rounded >> 8 & 0xffu);
  }
};

struct Compensation {
  using Element = bfloat16;

  FUSED_ADAMW_HD static float value(bfloat16 param, Element compensation) {
    return to_float(param) + to_float(compensation);
  }
  FUSED_ADAMW_HD static void store(float x, std::uint32_t, bfloat16& param, Element& compensation) {
    param = from_float<bfloat16>(x);
    const float left = x - to_float(param);
    compensation = from_float<bfloat16>(left - left == 0.0f ? left : 0.0f);
  }
};

}  // namespace fused_adamw
