// The CPU engine: one parallel region over a flat list of ranges, vectorised by the compiler.
#pragma once

#include "core/bucket.h"

namespace fused_adamw::cpu {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };
constexpr const char* kSimdLevelNames[] = {"baseline", "avx2", "avx512"};

// The best level of this processor; baseline on anything but x86-64.
SimdLevel best_simd_level();

// Updates every tensor of the bucket with at most `threads` threads. `level` must not exceed
// best_simd_level(). All levels and thread counts give the same bits.
void update(const Bucket& bucket, int threads, SimdLevel level);

// Writes the sum of squares of every chunk of the bucket's gradients to the chunk's place in
// `partials`: [note: square sums].
void square_sums(const Bucket& bucket, double* partials, int threads, SimdLevel level);

}  // namespace fused_adamw::cpu
