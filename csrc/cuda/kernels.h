// The launch of an update, defined in cuda/update_kernel.cuh and instantiated by kernels_*.cu, one
// for each storage that visit_storage() tells apart, with a whole step or without.
#pragma once

#include <cuda_runtime.h>

#include "core/bucket.h"

namespace fused_adamw::cuda {

// Launches every piece of the bucket and returns their number.
template <class Storage, bool kWhole>
int launch_bucket(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
