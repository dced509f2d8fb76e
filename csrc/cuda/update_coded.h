// The update of states that are coded in blocks.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "core/square_sum.h"
#include "cuda/packs.h"
#include "cuda/params.h"
#include "cuda/storages.h"
#include "cuda/work.h"
#include "storage/codes.h"

namespace fused_adamw::cuda {

// [note: teams] A thread holds 16 neighbours, so a block of codes is that of four neighbouring
// threads. None of them can encode before it knows the largest magnitude of all four: so a pack is
// done in two parts, and between them the team shares its magnitudes. On a GPU that is two shuffles
// within a warp; a host plays a team's threads together, each part for all of them. A `Team` has
//
//   kPlayed         how many threads are played together: 1 on a GPU, all of a team on a host
//   share(largest)  the largest of what all of the team's threads have
constexpr int kCodesPerThread = Coded::kPerThread;
constexpr int kTeam = kCodeBlock / kCodesPerThread;

// What a thread keeps of its pack's states between the parts: their values, and the bits of the
// largest magnitude.
template <int kStates>
struct Uncoded {
  StateArray<kStates> value[kCodesPerThread];
  std::uint32_t largest[kStates > 0 ? kStates : 1];
};

template <class Functor, int k>
using CodesOf = Codes<Functor::kKinds[k]>;

// Calls use(std::integral_constant<int, k>{}) for each state.
template <int kStates, int k = 0, class Use>
FUSED_ADAMW_HD void for_each_state(Use&& use) {
  if constexpr (k < kStates) {
    use(std::integral_constant<int, k>{});
    for_each_state<kStates, k + 1>(use);
  }
}

// Where a thread's pack begins, and how many of its elements there are: of a tensor's last, fewer
// than all, or none.
struct Place {
  std::int64_t i;
  int count;
  bool wide;  // all, and accesses of 16 bytes will do

  FUSED_ADAMW_HD Place(std::int64_t i, std::int64_t end, bool aligned)
      : i(i),
        count(static_cast<int>(end - i < kCodesPerThread ? end - i : kCodesPerThread)),
        wide(aligned && count == kCodesPerThread) {}

  // Calls use(access) with the way to the elements.
  template <class Use>
  FUSED_ADAMW_HD void with_access(Use&& use) const {
    if (wide) {
      use(Wide<kCodesPerThread>{});
    } else {
      use(Ragged<kCodesPerThread>{count});
    }
  }
  FUSED_ADAMW_HD std::int64_t block() const {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(i) / kCodeBlock);
  }
  FUSED_ADAMW_HD bool begins_block() const { return i % kCodeBlock == 0 && count > 0; }
};

template <class Functor, class Storage, bool kWhole, class Access>
FUSED_ADAMW_HD void load_grads(const Work<Functor, Storage, kWhole>& work, const Place& at,
                               const Access& access, Raw<kCodesPerThread * sizeof(float)>& raw) {
  const void* from = work.arrays.slot[kGrad];
  if (work.arguments.format.grad == Dtype::kFloat32) {
    access.load(static_cast<const float*>(from) + at.i, raw);
  } else {
    access.load(static_cast<const std::uint16_t*>(from) + at.i, raw);
  }
}

// What follows the parameter as it was stored, but is not yet in memory: what is there is read once
// more, which a rare step may cost rather than every step registers.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void observe_pack(const Work<Functor, Storage, kWhole>& work, const Place& at,
                                 const RawParams<kCodesPerThread>& stored, Observation& observed) {
  const Format format = work.arguments.format;
  RawParams<kCodesPerThread> raw, raw_grad;
  at.with_access([&](const auto& access) {
    load_params<Storage, kCodesPerThread>(format, work.arrays.slot[kParam], work.arrays.beside(),
                                          at.i, access, raw);
    load_grads(work, at, access, raw_grad);
  });
  float before[kCodesPerThread], after[kCodesPerThread], grad[kCodesPerThread];
  values_of<Storage>(format, raw, before);
  values_of<Storage>(format, stored, after);
  Storage::with_type(format.grad, [&](auto type) { widen<decltype(type)>(raw_grad, grad); });
  FUSED_ADAMW_UNROLL
  for (int j = 0; j < kCodesPerThread; ++j) {
    if (j < at.count) observed = observed + observe(grad[j], before[j], after[j]);
  }
}

