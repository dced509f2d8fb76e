// What a param group tells a step: which rule, and its coefficients at step t.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/rule_variant.h"
#include "rules/coefficients.h"

namespace fused_adamw::host {

class Hyperparameters {
 public:
  virtual ~Hyperparameters() = default;
  virtual RuleVariant variant() const = 0;
  virtual int state_count() const = 0;
  virtual int coefficient_count() const = 0;
  virtual void coefficients_at(std::int64_t t, float* row) const = 0;
};

inline void require(bool accepted, const char* name, double found, const char* range) {
  if (accepted) return;
  throw std::invalid_argument(std::string(name) + ": found " +
                              std::string(pybind11::str(pybind11::float_(found))) +
                              ", accepted: " + range);
}

class Adam : public Hyperparameters {
 public:
  explicit Adam(const AdamHyperparameters& values) : values(values) {
    const auto at_least_zero = [](const char* name, double found) {
      require(found >= 0.0 && std::isfinite(found), name, found, "a finite number >= 0");
    };
    const auto below_one = [](const char* name, double found) {
      require(found >= 0.0 && found < 1.0, name, found, "a number in [0, 1)");
    };
    at_least_zero("lr", values.lr);
    below_one("betas[0]", values.beta1);
    below_one("betas[1]", values.beta2);
    at_least_zero("eps", values.eps);
    at_least_zero("weight_decay", values.weight_decay);
    at_least_zero("schedule_multiplier", values.schedule_multiplier);
  }

  RuleVariant variant() const override {
    return {Family::kAdam, values.decay == Decay::kL2 && values.weight_decay != 0.0,
            values.amsgrad};
  }
  int state_count() const override { return values.amsgrad ? 3 : 2; }
  int coefficient_count() const override { return sizeof(AdamCoefficients) / sizeof(float); }
  void coefficients_at(std::int64_t t, float* row) const override {
    *reinterpret_cast<AdamCoefficients*>(row) = adam_coefficients(values, t);
  }

  const AdamHyperparameters values;
};

}  // namespace fused_adamw::host
