// Functions by + - * / in binary64, in the order written: no math library has a say in their bits,
// so that they are the same on host and device. fused_adamw/schedules.py and reference.py have the
// same formulas.
#pragma once

#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

// x^n by repeated squaring from the lowest bit, for n >= 0.
FUSED_ADAMW_HD double integer_power(double x, std::int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= x;
    x *= x;
  }
  return result;
}

constexpr double factorial(int k) { return k > 1 ? k * factorial(k - 1) : 1.0; }

// 1 / k!, exactly rounded: k! is exact up to k = 22.
template <int k>
constexpr double kInverseFactorial = 1.0 / factorial(k);

// ... - z (1/k3! - z (1/k2! - z / k1!)), where k1, k2, ... are the template's arguments.
template <int... k>
FUSED_ADAMW_HD double alternating(double z) {
  double result = 0.0;
  ((result = kInverseFactorial<k> - z * result), ...);
  return result;
}

// cos(pi x) for x in [0, 1], within 2^-52; exact at 0, 1/2 and 1.
FUSED_ADAMW_HD double cos_pi(double x) {
  constexpr double kPi = 3.141592653589793;
  const bool falls_below_zero = x > 0.5;
  if (falls_below_zero) x = 1.0 - x;
  const double angle = kPi * (x <= 0.25 ? x : 0.5 - x);
  const double square = angle * angle;
  const double cosine = x <= 0.25 ? 1.0 - square * alternating<16, 14, 12, 10, 8, 6, 4, 2>(square)
                                  : angle * alternating<17, 15, 13, 11, 9, 7, 5, 3, 1>(square);
  return falls_below_zero ? -cosine : cosine;
}

// 0.96^x for x >= 0, within 2 ulp; 0 from x = 17353, where the normal numbers end.
//
// [note: 0.96^x] With L = -log2(0.96), 0.96^x = 2^-(x L). Let x = n + f and x L = k + r, where n
// and k are integers. L is the sum of two numbers, of which the first has 38 bits: its product with
// n < 2^15 is exact, and so is what is left of it after k. The rest, n low + f L < 0.06, is within
// 2^-56, and r, in [-0.5, 0.56], within 2^-53.6 with the rounding of the sum. exp(-r log(2)) is its
// Taylor polynomial up to the 14th power, which leaves out less than 2^-60; 2^-k is exact. All the
// errors together make less than 1.7 ulp.
FUSED_ADAMW_HD double power_of_0_96(double x) {
  constexpr double kHigh = 0.05889368905354786, kLow = 2.0708019785826723e-14;  // L
  constexpr double kLog2 = 0.6931471805599453;
  if (!(x < 17353.0)) return 0.0;  // 2^-1022 is at 17353.3
  const std::int64_t n = static_cast<std::int64_t>(x);
  const double whole = static_cast<double>(n), fraction = x - whole;
  const double exact = whole * kHigh;
  const std::int64_t k = static_cast<std::int64_t>(exact + 0.5);
  const double rest = whole * kLow + fraction * (kHigh + kLow);
  const double r = (exact - static_cast<double>(k)) + rest;
  return integer_power(0.5, k) *
         alternating<14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0>(r * kLog2);
}

}  // namespace fused_adamw
