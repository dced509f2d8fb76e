// The kernels for arrays of any dtypes.
#include "cuda/kernels.h"
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

int launch_mixed(const Bucket& bucket, cudaStream_t stream) {
  return launch_bucket<Mixed>(bucket, stream);
}

}  // namespace fused_adamw::cuda
