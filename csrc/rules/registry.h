// Every rule there is, and every functor that the engines are compiled for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <vector>

#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace fused_adamw {

using Rules = Types<AdamRule, NadamRule, SgdRule, RmspropRule, AdagradRule, AdadeltaRule,
                    AdamaxRule, LionRule>;

template <class... Rule>
auto functors_of(Types<Rule...>) -> decltype((typename Rule::Functors{} + ...));
using Functors = decltype(functors_of(Rules{}));

template <class... T>
constexpr int count(Types<T...>) {
  return sizeof...(T);
}

// Calls visit(Functor{}) with the `index`-th of Functors.
template <class Visit, class... Functor>
void visit_functor(Types<Functor...>, int index, Visit&& visit) {
  int i = 0;
  (void)((i++ == index && (visit(Functor{}), true)) || ...);
}
template <class Visit>
void visit_functor(int index, Visit&& visit) {
  visit_functor(Functors{}, index, visit);
}

// Calls visit(Rule{}) with the `index`-th of Rules.
template <class Visit, class... Rule>
FUSED_ADAMW_HD void visit_rule(Types<Rule...>, int index, Visit&& visit) {
  int i = 0;
  (void)((i++ == index && (visit(Rule{}), true)) || ...);
}

// The most numbers that any rule takes.
template <class... Rule>
constexpr int most_fields(Types<Rule...>) {
  int most = 0;
  for (const std::size_t bytes : {sizeof(typename Rule::Hyperparameters)...}) {
    const int count = static_cast<int>(bytes / sizeof(double));
    most = count > most ? count : most;
  }
  return most;
}
constexpr int kMostFields = most_fields(Rules{});

// What the layers that know no rule see of one: hyperparameters as doubles in the order of
// `fields`, coefficients as a row of floats.
struct RuleInfo {
  const char* name;
  int index;  // in Rules
  std::vector<Field> fields;
  const char* scalar;                             // null if it carries none
  int (*functor)(const double* hyperparameters);  // its index in Functors
  void (*coefficients)(const double* hyperparameters, Position& at, float* row);
};

// And of a functor.
struct FunctorInfo {
  const char* name;
  std::vector<bool> options;
  int states;
  std::vector<StateKind> kinds;  // of the states
  int coefficients;
};

namespace detail {

template <class Rule>
FUSED_ADAMW_HD typename Rule::Hyperparameters hyperparameters(const double* values) {
  typename Rule::Hyperparameters h;
  static_assert(sizeof h == sizeof Rule::kFields / sizeof(Field) * sizeof(double),
                "a rule's fields are its hyperparameters");
  memcpy(&h, values, sizeof h);
  return h;
}

template <class Rule, int kFirstFunctor>
RuleInfo describe(int index) {
  return {Rule::kName,
          index,
          std::vector<Field>(std::begin(Rule::kFields), std::end(Rule::kFields)),
          Rule::kScalar,
          [](const double* values) {
            return kFirstFunctor + Rule::functor(hyperparameters<Rule>(values));
          },
          [](const double* values, Position& at, float* row) {
            const auto c = Rule::coefficients(hyperparameters<Rule>(values), at);
            std::memcpy(row, &c, sizeof c);
          }};
}

template <int kFirstFunctor>
void describe_all(std::vector<RuleInfo>&, Types<>) {}

template <int kFirstFunctor, class Rule, class... More>
void describe_all(std::vector<RuleInfo>& infos, Types<Rule, More...>) {
  infos.push_back(describe<Rule, kFirstFunctor>(static_cast<int>(infos.size())));
  describe_all<kFirstFunctor + count(typename Rule::Functors{})>(infos, Types<More...>{});
}

}  // namespace detail

inline const std::vector<RuleInfo>& rule_infos() {
  static const std::vector<RuleInfo> infos = [] {
    std::vector<RuleInfo> found;
    detail::describe_all<0>(found, Rules{});
    return found;
  }();
  return infos;
}

namespace detail {

template <class... Functor>
std::vector<FunctorInfo> describe_functors(Types<Functor...>) {
  return {FunctorInfo{
      Functor::kName, std::vector<bool>(Functor::kOptions.begin(), Functor::kOptions.end()),
      Functor::kStates, std::vector<StateKind>(Functor::kKinds, Functor::kKinds + Functor::kStates),
      static_cast<int>(sizeof(typename Functor::Coefficients) / sizeof(float))}...};
}

}  // namespace detail

inline const FunctorInfo& functor_info(int index) {
  static const std::vector<FunctorInfo> infos = detail::describe_functors(Functors{});
  return infos.at(static_cast<std::size_t>(index));
}

}  // namespace fused_adamw
