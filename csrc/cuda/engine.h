// The CUDA engine: a bucket in as few launches as its metadata allows.
#pragma once

#include <string>

#include "core/bucket.h"
#include "cuda/tick.h"

namespace fused_adamw::cuda {

// Enqueues the update on `stream` (a cudaStream_t) of the bucket's device and returns; the current
// device is left as it was found. Throws std::runtime_error with CUDA's message. Returns the number
// of launches.
int update(const Bucket& bucket, void* stream);

// Enqueues the sum of squares of every chunk of the bucket's gradients, which goes to the chunk's
// place in `partials`, in the device's memory: [note: square sums].
void square_sums(const Bucket& bucket, double* partials, void* stream);

// Enqueue what precedes an update whose coefficients are worked out on the device: [note: tick].
void fold(const FoldArguments& arguments, int device, void* stream);
void tick(const TickArguments& arguments, int device, void* stream);

// Why the engine cannot run on this machine, in a sentence; empty if it can.
std::string unavailable_reason();

// The number of launches `bucket` takes, without a GPU.
int count_launches(const Bucket& bucket);

// Plays the grid on the host, one thread after the other, over arrays in host memory: the same
// planner, argument block and kernel body. For tests; slow.
void update_on_host(const Bucket& bucket);
void square_sums_on_host(const Bucket& bucket, double* partials);
void fold_on_host(const FoldArguments& arguments);
void tick_on_host(const TickArguments& arguments);

}  // namespace fused_adamw::cuda
