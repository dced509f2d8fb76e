// Hyperparameters and a step number -> the float coefficients of a rule: computed in binary64 and
// rounded once. Runs on host and device with the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/platform.h"
#include "rules/adam.h"

namespace fused_adamw {

// What is left of a parameter after decay, with eta the schedule multiplier.
enum class Decay {
  kLr,         // 1 - eta * lr * weight_decay: torch.optim.AdamW
  kDecoupled,  // 1 - eta * weight_decay: Loshchilov & Hutter, Algorithms 1 and 2
  kL2,         // 1, and weight_decay * param is added to the gradient: Adam
  kProximal,   // 1 / (1 + eta * weight_decay), after the step: Zhuang et al., arXiv 2202.00089
};

struct AdamHyperparameters {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double schedule_multiplier;  // eta
  Decay decay;
  bool amsgrad;
  bool maximize;
};

// x^n by repeated squaring: the same multiplications, hence the same bits, everywhere.
FUSED_ADAMW_HD double integer_power(double x, std::int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    if (n & 1) result *= x;
    x *= x;
  }
  return result;
}

FUSED_ADAMW_HD AdamCoefficients adam_coefficients(const AdamHyperparameters& h, std::int64_t t) {
  const double alpha = h.schedule_multiplier * h.lr;
  const double bias1 = 1.0 - integer_power(h.beta1, t);
  const double root_bias2 = sqrt(1.0 - integer_power(h.beta2, t));
  double keep = 1.0;
  double rate = alpha * root_bias2 / bias1;
  switch (h.decay) {
    case Decay::kLr:
      keep = 1.0 - alpha * h.weight_decay;
      break;
    case Decay::kDecoupled:
      keep = 1.0 - h.schedule_multiplier * h.weight_decay;
      break;
    case Decay::kL2:
      break;
    case Decay::kProximal:
      keep = 1.0 / (1.0 + h.schedule_multiplier * h.weight_decay);
      rate = rate * keep;
      break;
  }
  AdamCoefficients c;
  // The gradient's sign: exact wherever it is applied, and here it costs nothing.
  const double sign = h.maximize ? -1.0 : 1.0;
  c.l2 = static_cast<float>(h.decay == Decay::kL2 ? sign * h.weight_decay : 0.0);
  c.b1 = static_cast<float>(h.beta1);
  c.c1 = static_cast<float>(sign * (1.0 - h.beta1));
  c.b2 = static_cast<float>(h.beta2);
  c.c2 = static_cast<float>(1.0 - h.beta2);
  c.eps = static_cast<float>(h.eps * root_bias2);
  c.d = static_cast<float>(keep);
  c.a = static_cast<float>(rate);
  return c;
}

}  // namespace fused_adamw
