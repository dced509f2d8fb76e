// The kernels for arrays of any dtypes.
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

template int launch_bucket<Mixed, false>(const Bucket& bucket, cudaStream_t stream);
template int launch_bucket<Mixed, true>(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
