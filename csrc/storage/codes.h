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
#include <type_traits>

#include "core/platform.h"
#include "core/state_kind.h"
#include "storage/bytes.h"
#include "storage/scalar.h"

namespace fused_adamw {

constexpr int kCodeBlock = 64;  // neighbours in memory order

template <StateKind kKind>
struct Codes {
  static constexpr bool kIsSigned = kKind == StateKind::kSigned;
  using Code = std::conditional_t<kIsSigned, std::int8_t, std::uint8_t>;
  static constexpr int kShift = 18;  // of a binary32's 23 bits of mantissa 5 stay
  static constexpr std::uint32_t kHalf = 1u << (kShift - 1);
  static constexpr std::uint32_t kFirst = (kIsSigned ? 0x3d800000u : 0x3b800000u) >> kShift;
  static constexpr float kBias = kIsSigned ? 1.0f / 16 : 1.0f / 256;
  static constexpr float kTop = 63.0f / 64 - kBias;  // the last code is 63/64
  static constexpr float kUnit = 1.0f / kTop;

  // What is coded of a number: itself, or its root.
  FUSED_ADAMW_HD static float coded(float x) { return kKind == StateKind::kSquare ? sqrtf(x) : x; }

  // The bits of its magnitude: ordered as the magnitudes are, a NaN above all.
  FUSED_ADAMW_HD static std::uint32_t magnitude_bits(float coded) {
    return bits_of(coded) & 0x7fffffffu;
  }

  // The larger one's bits of a magnitude, as bits, and that of another number. A NaN's payload is
  // whatever it is.
  FUSED_ADAMW_HD static std::uint32_t larger(std::uint32_t magnitude, float coded) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float larger;  // in one instruction
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(float_of(magnitude)), "f"(fabsf(coded)));
    return bits_of(larger);
#else
    const std::uint32_t other = magnitude_bits(coded);
    return other > magnitude ? other : magnitude;
#endif
  }

  // `largest`: of a block's magnitudes, as bits.
  FUSED_ADAMW_HD static float scale_of(std::uint32_t largest) {
    if (largest >= 0x7f800000u) return float_of(0x7fc00000u);
    return largest < 0x00800000u ? 0.0f : float_of(largest);
  }
  // What a magnitude is multiplied by; 0 for a block whose codes are 0.
  FUSED_ADAMW_HD static float factor_of(float scale) { return scale > 0.0f ? kTop / scale : 0.0f; }

  // A number whose uppermost byte is the code of a magnitude, as bits, in a block whose factor is
  // not 0.
  FUSED_ADAMW_HD static std::uint32_t scaled(std::uint32_t magnitude, float factor) {
    const float t = float_of(magnitude) * factor + kBias;
    const std::uint32_t code = (bits_of(t) + kHalf - (kFirst << kShift)) << (24 - kShift);
    if constexpr (kIsSigned) return code;
    return magnitude != 0 && code < 1u << 24 ? 1u << 24 : code;
  }

  FUSED_ADAMW_HD static int code_of(std::uint32_t magnitude, bool negative, float factor) {
    const int code = static_cast<int>(scaled(magnitude, factor) >> 24);
    return kIsSigned && negative ? -code : code;
  }

  // The codes of four numbers as a word, the first one's in its lowest byte.
  FUSED_ADAMW_HD static std::uint32_t word_of(const float (&coded)[4], float factor) {
    std::uint32_t code[4];
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < 4; ++j) code[j] = scaled(magnitude_bits(coded[j]), factor);
    const std::uint32_t word =
        permuted(permuted(code[0], code[1], 0x0073), permuted(code[2], code[3], 0x0073), 0x5410);
    if constexpr (!kIsSigned) return word;
    // To negate a byte below 128: its complement plus one, which must not be carried on.
    std::uint32_t sign[4];
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < 4; ++j) sign[j] = bits_of(coded[j]);
    const std::uint32_t signs =
        permuted(permuted(sign[0], sign[1], 0x0073), permuted(sign[2], sign[3], 0x0073), 0x5410);
    const std::uint32_t ones = signs >> 7 & 0x01010101u, all = ones * 0xffu;
    return (((word ^ all) & 0x7f7f7f7fu) + ones) ^ (all & 0x80808080u);
  }

  FUSED_ADAMW_HD static float unit_of(float scale) { return scale * kUnit; }

  FUSED_ADAMW_HD static float value_of(int code, float unit) {
    const bool negative = kIsSigned && code < 0;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(negative ? -code : code);
    const float a = (float_of((magnitude + kFirst) << kShift) - kBias) * unit;
    if constexpr (kKind == StateKind::kSquare) return a * a;
    return kIsSigned ? float_of(bits_of(a) | (static_cast<std::uint32_t>(code) & 0x80000000u)) : a;
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
