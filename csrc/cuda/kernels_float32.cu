// The kernels for all arrays in float32.
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

template int launch_bucket<Uniform<float>, false>(const Bucket& bucket, cudaStream_t stream);
template int launch_bucket<Uniform<float>, true>(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
