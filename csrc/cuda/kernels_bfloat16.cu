// The kernels for all arrays in bfloat16.
#include "cuda/kernels.h"
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

int launch_bfloat16(const Bucket& bucket, cudaStream_t stream) {
  return launch_bucket<Uniform<bfloat16>>(bucket, stream);
}

}  // namespace fused_adamw::cuda
