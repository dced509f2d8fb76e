// What a param group tells a step: which rule, and its coefficients at a step.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rules/registry.h"

namespace fused_adamw::host {

class Hyperparameters {
 public:
  // `values` in the order of the rule's fields; std::invalid_argument names one out of range.
  Hyperparameters(const RuleInfo& rule, std::vector<double> values)
      : rule(rule), values(std::move(values)) {
    for (std::size_t i = 0; i < rule.fields.size(); ++i) check(rule.fields[i], this->values[i]);
    functor = rule.functor(this->values.data());
    const FunctorInfo& info = functor_info(functor);
    states = info.states;
    coefficients = info.coefficients;
  }

  // Leaves in `at` what the rule carries on.
  void coefficients_at(Position& at, float* row) const {
    rule.coefficients(values.data(), at, row);
  }

  const RuleInfo& rule;
  const std::vector<double> values;
  int functor;
  int states;        // arrays
  int coefficients;  // floats in a row

 private:
  static void check(const Field& field, double found) {
    switch (field.range) {
      case Range::kFinite:
        return require(std::isfinite(found), field, found, "a finite number");
      case Range::kAtLeastZero:
        return require(found >= 0.0 && std::isfinite(found), field, found, "a finite number >= 0");
      case Range::kBelowOne:
        return require(found >= 0.0 && found < 1.0, field, found, "a number in [0, 1)");
      case Range::kFlag:
        return require(found == 0.0 || found == 1.0, field, found, "True or False");
      case Range::kDecay:
        return require(found >= 0.0 && found < kDecays, field, found, "a convention of decay");
    }
  }

  static void require(bool accepted, const Field& field, double found, const char* range) {
    if (accepted) return;
    throw std::invalid_argument(std::string(field.argument) + ": found " +
                                std::string(pybind11::str(pybind11::float_(found))) +
                                ", accepted: " + range);
  }
};

}  // namespace fused_adamw::host
