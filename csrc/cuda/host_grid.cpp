// Plays the CUDA grid on the host: every line of the kernel's body runs where no GPU is.
#include <memory>

#include "core/float_environment.h"
#include "cuda/engine.h"
#include "cuda/update_chunk.h"
#include "rules/registry.h"

namespace fused_adamw::cuda {

namespace {

template <class Storage>
void play(const Bucket& bucket) {
  visit_functor(bucket.functor, [&](auto functor) {
    using Functor = decltype(functor);
    const auto arguments = std::make_unique<LaunchArguments<Functor>>();
    for_each_launch<Functor>(bucket, *arguments, [](const auto& launch, std::uint32_t blocks) {
      for (std::uint32_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < kThreads; ++thread) {
          update_chunk<Functor, Storage>(launch, block, thread);
        }
      }
    });
  });
}

}  // namespace

void update_on_host(const Bucket& bucket) {
  const DefaultFloatEnvironment environment;  // as on a GPU
  if (bucket.format.all(Dtype::kFloat32)) {
    play<Uniform<float>>(bucket);
  } else if (bucket.format.all(Dtype::kBfloat16)) {
    play<Uniform<bfloat16>>(bucket);
  } else {
    play<Mixed>(bucket);
  }
}

int count_launches(const Bucket& bucket) {
  int launches = 0;
  visit_functor(bucket.functor, [&](auto functor) {
    const auto arguments = std::make_unique<LaunchArguments<decltype(functor)>>();
    for_each_launch<decltype(functor)>(bucket, *arguments, [&](auto&, auto) { ++launches; });
  });
  return launches;
}

}  // namespace fused_adamw::cuda
