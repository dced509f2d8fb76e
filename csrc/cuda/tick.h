// What a step works out on the device before it updates: whether it is skipped, the factor of the
// gradients, and of every parameter the coefficients. So a step waits for no value of the device's,
// and a captured graph replays with whatever the device's memory holds then.
//
// [note: tick] A tick is one block. It reads one record a param group and one a parameter, which
// the host wrote when they last changed, and writes one row of coefficients a parameter. It counts
// the step, too, so what follows it only updates. Nothing is counted when a step is skipped.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/pass.h"
#include "core/platform.h"
#include "core/square_sum.h"
#include "rules/registry.h"
#include "schedules/program.h"

namespace fused_adamw::cuda {

// A row on the device: a rule's coefficients, the pass's, and room.
constexpr int kDeviceRow = 16;

// Of words of 8 bytes, as tables of the device are made.
struct GroupRecord {
  std::int64_t rule;                // in Rules
  double value[kMostFields];        // hyperparameters in the order of the rule's fields
  const void* source[kMostFields];  // where one lives on the device instead; or null
  std::int64_t is_double;           // a bit for each source: float64, otherwise float32
  std::int64_t multiplier;          // which of the fields the schedule sets
  const double* schedule;           // its program; or null
  std::int64_t* schedule_step;      // steps taken
  double ema_weight;
};

struct ParameterRecord {
  float* step;         // steps taken; null where the rule keeps nothing and does not ask
  double* scalar;      // what the rule carries; or null
  float* averaged;     // 0 before the first average; or null
  std::int64_t group;  // index of its record
  std::int64_t row;    // index of its row
};

// The chunks of a param group: [note: square sums].
struct FoldArguments {
  const double* partials;
  const std::int64_t* end;  // of each group's chunks, which begin where the last one's end
  double* squares;          // one a group
  int groups;
};

struct TickArguments {
  const GroupRecord* groups;
  const ParameterRecord* parameters;
  int group_count, parameter_count;
  const double* squares;  // one a group; null where the norm is not measured
  const float* grad_scale;
  const float* found_inf;  // or null
  bool clips;
  const float* max_grad_norm_at;  // or null: max_grad_norm
  double max_grad_norm;
  bool skip_nonfinite;
  float* rows;
  float* grad_norm;
  std::int32_t* skip;
};

// Lane `lane` of the sum over the chunks of a group.
FUSED_ADAMW_HD double fold_lane(const FoldArguments& arguments, int group, int lane) {
  const std::int64_t begin = group ? arguments.end[group - 1] : 0;
  double sum = 0.0;
  for (std::int64_t i = begin + lane; i < arguments.end[group]; i += kFoldLanes) {
    sum += arguments.partials[i];
  }
  return sum;
}

struct Decision {
  bool skip;
  float grad_factor;
  float norm;
};

FUSED_ADAMW_HD Decision decide(const TickArguments& arguments) {
  const double scale = arguments.grad_scale ? *arguments.grad_scale : 1.0;
  Decision decision{arguments.found_inf && *arguments.found_inf != 0.0f, 1.0f, 0.0f};
  double coefficient = 1.0;
  if (arguments.squares) {
    double total = 0.0;
    for (int g = 0; g < arguments.group_count; ++g) total += arguments.squares[g];
    const double norm = norm_of(total, scale);
    const double most =
        arguments.max_grad_norm_at ? *arguments.max_grad_norm_at : arguments.max_grad_norm;
    if (arguments.clips) coefficient = clip_coefficient(norm, most);
    if (arguments.skip_nonfinite && !(norm - norm == 0.0)) decision.skip = true;
    decision.norm = static_cast<float>(norm);
  }
  decision.grad_factor = static_cast<float>(coefficient / scale);
  return decision;
}

FUSED_ADAMW_HD double value_of(const GroupRecord& group, int field) {
  const void* source = group.source[field];
  if (source == nullptr) return group.value[field];
  return group.is_double >> field & 1 ? *static_cast<const double*>(source)
                                      : *static_cast<const float*>(source);
}

FUSED_ADAMW_HD void tick_parameter(const TickArguments& arguments, const Decision& decision,
                                   int index) {
  const ParameterRecord& parameter = arguments.parameters[index];
  const GroupRecord& group = arguments.groups[parameter.group];
  double values[kMostFields];
  FUSED_ADAMW_UNROLL
  for (int k = 0; k < kMostFields; ++k) values[k] = value_of(group, k);
  if (group.schedule) {
    values[group.multiplier] = schedules::evaluate(group.schedule, *group.schedule_step);
  }
  Position at{parameter.step ? static_cast<std::int64_t>(*parameter.step) + 1 : 2,
              parameter.scalar ? *parameter.scalar : 0.0};
  float* row = arguments.rows + parameter.row * kDeviceRow;
  visit_rule(Rules{}, static_cast<int>(group.rule), [&](auto rule) {
    using Rule = decltype(rule);
    const auto c = Rule::coefficients(detail::hyperparameters<Rule>(values), at);
    static_assert(sizeof c + sizeof(PassCoefficients) <= kDeviceRow * sizeof(float),
                  "a row has room for every rule");
    memcpy(row, &c, sizeof c);
    const bool begins = parameter.averaged && *parameter.averaged == 0.0f;
    const PassCoefficients pass{decision.grad_factor,
                                begins ? 1.0f : static_cast<float>(group.ema_weight),
                                static_cast<std::uint32_t>(*group.schedule_step)};
    memcpy(row + sizeof c / sizeof(float), &pass, sizeof pass);
  });
  if (parameter.step) *parameter.step += 1.0f;
  if (parameter.scalar) *parameter.scalar = at.scalar;
  if (parameter.averaged) *parameter.averaged = 1.0f;
}

// After all parameters.
FUSED_ADAMW_HD void tick_groups(const TickArguments& arguments, const Decision& decision) {
  *arguments.skip = decision.skip;
  if (arguments.squares) *arguments.grad_norm = decision.norm;
  if (decision.skip) return;
  for (int g = 0; g < arguments.group_count; ++g) *arguments.groups[g].schedule_step += 1;
}

}  // namespace fused_adamw::cuda
