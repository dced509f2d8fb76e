// The Adam family. AdamW, Adam with L2, AdamProx, AMSGrad: Loshchilov & Hutter, arXiv 1711.05101,
// Algorithm 2, whose line numbers are given; Nadam and NadamW: Dozat, Incorporating Nesterov
// Momentum into Adam (2016).
#pragma once

#include <cmath>

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct AdamCoefficients {
  float l2;      // lambda where decay is added to the gradient; negative to maximize
  float b1, c1;  // beta1, 1 - beta1; c1 is negative to maximize
  float b2, c2;  // beta2, 1 - beta2
  float eps;     // eps * sqrt(1 - beta2^t)
  float d;       // what decay leaves of the parameter
  float a;       // of the first moment: eta * lr * sqrt(1 - beta2^t) / (1 - beta1^t)
  float b;       // of the gradient, for Nesterov's momentum; negative to maximize
};

// L2 and Nesterov's term are options of the compiler, not coefficients of zero: a zero times an
// infinity would be a NaN, and what is left out costs nothing.
template <bool kL2, bool kAmsgrad, bool kNesterov>
struct Adam {
  using Coefficients = AdamCoefficients;
  static constexpr const char* kName = "adam";
  static constexpr std::array<bool, 3> kOptions{kL2, kAmsgrad, kNesterov};
  enum State { kExpAvg, kExpAvgSq, kMaxExpAvgSq };
  static constexpr int kStates = kAmsgrad ? 3 : 2;
  static constexpr StateKind kKinds[] = {StateKind::kSigned, StateKind::kSquare,
                                         StateKind::kSquare};

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
    // Lines 9, 10 and 12, with the bias corrections and eta * lr folded into a, b and eps.
    float step = c.a * m;
    if constexpr (kNesterov) step = step + c.b * g;
    param = c.d * param - step / (sqrtf(w) + c.eps);
  }
};

struct AdamRule {
  static constexpr const char* kName = "adam";
  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, schedule_multiplier, decay, amsgrad, maximize;
  };
  static constexpr Field kFields[] = {
      kLrField,          kBeta1Field,    kBeta2Field, kEpsField,
      kWeightDecayField, kScheduleField, kDecayField, {"amsgrad", "amsgrad", Range::kFlag},
      kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Adam<false, false, false>, Adam<false, true, false>,
                         Adam<true, false, false>, Adam<true, true, false>>;

  static int functor(const Hyperparameters& h) {
    return 2 * adds_decay(h.decay, h.weight_decay) + (h.amsgrad != 0.0);
  }

  FUSED_ADAMW_HD static AdamCoefficients coefficients(const Hyperparameters& h, Position& at) {
    const double root = sqrt(1.0 - integer_power(h.beta2, at.t));
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    const double rate =
        h.schedule_multiplier * h.lr * root / (1.0 - integer_power(h.beta1, at.t)) * decay.step;
    // The gradient's sign: exact wherever it is applied, and here it costs nothing.
    const double sign = h.maximize != 0.0 ? -1.0 : 1.0;
    AdamCoefficients c;
    c.l2 = to_coefficient(sign * decay.l2);
    c.b1 = to_coefficient(h.beta1);
    c.c1 = to_coefficient(sign * (1.0 - h.beta1));
    c.b2 = to_coefficient(h.beta2);
    c.c2 = to_coefficient(1.0 - h.beta2);
    c.eps = to_coefficient(h.eps * root);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(rate);
    c.b = 0.0f;
    return c;
  }
};

struct NadamRule {
  static constexpr const char* kName = "nadam";
  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, schedule_multiplier, decay, momentum_decay,
        scheduled_average, maximize;
  };
  static constexpr Field kFields[] = {kLrField,
                                      kBeta1Field,
                                      kBeta2Field,
                                      kEpsField,
                                      kWeightDecayField,
                                      kScheduleField,
                                      kDecayField,
                                      {"momentum_decay", "momentum_decay", Range::kAtLeastZero},
                                      {"scheduled_average", "scheduled_average", Range::kFlag},
                                      kMaximizeField};
  static constexpr const char* kScalar = "mu_product";
  using Functors = Types<Adam<false, false, true>, Adam<true, false, true>>;

  static int functor(const Hyperparameters& h) { return adds_decay(h.decay, h.weight_decay); }

  // mu_t
  FUSED_ADAMW_HD static double momentum(const Hyperparameters& h, std::int64_t t) {
    return h.beta1 * (1.0 - 0.5 * power_of_0_96(static_cast<double>(t) * h.momentum_decay));
  }

  FUSED_ADAMW_HD static AdamCoefficients coefficients(const Hyperparameters& h, Position& at) {
    const double mu = momentum(h, at.t), next = momentum(h, at.t + 1);
    const double product = at.scalar * mu;  // of mu_1 to mu_t
    at.scalar = product;
    const double beta1 = h.scheduled_average != 0.0 ? mu : h.beta1;
    const double root = sqrt(1.0 - integer_power(h.beta2, at.t));
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    const double rate = h.schedule_multiplier * h.lr * root * decay.step;
    const double sign = h.maximize != 0.0 ? -1.0 : 1.0;
    AdamCoefficients c;
    c.l2 = to_coefficient(sign * decay.l2);
    c.b1 = to_coefficient(beta1);
    c.c1 = to_coefficient(sign * (1.0 - beta1));
    c.b2 = to_coefficient(h.beta2);
    c.c2 = to_coefficient(1.0 - h.beta2);
    c.eps = to_coefficient(h.eps * root);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(rate * next / (1.0 - product * next));
    c.b = to_coefficient(sign * (rate * (1.0 - mu) / (1.0 - product)));
    return c;
  }
};

}  // namespace fused_adamw
