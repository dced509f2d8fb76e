// The schedule multiplier eta from the count of completed steps, on host and device.
//
// [note: schedule programs] A schedule is compiled (fused_adamw/device_schedules.py) to plain data,
// a table of doubles that ends with kEnd. Each row has kRowWords:
//
//   opcode   what the row does
//   first    the row counts only while first <= t <= last: the steps at which its part of the
//   last     schedule is in force; its own steps are t - first
//   fields   those of the Python class, in its order; the rest is zero
//
// The rows that count are a calculation in postfix order: a kProduct replaces the two numbers on
// top of the stack by their product, every other row puts its multiplier there. A Sequential has
// no row, since first and last are how one schedule follows another. A table of zeros, with no row
// at all, is no schedule. Counts are integers up to 2^53, exact as doubles.
#pragma once

#include <cstdint>

#include "core/closed_forms.h"
#include "core/platform.h"

namespace fused_adamw::schedules {

enum Opcode {
  kEnd,
  kConstant,
  kStepDecay,
  kLinearWarmup,
  kCosineAnnealing,
  kCosineWarmRestarts,
  kPolynomial,
  kProduct,
};
// The kinds of fused_adamw/schedules.py.
constexpr const char* kOpcodeNames[] = {"end",           "constant",         "step-decay",
                                        "linear-warmup", "cosine-annealing", "cosine-warm-restarts",
                                        "polynomial",    "product"};

enum Word { kOpcode, kFirst, kLast, kFields };
constexpr int kRowWords = kFields + 4;
constexpr int kMaxRows = 32;
constexpr int kMaxWords = kMaxRows * kRowWords + 1;  // and kEnd
// Of n numbers on the stack all but one are taken off by a product each.
constexpr int kMaxDepth = (kMaxRows + 1) / 2;

FUSED_ADAMW_HD int opcode(const double* row) { return static_cast<int>(row[kOpcode]); }

FUSED_ADAMW_HD bool is_empty(const double* program) { return opcode(program) == kEnd; }

FUSED_ADAMW_HD std::int64_t count(double word) { return static_cast<std::int64_t>(word); }

// Steps since the last restart as a part of their cycle.
FUSED_ADAMW_HD double part_of_cycle(double t, double t_0, double t_mult) {
  if (t_mult == 1.0) return static_cast<double>(count(t) % count(t_0)) / t_0;
  double since = t, length = t_0;
  while (since >= length) {  // at most 53 times, and nothing rounds
    since -= length;
    length *= t_mult;
  }
  return since / length;
}

// How far a schedule between eta_min and eta_max is towards eta_max.
FUSED_ADAMW_HD double weight(int opcode, const double* field, double t) {
  const double length = field[0];
  if (opcode == kLinearWarmup) return t < length ? t / length : 1.0;
  if (opcode == kPolynomial) {
    return integer_power((t < length ? length - t : 0.0) / length, count(field[1]));
  }
  const double part = opcode == kCosineWarmRestarts ? part_of_cycle(t, length, field[1])
                      : t < length                  ? t / length
                                                    : 1.0;
  return 0.5 * (1.0 + cos_pi(part));
}

// What a row that is not a product puts on the stack, `t` steps after its first.
FUSED_ADAMW_HD double multiplier(const double* row, double t) {
  const double* field = row + kFields;
  if (opcode(row) == kConstant) return field[0];
  if (opcode(row) == kStepDecay) {
    return field[2] * integer_power(field[1], count(t) / count(field[0]));
  }
  const double eta_min = field[0], eta_max = field[1];
  const double towards_max = weight(opcode(row), field + 2, t);
  const double eta = eta_max * towards_max + eta_min * (1.0 - towards_max);
  const double from_below = eta_min > eta ? eta_min : eta;
  return eta_max < from_below ? eta_max : from_below;
}

// The bits of schedule(t) in Python, for t in [0, 2^53] and a program that is not empty.
FUSED_ADAMW_HD double evaluate(const double* program, std::int64_t t) {
  double stack[kMaxDepth] = {};
  int depth = 0;
  const double now = static_cast<double>(t);
  for (const double* row = program; opcode(row) != kEnd; row += kRowWords) {
    if (now < row[kFirst] || now > row[kLast]) continue;
    if (opcode(row) == kProduct) {
      --depth;
      stack[depth - 1] *= stack[depth];
    } else {
      stack[depth++] = multiplier(row, now - row[kFirst]);
    }
  }
  return stack[0];
}

}  // namespace fused_adamw::schedules
