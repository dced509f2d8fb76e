// The kernels for parameters with something beside them, and for stochastic rounding.
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

template int launch_bucket<Joined, false>(const Bucket& bucket, cudaStream_t stream);
template int launch_bucket<Joined, true>(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
