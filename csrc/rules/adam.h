// The Adam family: AdamW, Adam with L2, AdamProx, AMSGrad. Loshchilov & Hutter, arXiv 1711.05101,
// Algorithm 2; the line numbers are the paper's.
#pragma once

#include <cmath>

#include "core/platform.h"

namespace fused_adamw {

// Uniform in a step; rules/coefficients.h computes them. Floats only: an engine sees a row of them.
struct AdamCoefficients {
  float l2;      // lambda where decay is added to the gradient; negative to maximize
  float b1, c1;  // beta1, 1 - beta1; c1 is negative to maximize
  float b2, c2;  // beta2, 1 - beta2
  float eps;     // eps * sqrt(1 - beta2^t)
  float d;       // what decay leaves of the parameter
  float a;       // eta * lr * sqrt(1 - beta2^t) / (1 - beta1^t)
};

template <bool kL2, bool kAmsgrad>
struct Adam {
  using Coefficients = AdamCoefficients;
  enum State { kExpAvg, kExpAvgSq, kMaxExpAvgSq };
  static constexpr int kStates = kAmsgrad ? 3 : 2;

  FUSED_ADAMW_HD static void update(const AdamCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    float g = grad;
    if constexpr (kL2) g = g + c.l2 * param;  // line 6

    float& m = state[kExpAvg];
    float& v = state[kExpAvgSq];
    m = c.b1 * m + c.c1 * g;        // line 7
    v = c.b2 * v + (c.c2 * g) * g;  // line 8

    float w = v;
    if constexpr (kAmsgrad) {
      float& largest = state[kMaxExpAvgSq];
      largest = (v > largest || v != v) ? v : largest;  // a NaN stays visible
      w = largest;
    }
    // Lines 9, 10 and 12, with the bias corrections and eta * lr folded into a and eps.
    param = c.d * param - (c.a * m) / (sqrtf(w) + c.eps);
  }
};

}  // namespace fused_adamw
