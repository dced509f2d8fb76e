// Names a rule and its compile-time options, so that the layers below the rules can carry one.
#pragma once

namespace fused_adamw {

enum class Family { kAdam };

struct RuleVariant {
  Family family = Family::kAdam;
  bool l2 = false;       // weight decay is added to the gradient
  bool amsgrad = false;  // the running maximum of the second moment is kept

  friend bool operator==(const RuleVariant& x, const RuleVariant& y) {
    return x.family == y.family && x.l2 == y.l2 && x.amsgrad == y.amsgrad;
  }
};

}  // namespace fused_adamw
