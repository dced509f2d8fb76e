// One entry for each kernels_*.cu: launches the bucket and returns the number of launches.
#pragma once

#include <cuda_runtime.h>

#include "core/bucket.h"

namespace fused_adamw::cuda {

int launch_float32(const Bucket& bucket, cudaStream_t stream);   // every array in float32
int launch_bfloat16(const Bucket& bucket, cudaStream_t stream);  // every array in bfloat16
int launch_mixed(const Bucket& bucket, cudaStream_t stream);     // any format

}  // namespace fused_adamw::cuda
