// The kernels for parameters in bfloat16.
#include "cuda/kernels.h"
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

int launch_bfloat16(const Bucket& bucket, cudaStream_t stream) {
  return launch_bucket<Bfloat16Formats>(bucket, stream);
}

}  // namespace fused_adamw::cuda
