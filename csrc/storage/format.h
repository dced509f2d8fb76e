// The closed table of storage formats: which dtypes may stand together in one update.
#pragma once

#include "storage/scalar.h"

namespace fused_adamw {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16"};

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<bfloat16> {
  static constexpr Dtype value = Dtype::kBfloat16;
};
template <>
struct DtypeOf<float16> {
  static constexpr Dtype value = Dtype::kFloat16;
};

struct Format {
  Dtype param = Dtype::kFloat32;
  Dtype grad = Dtype::kFloat32;
  Dtype state = Dtype::kFloat32;

  friend bool operator==(const Format& x, const Format& y) {
    return x.param == y.param && x.grad == y.grad && x.state == y.state;
  }
};

// A format at compile time.
template <class P, class G, class S>
struct FormatOf {
  using Param = P;
  using Grad = G;
  using State = S;
  static constexpr Format kFormat{DtypeOf<P>::value, DtypeOf<G>::value, DtypeOf<S>::value};
};

template <class... Formats>
struct FormatList {};

// By the parameter's dtype, so that a build may compile them in parallel. A gradient is of the
// parameter's dtype or float32, or of 16 bits beside a float32 parameter; states are of the
// parameter's dtype or float32, or bfloat16 beside float32. bfloat16 and float16 do not mix.
using Float32Formats = FormatList<FormatOf<float, float, float>, FormatOf<float, bfloat16, float>,
                                  FormatOf<float, float16, float>, FormatOf<float, float, bfloat16>,
                                  FormatOf<float, bfloat16, bfloat16>>;
using Bfloat16Formats =
    FormatList<FormatOf<bfloat16, bfloat16, bfloat16>, FormatOf<bfloat16, bfloat16, float>,
               FormatOf<bfloat16, float, float>, FormatOf<bfloat16, float, bfloat16>>;
using Float16Formats =
    FormatList<FormatOf<float16, float16, float16>, FormatOf<float16, float16, float>,
               FormatOf<float16, float, float>, FormatOf<float16, float, float16>>;

template <class... X, class... Y>
FormatList<X..., Y...> operator+(FormatList<X...>, FormatList<Y...>);

using Formats = decltype(Float32Formats{} + Bfloat16Formats{} + Float16Formats{});

// Calls visit(FormatOf<...>{}) for the entry equal to `format`; false if there is none.
template <class Visit, class... F>
bool visit_format(FormatList<F...>, const Format& format, Visit&& visit) {
  return ((F::kFormat == format && (visit(F{}), true)) || ...);
}

template <class Visit, class... F>
void for_each_format(FormatList<F...>, Visit&& visit) {
  (visit(F::kFormat), ...);
}

}  // namespace fused_adamw
