// The kernels for all arrays in bfloat16.
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

template int launch_bucket<Uniform<bfloat16>, false>(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
