// What one step hands to an engine: tensors that share a rule, a storage format and a device.
#pragma once

#include <cstdint>
#include <vector>

#include "core/extent.h"
#include "core/pass.h"
#include "storage/format.h"

namespace fused_adamw {

// The arrays of one parameter. States follow the gradient in the order of the rule.
enum Slot : int { kParam = 0, kGrad = 1, kFirstState = 2 };
constexpr int kMaxStates = 3;
constexpr int kMaxSlots = kFirstState + kMaxStates;

// Every slot holds `numel` elements in one linear order that is common to all slots.
struct TensorEntry {
  void* slot[kMaxSlots];
  float* ema;                // the average of the parameter; null in a bucket without
  void* beside;              // what the format has beside the parameter; or null
  float* scale[kMaxStates];  // of the states' blocks; null where they are not coded
  std::uint64_t key;         // of its random bits
  Extent extent;             // where its elements are in the whole tensor
  std::int64_t numel;
  std::int32_t row;    // index into Bucket::coefficients, in rows
  std::int32_t group;  // index of the param group
  std::int64_t chunk;  // index of its first chunk among those of the whole list
  std::int64_t step;   // t of the rule, counted from 1
  double scalar;       // what the rule carries from step to step, before this one
};

struct Bucket {
  int functor;  // its index in rules/registry.h
  Format format;
  int device_type = 0;  // DLPack's codes
  int device_index = 0;
  void* stream = nullptr;  // the device's current stream in torch; null on a CPU
  std::vector<TensorEntry> tensors;
  std::vector<float>
      coefficients;  // rows of `coefficients_per_row` floats: the rule's and the pass's
  int coefficients_per_row = 0;
  bool has_ema = false;     // every tensor has an average, or none has
  bool zero_grads = false;  // gradients are zeroed once they have been read
  // Where coefficients are worked out on the device (cuda/tick.h): a row for each `row` of the
  // tensors, and whether nothing is updated. Otherwise null.
  const float* device_rows = nullptr;
  const std::int32_t* skip = nullptr;
  double* observed = nullptr;  // rows of kObserved sums, one a chunk of the list; or null
  std::int64_t numel = 0;      // elements over all tensors

  // Whether nothing is done beside the rule.
  bool is_plain() const { return !has_ema && !zero_grads && observed == nullptr; }

  PassCoefficients& pass(int row) {
    float* end = coefficients.data() + (row + 1) * coefficients_per_row;
    return *reinterpret_cast<PassCoefficients*>(end - kPassCoefficients);
  }

  int rows() const {
    return coefficients_per_row ? static_cast<int>(coefficients.size()) / coefficients_per_row : 0;
  }
};

}  // namespace fused_adamw
