// The kernels for all arrays in float32.
#include "cuda/kernels.h"
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

int launch_float32(const Bucket& bucket, cudaStream_t stream) {
  return launch_bucket<Uniform<float>>(bucket, stream);
}

}  // namespace fused_adamw::cuda
