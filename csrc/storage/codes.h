// States as codes of 8 bits in blocks with one scale each (Dettmers et al., arXiv 2110.02861).
//
// [note: codes] The largest magnitude of a block is its scale. A magnitude a becomes
// t = a / scale * top + bias, and a code is the leading bits of t as a binary32 number: its
// exponent, counted from that of the bias, and 5 bits of its mantissa. So steps are equal within a
// binade of t and halve from one to the next below, down to the bias: values that are small beside
// the block's largest keep precision, as in G.711's companding of speech. Either way is an
// addition, a product and a shift: no table, no root, no conversion between integers and floating
// point.
//
//   signed     bias 1/16,  4 binades of 32 steps and a sign: first moments
//   square     bias 1/256, 8 binades, of the root: second moments. What is above zero never becomes
//              zero, which a step would be divided by
//   magnitude  bias 1/256, of the number itself, which is not negative
//
// A block that has an infinity or a NaN becomes NaN: it must stay visible. One whose scale is
// denormal becomes zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/platform.h"
#include "core/state_kind.h"
#include "storage/scalar.h"

namespace fused_adamw {

constexpr int kCodeBlock = 64;  // neighbours in memory order

template <StateKind kKind>
struct Codes {
  static constexpr bool kIsSigned = kKind == StateKind::kSigned;
  static constexpr int kShift = 18;  // of a binary32's 23 bits of mantissa 5 stay
  static constexpr std::uint32_t kHalf = 1u << (kShift - 1);
  static constexpr std::uint32_t kFirst = (kIsSigned ? 0x3d800000u : 0x3b800000u) >> kShift;
  static constexpr float kBias = kIsSigned ? 1.0f / 16 : 1.0f / 256;
  static constexpr float kTop = 63.0f / 64 - kBias;  // the last code is 63/64
  static constexpr float kUnit = 1.0f / kTop;

  // The bits of the magnitude that is coded: ordered as the magnitudes are, a NaN above all.
  FUSED_ADAMW_HD static std::uint32_t magnitude_bits(float x) {
    return bits_of(kKind == StateKind::kSquare ? sqrtf(x) : x) & 0x7fffffffu;
  }

  // `largest`: of a block's magnitudes, as bits.
  FUSED_ADAMW_HD static float scale_of(std::uint32_t largest) {
    if (largest >= 0x7f800000u) return float_of(0x7fc00000u);
    return largest < 0x00800000u ? 0.0f : float_of(largest);
  }
  // What a magnitude is multiplied by; 0 for a block whose codes are 0.
  FUSED_ADAMW_HD static float factor_of(float scale) { return scale > 0.0f ? kTop / scale : 0.0f; }

  // `magnitude`: as bits, of a block whose factor is not 0.
  FUSED_ADAMW_HD static int code_of(std::uint32_t magnitude, bool negative, float factor) {
    const float t = float_of(magnitude) * factor + kBias;
    const int code = static_cast<int>(((bits_of(t) + kHalf) >> kShift) - kFirst);
    if constexpr (kIsSigned) return negative ? -code : code;
    return code == 0 && magnitude != 0 ? 1 : code;
  }

  FUSED_ADAMW_HD static float unit_of(float scale) { return scale * kUnit; }

  FUSED_ADAMW_HD static float value_of(int code, float unit) {
    const bool negative = kIsSigned && code < 0;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(negative ? -code : code);
    const float a = (float_of((magnitude + kFirst) << kShift) - kBias) * unit;
    if constexpr (kKind == StateKind::kSquare) return a * a;
    return negative ? -a : a;
  }
};

// Calls visit(Codes<kind>{}).
template <class Visit>
FUSED_ADAMW_HD void visit_codes(StateKind kind, Visit&& visit) {
  if (kind == StateKind::kSigned) return visit(Codes<StateKind::kSigned>{});
  if (kind == StateKind::kSquare) return visit(Codes<StateKind::kSquare>{});
  visit(Codes<StateKind::kMagnitude>{});
}

}  // namespace fused_adamw
