// The closed table of storage formats: what may stand together in one update.
#pragma once

#include <cstdint>

#include "storage/beside.h"
#include "storage/codes.h"
#include "storage/scalar.h"

namespace fused_adamw {

enum class Dtype : std::uint8_t { kFloat32, kBfloat16, kFloat16, kCode8 };  // kCode8: of states
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16", "code8"};

FUSED_ADAMW_HD constexpr int element_size(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kCode8 ? 1 : 2;
}

struct Format {
  Dtype param = Dtype::kFloat32;
  Dtype grad = Dtype::kFloat32;
  Dtype state = Dtype::kFloat32;
  Beside beside = Beside::kNothing;
  bool stochastic = false;  // how numbers are rounded to bfloat16

  FUSED_ADAMW_HD constexpr Dtype of_slot(int slot) const {
    return slot == 0 ? param : slot == 1 ? grad : state;
  }
  // Whether an array's element is a number that is rounded to nearest, and nothing is beside it.
  FUSED_ADAMW_HD constexpr bool is_plain() const {
    return state != Dtype::kCode8 && beside == Beside::kNothing && !stochastic;
  }
  constexpr bool all(Dtype dtype) const {
    return param == dtype && grad == dtype && state == dtype && is_plain();
  }
  FUSED_ADAMW_HD constexpr bool draws() const {
    return stochastic || beside == Beside::kRemainder8;
  }

  friend bool operator==(const Format& x, const Format& y) {
    return x.param == y.param && x.grad == y.grad && x.state == y.state && x.beside == y.beside &&
           x.stochastic == y.stochastic;
  }
};

// A gradient is of the parameter's dtype or float32, or of 16 bits beside a float32 parameter;
// states are of the parameter's dtype or float32, or bfloat16 beside float32. bfloat16 and float16
// do not mix. Engines have code of its own for the plain formats of one dtype, and one code for the
// rest.
constexpr Dtype kF32 = Dtype::kFloat32, kBf16 = Dtype::kBfloat16, kF16 = Dtype::kFloat16,
                kC8 = Dtype::kCode8;
constexpr Format kFormats[] = {
    {kF32, kF32, kF32},
    {kF32, kBf16, kF32},
    {kF32, kF16, kF32},
    {kF32, kF32, kBf16},
    {kF32, kBf16, kBf16},
    {kBf16, kBf16, kBf16},
    {kBf16, kBf16, kF32},
    {kBf16, kF32, kF32},
    {kBf16, kF32, kBf16},
    {kF16, kF16, kF16},
    {kF16, kF16, kF32},
    {kF16, kF32, kF32},
    {kF16, kF32, kF16},
    // Codes beside a float32 parameter.
    {kF32, kF32, kC8},
    {kF32, kBf16, kC8},
    {kF32, kF16, kC8},
    // Stochastic rounding.
    {kBf16, kBf16, kBf16, Beside::kNothing, true},
    {kBf16, kBf16, kF32, Beside::kNothing, true},
    {kBf16, kF32, kF32, Beside::kNothing, true},
    {kBf16, kF32, kBf16, Beside::kNothing, true},
    {kBf16, kBf16, kF32, Beside::kMaster},
    {kBf16, kF32, kF32, Beside::kMaster},
    {kF16, kF16, kF32, Beside::kMaster},
    {kF16, kF32, kF32, Beside::kMaster},
    {kBf16, kBf16, kF32, Beside::kRemainder16},
    {kBf16, kF32, kF32, Beside::kRemainder16},
    {kBf16, kBf16, kBf16, Beside::kRemainder16},
    {kBf16, kF32, kBf16, Beside::kRemainder16},
    {kBf16, kBf16, kC8, Beside::kRemainder16},
    {kBf16, kF32, kC8, Beside::kRemainder16},
    {kBf16, kBf16, kC8, Beside::kRemainder8},
    {kBf16, kF32, kC8, Beside::kRemainder8},
    {kBf16, kBf16, kBf16, Beside::kCompensation},
    {kBf16, kF32, kBf16, Beside::kCompensation},
};

inline bool is_supported(const Format& format) {
  for (const Format& known : kFormats) {
    if (known == format) return true;
  }
  return false;
}

}  // namespace fused_adamw
