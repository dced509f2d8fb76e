// Adadelta: Zeiler, arXiv 1212.5701, Algorithm 1; torch.optim.Adadelta.
#pragma once

#include <cmath>

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct AdadeltaCoefficients {
  float sign;    // -1 to maximize
  float l2;      // lambda where decay is added to the gradient
  float rho, c;  // rho, 1 - rho
  float eps;
  float d;  // what decay leaves of the parameter
  float a;  // eta * lr
};

struct Adadelta {
  using Coefficients = AdadeltaCoefficients;
  static constexpr const char* kName = "adadelta";
  static constexpr std::array<bool, 0> kOptions{};
  enum State { kSquareAvg, kAccDelta };
  static constexpr int kStates = 2;
  static constexpr StateKind kKinds[] = {StateKind::kSquare, StateKind::kSquare};

  FUSED_ADAMW_HD static void update(const AdadeltaCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);
    float& n = state[kSquareAvg];
    float& acc = state[kAccDelta];
    n = c.rho * n + (c.c * g) * g;                                    // line 4
    const float delta = (sqrtf(acc + c.eps) / sqrtf(n + c.eps)) * g;  // line 5
    acc = c.rho * acc + (c.c * delta) * delta;                        // line 6
    param = c.d * param - c.a * delta;                                // line 7
  }
};

struct AdadeltaRule {
  static constexpr const char* kName = "adadelta";
  struct Hyperparameters {
    double lr, rho, eps, weight_decay, schedule_multiplier, decay, maximize;
  };
  static constexpr Field kFields[] = {kLrField,       {"rho", "rho", Range::kBelowOne},
                                      kEpsField,      kWeightDecayField,
                                      kScheduleField, kDecayField,
                                      kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Adadelta>;

  static int functor(const Hyperparameters&) { return 0; }

  FUSED_ADAMW_HD static AdadeltaCoefficients coefficients(const Hyperparameters& h, Position&) {
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    AdadeltaCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.rho = to_coefficient(h.rho);
    c.c = to_coefficient(1.0 - h.rho);
    c.eps = to_coefficient(h.eps);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(h.schedule_multiplier * h.lr * decay.step);
    return c;
  }
};

}  // namespace fused_adamw
