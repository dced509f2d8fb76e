// The closed table of storage formats: which dtypes may stand together in one update.
#pragma once

#include <cstdint>

#include "storage/scalar.h"

namespace fused_adamw {

enum class Dtype : std::uint8_t { kFloat32, kBfloat16, kFloat16 };
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16"};

FUSED_ADAMW_HD constexpr int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

struct Format {
  Dtype param = Dtype::kFloat32;
  Dtype grad = Dtype::kFloat32;
  Dtype state = Dtype::kFloat32;

  FUSED_ADAMW_HD constexpr Dtype of_slot(int slot) const {
    return slot == 0 ? param : slot == 1 ? grad : state;
  }
  constexpr bool all(Dtype dtype) const {
    return param == dtype && grad == dtype && state == dtype;
  }

  friend bool operator==(const Format& x, const Format& y) {
    return x.param == y.param && x.grad == y.grad && x.state == y.state;
  }
};

// A gradient is of the parameter's dtype or float32, or of 16 bits beside a float32 parameter;
// states are of the parameter's dtype or float32, or bfloat16 beside float32. bfloat16 and float16
// do not mix. Engines have code of its own for the formats of one dtype, and one code for the rest.
constexpr Dtype kF32 = Dtype::kFloat32, kBf16 = Dtype::kBfloat16, kF16 = Dtype::kFloat16;
constexpr Format kFormats[] = {
    {kF32, kF32, kF32},   {kF32, kBf16, kF32},   {kF32, kF16, kF32},   {kF32, kF32, kBf16},
    {kF32, kBf16, kBf16}, {kBf16, kBf16, kBf16}, {kBf16, kBf16, kF32}, {kBf16, kF32, kF32},
    {kBf16, kF32, kBf16}, {kF16, kF16, kF16},    {kF16, kF16, kF32},   {kF16, kF32, kF32},
    {kF16, kF32, kF16},
};

inline bool is_supported(const Format& format) {
  for (const Format& known : kFormats) {
    if (known == format) return true;
  }
  return false;
}

}  // namespace fused_adamw
