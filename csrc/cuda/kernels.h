// One entry for each kernels_*.cu: launches the bucket and returns the number of launches, or
// kOtherFormat where the bucket's format is in another file.
#pragma once

#include <cuda_runtime.h>

#include "core/bucket.h"

namespace fused_adamw::cuda {

constexpr int kOtherFormat = -1;

int launch_float32(const Bucket& bucket, cudaStream_t stream);
int launch_bfloat16(const Bucket& bucket, cudaStream_t stream);
int launch_float16(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
