// How an update reaches its arrays: what is known when it is compiled, and what when it runs.
#pragma once

#include <type_traits>

#include "core/bucket.h"
#include "core/platform.h"
#include "storage/format.h"
#include "storage/random.h"

namespace fused_adamw::cuda {

constexpr int kAccessBytes = 16;

// A storage's members:
//
//   kPerThread  elements of each array that a thread holds at once
//   kWidest     bytes of the widest of them
//   kHasBeside  whether something may be beside the parameter, or bits are drawn
//   kHasCodes   whether states are codes
//   kShare      how many elements share a word of random bits, as a power of two: with kHasBeside
//   with_type(dtype, use)
//               calls use(T{}) with the type of an array's elements

// All arrays of one dtype that the compiler knows, by one 16-byte access of each.
template <class T>
struct Uniform {
  static constexpr int kWidest = sizeof(T);
  static constexpr int kPerThread = kAccessBytes / kWidest;
  static constexpr bool kHasBeside = false, kHasCodes = false;

  template <class Use>
  FUSED_ADAMW_HD static void with_type(Dtype, Use&& use) {
    use(T{});
  }
};

// Of several dtypes that are told apart when it runs, by branches that all threads take alike: a
// 16-byte access of the narrowest, two of a wider one.
struct Mixed {
  static constexpr int kWidest = sizeof(float);
  static constexpr int kPerThread = kAccessBytes / 2;
  static constexpr bool kHasBeside = false, kHasCodes = false;

  template <class Use>
  FUSED_ADAMW_HD static void with_type(Dtype dtype, Use&& use) {
    if (dtype == Dtype::kFloat32) {
      use(float{});
    } else if (dtype == Dtype::kBfloat16) {
      use(bfloat16{});
    } else {
      use(float16{});
    }
  }
};

// Something beside the parameter, or stochastic rounding: told apart when it runs, too.
struct Joined : Mixed {
  static constexpr bool kHasBeside = true;
  static constexpr int kShare = kShareOf16Bits;
};

// The same with states of codes.
struct Coded : Mixed {
  static constexpr int kPerThread = kAccessBytes / 1;
  static constexpr bool kHasBeside = true, kHasCodes = true;
  static constexpr int kShare = kShareOf8Bits;
};

// Calls visit(Storage{}, kWhole) with the way to the arrays of a bucket, and whether the step does
// anything beside its rule (core/pass.h) as a std::bool_constant. Kernels are compiled for what is
// named here. Where every array is bfloat16 an average is not, so Mixed does a whole step over it;
// Coded finds out what is to be done when it runs.
template <class Visit>
void visit_storage(const Bucket& bucket, Visit&& visit) {
  constexpr std::true_type kWhole;
  constexpr std::false_type kPlain;
  const Format& format = bucket.format;
  if (format.state == Dtype::kCode8) return visit(Coded{}, kWhole);
  if (!format.is_plain()) {
    return bucket.is_plain() ? visit(Joined{}, kPlain) : visit(Joined{}, kWhole);
  }
  if (format.all(Dtype::kFloat32)) {
    return bucket.is_plain() ? visit(Uniform<float>{}, kPlain) : visit(Uniform<float>{}, kWhole);
  }
  if (!bucket.is_plain()) return visit(Mixed{}, kWhole);
  if (format.all(Dtype::kBfloat16)) return visit(Uniform<bfloat16>{}, kPlain);
  visit(Mixed{}, kPlain);
}

}  // namespace fused_adamw::cuda
