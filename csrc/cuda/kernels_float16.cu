// The kernels for parameters in float16.
#include "cuda/kernels.h"
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

int launch_float16(const Bucket& bucket, cudaStream_t stream) {
  return launch_bucket<Float16Formats>(bucket, stream);
}

}  // namespace fused_adamw::cuda
