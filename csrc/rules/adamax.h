// Adamax: Kingma & Ba, arXiv 1412.6980, Algorithm 2; torch.optim.Adamax, which adds eps to |g|.
#pragma once

#include <cmath>

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct AdamaxCoefficients {
  float sign;    // -1 to maximize
  float l2;      // lambda where decay is added to the gradient
  float b1, c1;  // beta1, 1 - beta1
  float b2;      // beta2
  float eps;
  float d;  // what decay leaves of the parameter
  float a;  // eta * lr / (1 - beta1^t)
};

struct Adamax {
  using Coefficients = AdamaxCoefficients;
  static constexpr const char* kName = "adamax";
  static constexpr std::array<bool, 0> kOptions{};
  enum State { kExpAvg, kExpInf };
  static constexpr int kStates = 2;
  static constexpr StateKind kKinds[] = {StateKind::kSigned, StateKind::kMagnitude};

  FUSED_ADAMW_HD static void update(const AdamaxCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);
    float& m = state[kExpAvg];
    float& u = state[kExpInf];
    m = c.b1 * m + c.c1 * g;
    const float now = fabsf(g) + c.eps, before = c.b2 * u;
    u = (now > before || now != now) ? now : before;  // a NaN stays visible
    param = c.d * param - (c.a * m) / u;
  }
};

struct AdamaxRule {
  static constexpr const char* kName = "adamax";
  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, schedule_multiplier, decay, maximize;
  };
  static constexpr Field kFields[] = {kLrField,    kBeta1Field,       kBeta2Field,
                                      kEpsField,   kWeightDecayField, kScheduleField,
                                      kDecayField, kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Adamax>;

  static int functor(const Hyperparameters&) { return 0; }

  FUSED_ADAMW_HD static AdamaxCoefficients coefficients(const Hyperparameters& h, Position& at) {
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    AdamaxCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.b1 = to_coefficient(h.beta1);
    c.c1 = to_coefficient(1.0 - h.beta1);
    c.b2 = to_coefficient(h.beta2);
    c.eps = to_coefficient(h.eps);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(h.schedule_multiplier * h.lr / (1.0 - integer_power(h.beta1, at.t)) *
                         decay.step);
    return c;
  }
};

}  // namespace fused_adamw
