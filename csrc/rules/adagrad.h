// Adagrad: Duchi, Hazan & Singer, Adaptive Subgradient Methods (2011); torch.optim.Adagrad, whose
// eps stands outside the root.
#pragma once

#include <cmath>

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct AdagradCoefficients {
  float sign;  // -1 to maximize
  float l2;    // lambda where decay is added to the gradient
  float eps;
  float d;  // what decay leaves of the parameter
  float a;  // eta * lr / (1 + (t - 1) * lr_decay)
};

struct Adagrad {
  using Coefficients = AdagradCoefficients;
  static constexpr const char* kName = "adagrad";
  static constexpr std::array<bool, 0> kOptions{};
  static constexpr int kStates = 1;
  static constexpr StateKind kKinds[] = {StateKind::kSquare};

  FUSED_ADAMW_HD static void update(const AdagradCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);
    float& sum = state[0];
    sum = sum + g * g;
    param = c.d * param - (c.a * g) / (sqrtf(sum) + c.eps);
  }
};

struct AdagradRule {
  static constexpr const char* kName = "adagrad";
  struct Hyperparameters {
    double lr, lr_decay, weight_decay, eps, schedule_multiplier, decay, maximize;
  };
  static constexpr Field kFields[] = {
      kLrField,          {"lr_decay", "lr_decay", Range::kAtLeastZero},
      kWeightDecayField, kEpsField,
      kScheduleField,    kDecayField,
      kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Adagrad>;

  static int functor(const Hyperparameters&) { return 0; }

  FUSED_ADAMW_HD static AdagradCoefficients coefficients(const Hyperparameters& h, Position& at) {
    const double lr = h.lr / (1.0 + static_cast<double>(at.t - 1) * h.lr_decay);
    const Decayed decay = decayed(h.decay, lr, h.schedule_multiplier, h.weight_decay);
    AdagradCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.eps = to_coefficient(h.eps);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(h.schedule_multiplier * lr * decay.step);
    return c;
  }
};

}  // namespace fused_adamw