// What follows it once it is in memory.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void average_pack(const Work<Functor, Storage, kWhole>& work, const Place& at,
                                 const RawParams<kCodesPerThread>& stored, float weight) {
  const Format format = work.arguments.format;
  float* const ema = work.arrays.ema() + at.i;
  if (at.wide) {
    constexpr Wide<kCodesPerThread> access;
    Raw<kCodesPerThread * sizeof(float)> raw;
    float average[kCodesPerThread], after[kCodesPerThread];
    access.load(ema, raw);
    widen<float>(raw, average);
    values_of<Storage>(format, stored, after);
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCodesPerThread; ++j) average[j] = averaged(average[j], after[j], weight);
    store(ema, average);
    return;
  }
  FUSED_ADAMW_NO_UNROLL
  for (int j = 0; j < at.count; ++j) {
    RawParams<1> raw;
    float after[1];
    load_params<Storage, 1>(format, work.arrays.slot[kParam], work.arrays.beside(), at.i + j,
                            Wide<1>{}, raw);
    values_of<Storage>(format, raw, after);
    ema[j] = averaged(ema[j], after[0], weight);
  }
}

template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void zero_pack(const Work<Functor, Storage, kWhole>& work, const Place& at) {
  const auto zero = [&](auto type) {
    using T = decltype(type);
    T* const grad = static_cast<T*>(work.arrays.slot[kGrad]) + at.i;
    if (at.wide) return Wide<kCodesPerThread>{}.store(grad, Raw<kCodesPerThread * sizeof(T)>{});
    FUSED_ADAMW_NO_UNROLL
    for (int j = 0; j < at.count; ++j) grad[j] = T{};
  };
  work.arguments.format.grad == Dtype::kFloat32 ? zero(float{}) : zero(std::uint16_t{});
}

// The first part: everything but the codes of the new states.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_pack(const Work<Functor, Storage, kWhole>& work, const Row<Functor>& row,
                                const Draws<Storage::kShare>& draws, const Place& at,
                                Uncoded<Functor::kStates>& states, Observation& observed) {
  constexpr int kStates = Functor::kStates, kCount = kCodesPerThread;
  const auto& arguments = work.arguments;
  const auto& arrays = work.arrays;
  const Format format = arguments.format;
  RawParams<kCount> raw;
  Raw<kCount * sizeof(float)> raw_grad;
  Raw<kCount> codes[kStates > 0 ? kStates : 1];
  float scale[kStates > 0 ? kStates : 1];
  at.with_access([&](const auto& access) {
    load_params<Storage, kCount>(format, arrays.slot[kParam], arrays.beside(), at.i, access, raw);
    load_grads(work, at, access, raw_grad);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kStates; ++k) {
      access.load(static_cast<const std::uint8_t*>(arrays.slot[kFirstState + k]) + at.i, codes[k]);
    }
  });
  FUSED_ADAMW_UNROLL
  for (int k = 0; k < kStates; ++k) {
    scale[k] = at.count > 0 ? arrays.scale[k][at.block()] : 0.0f;
  }
  float param[kCount], grad[kCount];
  values_of<Storage>(format, raw, param);
  Storage::with_type(format.grad, [&](auto type) { widen<decltype(type)>(raw_grad, grad); });

  FUSED_ADAMW_UNROLL
  for (int j = 0; j < kCount; ++j) {
    StateArray<kStates>& state = states.value[j];
    for_each_state<kStates>([&](auto index) {
      constexpr int k = decltype(index)::value;
      using Codes = CodesOf<Functor, k>;
      const int code = codes[k].template get<typename Codes::Code>(j);
      state[k] = Codes::value_of(code, Codes::unit_of(scale[k]));
    });
    Functor::update(row.rule, param[j], grad[j] * row.pass.grad_factor, state);
  }
  if (at.count < kCount) {  // what is not there has no say
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) {
        if (j >= at.count) states.value[j][k] = 0.0f;
      }
    }
  }
  FUSED_ADAMW_UNROLL
  for (int k = 0; k < kStates; ++k) {
    states.largest[k] = 0;
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      states.largest[k] = larger_magnitude(states.largest[k], states.value[j][k]);
    }
  }

  encode_params<Storage>(format, param, [&] { return draws.template of<kCount>(at.i); }, raw);
  if (arguments.observed != nullptr) observe_pack(work, at, raw, observed);
  at.with_access([&](const auto& access) {
    store_params<Storage, kCount>(format, raw, arrays.slot[kParam], arrays.beside(), at.i, access);
  });
  if (arguments.has_ema) average_pack(work, at, raw, row.pass.ema_weight);
  if (arguments.zero_grads) zero_pack(work, at);
}

