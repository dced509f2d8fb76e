// Lion: Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, Algorithm 2.
#pragma once

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct LionCoefficients {
  float sign;    // -1 to maximize
  float l2;      // lambda where decay is added to the gradient
  float b1, c1;  // beta1, 1 - beta1
  float b2, c2;  // beta2, 1 - beta2
  float d;       // what decay leaves of the parameter
  float a;       // eta * lr
};

struct Lion {
  using Coefficients = LionCoefficients;
  static constexpr const char* kName = "lion";
  static constexpr std::array<bool, 0> kOptions{};
  static constexpr int kStates = 1;
  static constexpr StateKind kKinds[] = {StateKind::kSigned};

  FUSED_ADAMW_HD static void update(const LionCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);
    float& m = state[0];
    const float u = c.b1 * m + c.c1 * g;
    const float direction = u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : u;  // a NaN stays visible
    m = c.b2 * m + c.c2 * g;
    param = c.d * param - c.a * direction;
  }
};

struct LionRule {
  static constexpr const char* kName = "lion";
  struct Hyperparameters {
    double lr, beta1, beta2, weight_decay, schedule_multiplier, decay, maximize;
  };
  static constexpr Field kFields[] = {kLrField,       kBeta1Field, kBeta2Field,   kWeightDecayField,
                                      kScheduleField, kDecayField, kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Lion>;

  static int functor(const Hyperparameters&) { return 0; }

  FUSED_ADAMW_HD static LionCoefficients coefficients(const Hyperparameters& h, Position&) {
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    LionCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.b1 = to_coefficient(h.beta1);
    c.c1 = to_coefficient(1.0 - h.beta1);
    c.b2 = to_coefficient(h.beta2);
    c.c2 = to_coefficient(1.0 - h.beta2);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(h.schedule_multiplier * h.lr * decay.step);
    return c;
  }
};

}  // namespace fused_adamw
