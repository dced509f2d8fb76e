// Plays the CUDA grid on the host: every line of the kernel's body runs where no GPU is.
#include <algorithm>
#include <memory>

#include "core/float_environment.h"
#include "cuda/engine.h"
#include "cuda/update_chunk.h"
#include "rules/registry.h"

namespace fused_adamw::cuda {

namespace {

// Of what its threads have, as cuda/reduce.cuh does it.
template <class T>
T fold_block(T (&of_thread)[kThreads]) {
  T sum{};
  for (int warp = 0; warp < kThreads / kLanes; ++warp) {
    fold_by_halves(of_thread + warp * kLanes, kLanes);
    sum = sum + of_thread[warp * kLanes];
  }
  return sum;
}

// The threads of a warp: [note: teams].
struct Warp {
  static constexpr int kPlayed = kLanes;

  template <int kTeam>
  static void share(std::uint32_t (&largest)[kLanes]) {
    for (int first = 0; first < kLanes; first += kTeam) {
      std::uint32_t* const team = largest + first;
      std::fill_n(team, kTeam, *std::max_element(team, team + kTeam));
    }
  }
};

template <class Functor, class Storage, bool kWhole>
void play(const LaunchArguments<Functor, Storage, kWhole>& launch, std::uint32_t block) {
  Observation observed[kThreads]{};
  for (int thread = 0; thread < kThreads; thread += kLanes) {
    Observation of_warp[kLanes]{};
    update_chunk<Warp>(launch, block, thread, of_warp);
    std::copy_n(of_warp, kLanes, observed + thread);
  }
  if (kWhole && launch.observed != nullptr) observation_of(launch, block) = fold_block(observed);
}

// Calls visit(arguments) with an empty argument block for the bucket's launches.
template <class Visit>
void with_arguments(const Bucket& bucket, Visit&& visit) {
  visit_storage(bucket, [&](auto storage, auto whole) {
    visit_functor(bucket.functor, [&](auto functor) {
      using Arguments =
          LaunchArguments<decltype(functor), decltype(storage), decltype(whole)::value>;
      visit(*std::make_unique<Arguments>());
    });
  });
}

}  // namespace

void update_on_host(const Bucket& bucket) {
  const DefaultFloatEnvironment environment;  // as on a GPU
  with_arguments(bucket, [&](auto& arguments) {
    for_each_launch(bucket, arguments, [](const auto& launch, std::uint32_t blocks) {
      for (std::uint32_t block = 0; block < blocks; ++block) play(launch, block);
    });
  });
}

void square_sums_on_host(const Bucket& bucket, double* partials) {
  const DefaultFloatEnvironment environment;
  const auto arguments = std::make_unique<GradientArguments>();
  for_each_launch(bucket, partials, *arguments, [](const auto& launch, std::uint32_t blocks) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      double sums[kThreads];
      for (int thread = 0; thread < kThreads; ++thread) {
        sums[thread] = chunk_square_sum(launch, block, thread);
      }
      square_sum_of(launch, block) = fold_block(sums);
    }
  });
}

void fold_on_host(const FoldArguments& arguments) {
  const DefaultFloatEnvironment environment;
  for (int group = 0; group < arguments.groups; ++group) {
    double lane[kFoldLanes];
    for (int l = 0; l < kFoldLanes; ++l) lane[l] = fold_lane(arguments, group, l);
    fold_by_halves(lane, kFoldLanes);
    arguments.squares[group] = lane[0];
  }
}

void tick_on_host(const TickArguments& arguments) {
  const DefaultFloatEnvironment environment;
  const Decision decision = decide(arguments);
  for (int i = 0; i < arguments.parameter_count && !decision.skip; ++i) {
    tick_parameter(arguments, decision, i);
  }
  tick_groups(arguments, decision);
}

int count_launches(const Bucket& bucket) {
  int launches = 0;
  with_arguments(bucket, [&](auto& arguments) {
    for_each_launch(bucket, arguments, [&](auto&, auto) { ++launches; });
  });
  return launches;
}

}  // namespace fused_adamw::cuda
