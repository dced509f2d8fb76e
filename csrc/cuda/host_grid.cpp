// Plays the CUDA grid on the host: every line of the kernel's body runs where no GPU is.
#include <memory>

#include "core/float_environment.h"
#include "cuda/engine.h"
#include "cuda/update_chunk.h"
#include "rules/registry.h"

namespace fused_adamw::cuda {

void update_on_host(const Bucket& bucket) {
  const DefaultFloatEnvironment environment;  // as on a GPU
  visit_rule(bucket.rule, [&](auto rule) {
    using Rule = decltype(rule);
    visit_format(Formats{}, bucket.format, [&](auto format) {
      using Format = decltype(format);
      const auto arguments = std::make_unique<LaunchArguments<Rule>>();
      for_each_launch<Rule>(bucket, *arguments, [](const auto& launch, std::uint32_t blocks) {
        for (std::uint32_t block = 0; block < blocks; ++block) {
          for (int thread = 0; thread < kThreads; ++thread) {
            update_chunk<Rule, Format>(launch, block, thread);
          }
        }
      });
    });
  });
}

int count_launches(const Bucket& bucket) {
  int launches = 0;
  visit_rule(bucket.rule, [&](auto rule) {
    const auto arguments = std::make_unique<LaunchArguments<decltype(rule)>>();
    for_each_launch<decltype(rule)>(bucket, *arguments, [&](auto&, auto) { ++launches; });
  });
  return launches;
}

}  // namespace fused_adamw::cuda