// The second part, after `states` have the team's largest magnitudes.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void encode_pack(const Work<Functor, Storage, kWhole>& work, const Place& at,
                                const Uncoded<Functor::kStates>& states) {
  constexpr int kStates = Functor::kStates, kCount = kCodesPerThread;
  Raw<kCount> codes[kStates > 0 ? kStates : 1];
  for_each_state<kStates>([&](auto index) {
    constexpr int k = decltype(index)::value;
    using Codes = CodesOf<Functor, k>;
    const float scale = Codes::scale_of(states.largest[k]);
    const float factor = Codes::factor_of(scale);
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; j += 4) {
      const float four[] = {states.value[j][k], states.value[j + 1][k], states.value[j + 2][k],
                            states.value[j + 3][k]};
      const std::uint32_t word = codes_of<Functor::kKinds[k]>(four, factor);
      codes[k].words[j / 4] = factor == 0.0f ? 0 : word;
    }
    if (at.begins_block()) work.arrays.scale[k][at.block()] = scale;
  });
  at.with_access([&](const auto& access) {
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kStates; ++k) {
      access.store(static_cast<std::uint8_t*>(work.arrays.slot[kFirstState + k]) + at.i, codes[k]);
    }
  });
}

// All that threads `thread` and following do. A warp goes round as long as one of its threads has
// an element, for teams are within warps.
template <class Team, class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_coded(const Work<Functor, Storage, kWhole>& work,
                                 const Row<Functor>& row, int thread,
                                 Observation (&observed)[Team::kPlayed]) {
  constexpr int kPlayed = Team::kPlayed, kStates = Functor::kStates;
  static_assert(kTeam % kPlayed == 0 && kLanes % kTeam == 0, "a team is part of a warp");
  const bool aligned = work.arrays.aligned();
  const auto draws = draws_of(work, row.pass.random_step);
  const int lane = thread % kLanes * kCodesPerThread;
  FUSED_ADAMW_NO_UNROLL
  for (std::int64_t first = work.begin + thread / kLanes * (kLanes * kCodesPerThread);
       first < work.end; first += kThreads * kCodesPerThread) {
    Uncoded<kStates> states[kPlayed];
    FUSED_ADAMW_UNROLL
    for (int l = 0; l < kPlayed; ++l) {
      const Place at(first + lane + l * kCodesPerThread, work.end, aligned);
      update_pack(work, row, draws, at, states[l], observed[l]);
    }
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kStates; ++k) {
      std::uint32_t largest[kPlayed];
      for (int l = 0; l < kPlayed; ++l) largest[l] = states[l].largest[k];
      const std::uint32_t of_team = Team::share(largest);
      for (int l = 0; l < kPlayed; ++l) states[l].largest[k] = of_team;
    }
    FUSED_ADAMW_UNROLL
    for (int l = 0; l < kPlayed; ++l) {
      const Place at(first + lane + l * kCodesPerThread, work.end, aligned);
      encode_pack(work, at, states[l]);
    }
  }
}

}  // namespace fused_adamw::cuda
