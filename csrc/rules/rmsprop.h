// RMSprop, centered and with momentum: Hinton, Neural Networks for Machine Learning, lecture 6
// (2012); Graves, arXiv 1308.0850; torch.optim.RMSprop.
#pragma once

#include <cmath>

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct RmspropCoefficients {
  float sign;    // -1 to maximize
  float l2;      // lambda where decay is added to the gradient
  float rho, c;  // smoothing, 1 - smoothing
  float eps;
  float momentum;
  float d;  // what decay leaves of the parameter
  float a;  // eta * lr
};

template <bool kCentered, bool kMomentum>
struct Rmsprop {
  using Coefficients = RmspropCoefficients;
  static constexpr const char* kName = "rmsprop";
  static constexpr std::array<bool, 2> kOptions{kCentered, kMomentum};
  enum State { kSquareAvg, kNext };  // then grad_avg, then momentum_buffer
  static constexpr int kStates = 1 + kCentered + kMomentum;
  static constexpr StateKind kKinds[] = {StateKind::kSquare, StateKind::kSigned,
                                         StateKind::kSigned};

  FUSED_ADAMW_HD static void update(const RmspropCoefficients& c, float& param, float grad,
                                    float (&state)[kStates]) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);
    float& n = state[kSquareAvg];
    n = c.rho * n + (c.c * g) * g;
    float variance = n;
    if constexpr (kCentered) {
      float& mean = state[kNext];
      mean = c.rho * mean + c.c * g;
      variance = n - mean * mean;
      // Rounding may take it below zero, where a root would be NaN.
      variance = variance < 0.0f ? 0.0f : variance;
    }
    const float scaled = sqrtf(variance) + c.eps;
    if constexpr (kMomentum) {
      float& buffer = state[kNext + kCentered];
      buffer = c.momentum * buffer + g / scaled;
      param = c.d * param - c.a * buffer;
    } else {
      param = c.d * param - (c.a * g) / scaled;
    }
  }
};

struct RmspropRule {
  static constexpr const char* kName = "rmsprop";
  struct Hyperparameters {
    double lr, alpha, eps, weight_decay, momentum, centered, schedule_multiplier, decay, maximize;
  };
  static constexpr Field kFields[] = {kLrField,
                                      {"alpha", "alpha", Range::kBelowOne},
                                      kEpsField,
                                      kWeightDecayField,
                                      {"momentum", "momentum", Range::kAtLeastZero},
                                      {"centered", "centered", Range::kFlag},
                                      kScheduleField,
                                      kDecayField,
                                      kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors =
      Types<Rmsprop<false, false>, Rmsprop<false, true>, Rmsprop<true, false>, Rmsprop<true, true>>;

  static int functor(const Hyperparameters& h) {
    return 2 * (h.centered != 0.0) + (h.momentum != 0.0);
  }

  FUSED_ADAMW_HD static RmspropCoefficients coefficients(const Hyperparameters& h, Position&) {
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    RmspropCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.rho = to_coefficient(h.alpha);
    c.c = to_coefficient(1.0 - h.alpha);
    c.eps = to_coefficient(h.eps);
    c.momentum = to_coefficient(h.momentum);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(h.schedule_multiplier * h.lr * decay.step);
    return c;
  }
};

}  // namespace fused_adamw
