// SGDW and SGD with L2, momentum, dampening and Nesterov's momentum: Loshchilov & Hutter, arXiv
// 1711.05101, Algorithm 1, whose line numbers are given; torch.optim.SGD.
#pragma once

#include "core/platform.h"
#include "rules/rule.h"

namespace fused_adamw {

struct SgdCoefficients {
  float sign;      // -1 to maximize
  float l2;        // lambda where decay is added to the gradient
  float momentum;  // mu
  float c;         // of the gradient in the buffer
  float ahead;     // of the gradient beside the buffer, with Nesterov's momentum
  float d;         // what decay leaves of the parameter
  float a;         // of what is subtracted
};

template <bool kMomentum, bool kNesterov>
struct Sgd {
  using Coefficients = SgdCoefficients;
  static constexpr const char* kName = "sgd";
  static constexpr std::array<bool, 2> kOptions{kMomentum, kNesterov};
  static constexpr int kStates = kMomentum ? 1 : 0;
  static constexpr StateKind kKinds[] = {StateKind::kSigned};

  FUSED_ADAMW_HD static void update(const SgdCoefficients& c, float& param, float grad,
                                    StateArray<kStates>& state) {
    const float g = effective_gradient(c.sign, c.l2, grad, param);  // line 6
    float u = g;
    if constexpr (kMomentum) {
      float& m = state[0];
      m = c.momentum * m + c.c * g;  // line 8
      u = m;
      if constexpr (kNesterov) u = c.ahead * g + c.momentum * m;
    }
    param = c.d * param - c.a * u;  // line 9
  }
};

struct SgdRule {
  static constexpr const char* kName = "sgd";
  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, schedule_multiplier, decay, nesterov,
        lr_in_momentum, maximize;
  };
  static constexpr Field kFields[] = {kLrField,
                                      {"momentum", "momentum", Range::kAtLeastZero},
                                      {"dampening", "dampening", Range::kFinite},
                                      kWeightDecayField,
                                      kScheduleField,
                                      kDecayField,
                                      {"nesterov", "nesterov", Range::kFlag},
                                      {"lr_in_momentum", "lr_in_momentum", Range::kFlag},
                                      kMaximizeField};
  static constexpr const char* kScalar = nullptr;
  using Functors = Types<Sgd<false, false>, Sgd<true, false>, Sgd<true, true>>;

  static int functor(const Hyperparameters& h) {
    return h.momentum == 0.0 ? 0 : h.nesterov == 0.0 ? 1 : 2;
  }

  // The first gradient enters the buffer whole, as in torch.
  FUSED_ADAMW_HD static SgdCoefficients coefficients(const Hyperparameters& h, Position& at) {
    const Decayed decay = decayed(h.decay, h.lr, h.schedule_multiplier, h.weight_decay);
    const double rate = h.schedule_multiplier * h.lr;
    const double inside = h.lr_in_momentum != 0.0 && h.momentum != 0.0 ? rate : 1.0;
    const double outside = h.lr_in_momentum != 0.0 && h.momentum != 0.0 ? 1.0 : rate;
    SgdCoefficients c;
    c.sign = h.maximize != 0.0 ? -1.0f : 1.0f;
    c.l2 = to_coefficient(decay.l2);
    c.momentum = to_coefficient(h.momentum);
    c.c = to_coefficient(at.t == 1 ? inside : inside * (1.0 - h.dampening));
    c.ahead = to_coefficient(inside);
    c.d = to_coefficient(decay.keep);
    c.a = to_coefficient(outside * decay.step);
    return c;
  }
};

}  // namespace fused_adamw
