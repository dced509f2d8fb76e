// The kernels for states of codes.
#include "cuda/update_kernel.cuh"

namespace fused_adamw::cuda {

template int launch_bucket<Coded, true>(const Bucket& bucket, cudaStream_t stream);

}  // namespace fused_adamw::cuda
