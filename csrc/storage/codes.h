// States as codes of 8 bits in blocks with one scale each (Dettmers et al., arXiv 2110.02861).
//
// [note: codes] The largest magnitude of a block is its scale. A magnitude a becomes
// t = a / scale * top + bias, and a code is the leading bits of t as a binary32 number: its
// exponent, counted from that of the bias, and some bits of its mantissa. So steps are equal within
// a binade of t and halve from one to the next below, down to the bias: values that are small
// beside the block's largest keep precision, as in G.711's companding of speech. Either way is an
// addition, a product and a shift: no table, no root, no conversion between integers and floating
// point.
//
//   signed     bias 2^-4,   4 binades of 32 steps, and a sign: first moments
//   square     bias 2^-16, 16 binades of 16 steps: second moments, as finely as 8 binades of 32
//              would have their roots. What is above zero never becomes zero, which a step would be
//              divided by
//   magnitude  bias 2^-8,   8 binades of 32 steps: what is not negative
//
// A block that has an infinity or a NaN, or 2^127, becomes NaN: it must stay visible. One whose
// scale is denormal becomes zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/platform.h"
#include "core/state_kind.h"
#include "storage/scalar.h"

namespace fused_adamw {

constexpr int kCodeBlock = 64;  // neighbours in memory order

template <StateKind kKind>
struct Codes {
  static constexpr bool kIsSigned = kKind == StateKind::kSigned;
  using Code = std::conditional_t<kIsSigned, std::int8_t, std::uint8_t>;
  static constexpr int kShift = kKind == StateKind::kSquare ? 19 : 18;  // of 23 bits of mantissa
  static constexpr float kBias = kIsSigned                     ? 0x1p-4f
                                 : kKind == StateKind::kSquare ? 0x1p-16f
                                                               : 0x1p-8f;
  static constexpr std::uint32_t kFirst =  // the leading bits of the bias
      (kIsSigned                     ? 0x3d800000u
       : kKind == StateKind::kSquare ? 0x37800000u
                                     : 0x3b800000u) >>
      kShift;
  static constexpr std::uint32_t kHalf = 1u << (kShift - 1);
  // The last code is half a step of the upper binade below 1.
  static constexpr float kTop = (kKind == StateKind::kSquare ? 31.0f / 32 : 63.0f / 64) - kBias;
  static constexpr float kUnit = 1.0f / kTop;

  // The bits of a magnitude: ordered as the magnitudes are, a NaN above all.
  FUSED_ADAMW_HD static std::uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7fffffffu; }

  // `largest`: of a block's magnitudes, as bits.
  FUSED_ADAMW_HD static float scale_of(std::uint32_t largest) {
    if (largest >= 0x7f000000u) return float_of(0x7fc00000u);  // NaN
    return largest < 0x00800000u ? 0.0f : float_of(largest);
  }
  // What a magnitude is multiplied by; 0 for a block whose codes are 0.
  FUSED_ADAMW_HD static float factor_of(float scale) { return scale > 0.0f ? kTop / scale : 0.0f; }

  // The code of a magnitude, from bit kShift on; below are bits that rounding cuts off. Here and
  // below, of a block whose factor is not 0.
  FUSED_ADAMW_HD static std::uint32_t shifted_code(float x, float factor) {
    const float t = fabsf(x) * factor + kBias;
    return bits_of(t) + (kHalf - (kFirst << kShift));
  }

  FUSED_ADAMW_HD static std::int32_t code_of(float x, float factor) {
    const auto code = static_cast<std::int32_t>(shifted_code(x, factor) >> kShift);
    if constexpr (kIsSigned) {
      const std::int32_t sign = static_cast<std::int32_t>(bits_of(x)) >> 31;  // 0 or -1
      return (code ^ sign) - sign;
    }
    const std::int32_t least = magnitude_bits(x) != 0;
    return code > least ? code : least;
  }

  FUSED_ADAMW_HD static float unit_of(float scale) { return scale * kUnit; }

  FUSED_ADAMW_HD static float value_of(std::int32_t code, float unit) {
    const auto magnitude = static_cast<std::uint32_t>(kIsSigned && code < 0 ? -code : code);
    const float a = (float_of((magnitude + kFirst) << kShift) - kBias) * unit;
    const std::uint32_t sign = kIsSigned ? static_cast<std::uint32_t>(code) & 0x80000000u : 0u;
    return float_of(bits_of(a) ^ sign);
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
