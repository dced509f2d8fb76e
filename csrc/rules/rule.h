// What every rule is made of: hyperparameters with their ranges, and what decay does to a step.
//
// A rule is a struct with
//
//   kName            how Python calls it
//   Hyperparameters  doubles only, in the order of kFields
//   kFields          their names and ranges
//   kScalar          name of the number it carries from step to step for each parameter, if any
//   Functors         one or several functors: a rule's compile-time options, or a family's members
//   functor(h)       which of them these hyperparameters need
//   coefficients(h, at)
//
// and a functor one with
//
//   kName, kOptions  what the Triton function is called and told
//   Coefficients     floats only: an engine sees a row of them, uniform in a step
//   kStates          arrays of the parameter's shape that it keeps
//   kKinds           what numbers they have (at least one is named)
//   update(coefficients, param, grad, state)
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "core/closed_forms.h"
#include "core/platform.h"
#include "core/state_kind.h"

namespace fused_adamw {

enum class Range {
  kFinite,
  kAtLeastZero,  // and finite
  kBelowOne,     // in [0, 1)
  kFlag,         // 0 or 1
  kDecay,        // one of Decay
};

struct Field {
  const char* name;      // in reference.py and in _C
  const char* argument;  // what a user calls it
  Range range;
};

// What is left of a parameter after decay, with eta the schedule multiplier.
enum class Decay {
  kLr,         // 1 - eta * lr * weight_decay: torch.optim.AdamW
  kDecoupled,  // 1 - eta * weight_decay: Loshchilov & Hutter, Algorithms 1 and 2
  kL2,         // 1, and weight_decay * param is added to the gradient: Adam
  kProximal,   // 1 / (1 + eta * weight_decay), after the step: Zhuang et al., arXiv 2202.00089
};
constexpr const char* kDecayNames[] = {"lr", "decoupled", "l2", "proximal"};
constexpr int kDecays = 4;

constexpr Field kLrField{"lr", "lr", Range::kAtLeastZero};
constexpr Field kBeta1Field{"beta1", "betas[0]", Range::kBelowOne};
constexpr Field kBeta2Field{"beta2", "betas[1]", Range::kBelowOne};
constexpr Field kEpsField{"eps", "eps", Range::kAtLeastZero};
constexpr Field kWeightDecayField{"weight_decay", "weight_decay", Range::kAtLeastZero};
constexpr Field kScheduleField{"schedule_multiplier", "schedule_multiplier", Range::kAtLeastZero};
constexpr Field kDecayField{"decay", "decay", Range::kDecay};
constexpr Field kMaximizeField{"maximize", "maximize", Range::kFlag};

// Where a parameter stands: the number of this step, from 1, and what the rule carries on.
struct Position {
  std::int64_t t;
  double scalar;  // before the step; coefficients() leaves the value after it

  friend bool operator==(const Position& x, const Position& y) {
    return x.t == y.t && x.scalar == y.scalar;
  }
};

// Decay as factors.
struct Decayed {
  double l2;    // added to the gradient, times the parameter
  double keep;  // what is left of the parameter
  double step;  // factor of the step: decay after it shrinks it too
};

FUSED_ADAMW_HD Decayed decayed(double decay, double lr, double schedule_multiplier,
                               double weight_decay) {
  switch (static_cast<Decay>(static_cast<int>(decay))) {
    case Decay::kLr:
      return {0.0, 1.0 - schedule_multiplier * lr * weight_decay, 1.0};
    case Decay::kDecoupled:
      return {0.0, 1.0 - schedule_multiplier * weight_decay, 1.0};
    case Decay::kL2:
      return {weight_decay, 1.0, 1.0};
    case Decay::kProximal:
      break;
  }
  const double keep = 1.0 / (1.0 + schedule_multiplier * weight_decay);
  return {0.0, keep, keep};
}

inline bool adds_decay(double decay, double weight_decay) {
  return static_cast<Decay>(static_cast<int>(decay)) == Decay::kL2 && weight_decay != 0.0;
}

// The gradient that a rule works on: of the right sign, with decay by L2. Where there is none, an
// infinite parameter must not make a NaN of it.
FUSED_ADAMW_HD float effective_gradient(float sign, float l2, float grad, float param) {
  const float g = sign * grad;
  return l2 != 0.0f ? g + l2 * param : g;
}

FUSED_ADAMW_HD float to_coefficient(double x) { return static_cast<float>(x); }

// A rule may keep no arrays, an array must have an element.
template <int kStates>
using StateArray = float[kStates > 0 ? kStates : 1];

template <class... T>
struct Types {};

template <class... X, class... Y>
Types<X..., Y...> operator+(Types<X...>, Types<Y...>);

}  // namespace fused_adamw
