// What a step does beside its rule, in the same pass: the same arithmetic for every rule, storage
// format and engine.
#pragma once

#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

// They follow the rule's coefficients in a row.
struct PassCoefficients {
  float grad_factor;          // of every gradient, before the rule sees it: unscales and clips
  float ema_weight;           // of the new parameter in its average
  std::uint32_t random_step;  // steps taken, where anything is drawn: [note: random bits]
};
constexpr int kPassCoefficients = sizeof(PassCoefficients) / sizeof(float);

template <class Functor>
struct Row {
  typename Functor::Coefficients rule;
  PassCoefficients pass;
};

// The exponential moving average of a parameter, as torch.lerp has it: exact at the ends.
FUSED_ADAMW_HD float averaged(float ema, float param, float weight) {
  if (weight == 1.0f) return param;
  const float difference = param - ema;
  return weight < 0.5f ? ema + weight * difference : param - (1.0f - weight) * difference;
}

// What a step tells of itself: sums over elements.
struct Observation {
  double grad;       // squares of the gradient as it is in memory
  double update;     // squares of the change of the stored parameter
  double param;      // squares of the new parameter
  double nonfinite;  // gradients that are infinite or NaN
  double lost;       // parameters that did not change though their gradient is not zero
};
constexpr int kObserved = sizeof(Observation) / sizeof(double);

FUSED_ADAMW_HD double square(float x) {
  return static_cast<double>(x) * static_cast<double>(x);  // exact
}

FUSED_ADAMW_HD bool is_nonfinite(float grad) { return !(grad - grad == 0.0f); }

FUSED_ADAMW_HD bool is_lost(float grad, float before, float after) {
  return before == after && grad != 0.0f;
}

// Of one element.
FUSED_ADAMW_HD Observation observe(float grad, float before, float after) {
  return {square(grad), square(after - before), square(after), is_nonfinite(grad) ? 1.0 : 0.0,
          is_lost(grad, before, after) ? 1.0 : 0.0};
}

FUSED_ADAMW_HD Observation operator+(const Observation& x, const Observation& y) {
  return {x.grad + y.grad, x.update + y.update, x.param + y.param, x.nonfinite + y.nonfinite,
          x.lost + y.lost};
}

}  // namespace fused_adamw
