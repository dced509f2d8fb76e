// Sums of squares whose bits depend on neither threads nor grid.
//
// [note: square sums] A tensor is cut into chunks, a chunk into segments, and a segment's elements
// go to 32 lanes in turn: the registers of a vector unit, or the threads of a warp. Lanes fold by
// halves, segments one after the other; what chunks of a param group gave folds in 256 lanes. All
// in binary64, where the square of a float is exact: no gradient overflows it, and 10^8 of them are
// summed to about 1e-15.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

constexpr std::int64_t kChunk = 16384;   // elements
constexpr std::int64_t kSegment = 2048;  // elements
constexpr int kSegments = kChunk / kSegment;
constexpr int kLanes = 32;
constexpr int kFoldLanes = 256;

FUSED_ADAMW_HD constexpr std::int64_t chunks_of(std::int64_t numel) {
  return (numel + kChunk - 1) / kChunk;
}

// value[0] becomes the sum of `count` values, a power of two.
template <class T>
FUSED_ADAMW_HD void fold_by_halves(T* value, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int t = 0; t < half; ++t) value[t] = value[t] + value[t + half];
  }
}

// Chunk sums partial[0, count * stride), each `stride` apart, to one.
FUSED_ADAMW_HD double fold_chunks(const double* partial, std::int64_t count, int stride = 1) {
  double lane[kFoldLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lane[i % kFoldLanes] += partial[i * stride];
  fold_by_halves(lane, kFoldLanes);
  return lane[0];
}

// The norm of gradients whose squares add up to `total`, unscaled. It is reported as a float, so
// what that cannot hold is infinite to everything that follows.
FUSED_ADAMW_HD double norm_of(double total, double scale) {
  const double norm = sqrt(total) / scale;
  const float reported = static_cast<float>(norm);
  return reported - reported == 0.0f ? norm : static_cast<double>(reported);
}

// How much a gradient of this norm is shrunk: torch.nn.utils.clip_grad_norm_. A NaN stays visible.
FUSED_ADAMW_HD double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

}  // namespace fused_adamw
