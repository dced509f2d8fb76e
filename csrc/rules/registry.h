// Every rule the engines are compiled for. A new family adds its branch here.
#pragma once

#include "core/rule_variant.h"
#include "rules/adam.h"

namespace fused_adamw {

// Calls visit(Rule{}) with the functor that `variant` names.
template <class Visit>
decltype(auto) visit_rule(const RuleVariant& variant, Visit&& visit) {
  switch (variant.family) {
    case Family::kAdam:
      break;
  }
  if (variant.l2) {
    return variant.amsgrad ? visit(Adam<true, true>{}) : visit(Adam<true, false>{});
  }
  return variant.amsgrad ? visit(Adam<false, true>{}) : visit(Adam<false, false>{});
}

}  // namespace fused_adamw
