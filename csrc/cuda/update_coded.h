// The update of states that are coded in blocks.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "core/square_sum.h"
#include "cuda/packs.h"
#include "cuda/params.h"
#include "cuda/storages.h"
#include "cuda/words.h"
#include "cuda/work.h"
#include "storage/codes.h"

namespace fused_adamw::cuda {

// [note: teams] A thread holds 16 neighbours, so a block of codes is that of four neighbouring
// threads. None of them can encode before it knows the largest magnitude of all four: so an update
// is done in two parts, and between them the team shares its magnitudes, within a warp. Where
// arrays are not aligned, or a tensor ends within a block, a thread holds two elements and the team
// is the whole warp. A GPU runs each thread by itself; a host plays the threads of a warp together,
// each part for all of them. (A scale that one of a team's threads writes follows from what all of
// them have made of the scale before it: no thread reads it later.) `Lanes` says which:
//
//   kPlayed                 how many threads are played together
//   share<kTeam>(largest)   gives each of them the largest of its team's
constexpr int kRaggedCount = 2;

// Calls use(std::integral_constant<int, k>{}) for each state.
template <int kStates, int k = 0, class Use>
FUSED_ADAMW_HD void for_each_state(Use&& use) {
  if constexpr (k < kStates) {
    use(std::integral_constant<int, k>{});
    for_each_state<kStates, k + 1>(use);
  }
}

// What a thread keeps of its states between the parts: their values, and the bits of the largest
// magnitudes.
template <int kStates, int kCount>
struct Uncoded {
  StateArray<kStates> value[kCount];
  std::uint32_t largest[kStates > 0 ? kStates : 1];
};

// The neighbours that a thread holds: from `i` on, as many as there are of kCount.
template <int kCount>
struct Place {
  std::int64_t i;
  int count;

  FUSED_ADAMW_HD Place(std::int64_t i, std::int64_t end)
      : i(i),
        count(end - i >= kCount ? kCount
              : end > i         ? static_cast<int>(end - i)
                                : 0) {}

  // The way to some of them, all of which there are unless they are fewer than a pack.
  template <int kSome = kCount>
  FUSED_ADAMW_HD auto access() const {
    if constexpr (kCount == kRaggedCount) {
      return Ragged<kSome>{count};
    } else {
      return Wide<kSome>{};
    }
  }
  FUSED_ADAMW_HD std::int64_t block() const {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(i) / kCodeBlock);
  }
  FUSED_ADAMW_HD bool begins_block() const { return i % kCodeBlock == 0; }
};

// Calls use(T{}) with a type as wide as a gradient.
template <class Use>
FUSED_ADAMW_HD void with_width(Dtype grad, Use&& use) {
  grad == Dtype::kFloat32 ? use(float{}) : use(std::uint16_t{});
}

template <class Access, int kBytes>
FUSED_ADAMW_HD void load_grads(Dtype dtype, const void* from, std::int64_t i, const Access& access,
                               Raw<kBytes>& raw) {
  with_width(dtype,
             [&](auto type) { access.load(static_cast<const decltype(type)*>(from) + i, raw); });
}

// What follows the parameter as it is about to be stored. A few elements at a time, and what is in
// memory is read once more: that costs such a step little, and every other step no registers.
template <class Functor, class Storage, bool kWhole, int kCount>
FUSED_ADAMW_HD void follow(const Work<Functor, Storage, kWhole>& work, const Place<kCount>& at,
                           const RawParams<kCount>& stored, float weight, Observation& observed) {
  constexpr int kSome = kCount < 4 ? kCount : 4;
  const auto& arrays = work.arrays;
  const Format format = work.arguments.format;
  const auto access = at.template access<kSome>();
  float after[kCount];
  values_of<Storage>(format, stored, after);
  FUSED_ADAMW_NO_UNROLL
  for (int done = 0; done < kCount; done += kSome) {
    const std::int64_t i = at.i + done;
    if (work.arguments.observed != nullptr) {
      RawParams<kSome> raw, raw_grad;
      load_params<Storage, kSome>(format, arrays.slot[kParam], arrays.beside(), i, access, raw);
      load_grads(format.grad, arrays.slot[kGrad], i, access, raw_grad);
      float before[kSome], grad[kSome];
      values_of<Storage>(format, raw, before);
      Storage::with_type(format.grad, [&](auto type) { widen<decltype(type)>(raw_grad, grad); });
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kSome; ++j) {
        if (j < at.count) observed = observed + observe(grad[j], before[j], after[j]);
      }
    }
    if (work.arguments.has_ema) {
      Raw<kSome * sizeof(float)> raw;
      access.load(arrays.ema() + i, raw);
      float ema[kSome];
      widen<float>(raw, ema);
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kSome; ++j) ema[j] = averaged(ema[j], after[j], weight);
      memcpy(&raw, ema, sizeof ema);
      access.store(arrays.ema() + i, raw);
    }
    FUSED_ADAMW_UNROLL
    for (int j = 0; j + kSome < kCount; ++j) after[j] = after[j + kSome];
  }
}

// The first part: everything but the codes of the new states.
template <class Functor, class Storage, bool kWhole, int kCount>
FUSED_ADAMW_HD void update_pack(const Work<Functor, Storage, kWhole>& work, const Row<Functor>& row,
                                const Draws<Storage::kShare>& draws, const Place<kCount>& at,
                                Uncoded<Functor::kStates, kCount>& states, Observation& observed) {
  constexpr int kStates = Functor::kStates;
  const auto& arguments = work.arguments;
  const auto& arrays = work.arrays;
  const Format format = arguments.format;
  const auto access = at.access();
  RawParams<kCount> raw;
  Raw<kCount * sizeof(float)> raw_grad;
  Raw<kCount> codes[kStates > 0 ? kStates : 1];
  float scale[kStates > 0 ? kStates : 1];
  load_params<Storage, kCount>(format, arrays.slot[kParam], arrays.beside(), at.i, access, raw);
  load_grads(format.grad, arrays.slot[kGrad], at.i, access, raw_grad);
  FUSED_ADAMW_UNROLL
  for (int k = 0; k < kStates; ++k) {
    access.load(static_cast<const std::uint8_t*>(arrays.slot[kFirstState + k]) + at.i, codes[k]);
    scale[k] = arrays.scale[k][at.block()];
  }
  float param[kCount], grad[kCount];
  values_of<Storage>(format, raw, param);
  Storage::with_type(format.grad, [&](auto type) { widen<decltype(type)>(raw_grad, grad); });

  FUSED_ADAMW_UNROLL
  for (int j = 0; j < kCount; ++j) {
    StateArray<kStates>& state = states.value[j];
    for_each_state<kStates>([&](auto index) {
      constexpr int k = decltype(index)::value;
      using Codes = Codes<Functor::kKinds[k]>;
      state[k] =
          Codes::value_of(codes[k].template get<typename Codes::Code>(j), Codes::unit_of(scale[k]));
    });
    Functor::update(row.rule, param[j], grad[j] * row.pass.grad_factor, state);
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kStates; ++k) {
      if (kCount == kRaggedCount && j >= at.count) state[k] = 0.0f;  // that is not there
      states.largest[k] = larger_magnitude(states.largest[k], state[k]);
    }
  }

  encode_params<Storage>(format, param, [&] { return draws.template of<kCount>(at.i); }, raw);
  if (arguments.observed != nullptr || arguments.has_ema) {
    follow(work, at, raw, row.pass.ema_weight, observed);
  }
  store_params<Storage, kCount>(format, raw, arrays.slot[kParam], arrays.beside(), at.i, access);
  if (arguments.zero_grads) {
    with_width(format.grad, [&](auto type) {
      using T = decltype(type);
      access.store(static_cast<T*>(arrays.slot[kGrad]) + at.i, Raw<kCount * sizeof(T)>{});
    });
  }
}

// The second part, after `states` have the team's largest magnitudes.
template <class Functor, class Storage, bool kWhole, int kCount>
FUSED_ADAMW_HD void encode_pack(const Work<Functor, Storage, kWhole>& work, const Place<kCount>& at,
                                const Uncoded<Functor::kStates, kCount>& states) {
  for_each_state<Functor::kStates>([&](auto index) {
    constexpr int k = decltype(index)::value;
    using Codes = Codes<Functor::kKinds[k]>;
    const float scale = Codes::scale_of(states.largest[k]);
    const float factor = Codes::factor_of(scale);
    Raw<kCount> codes;
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; j += 4) {
      float four[4] = {};
      FUSED_ADAMW_UNROLL
      for (int l = 0; l < 4 && j + l < kCount; ++l) four[l] = states.value[j + l][k];
      const std::uint32_t word = codes_of<Functor::kKinds[k]>(four, factor);
      codes.words[j / 4] = factor == 0.0f ? 0 : word;
    }
    if (at.begins_block()) work.arrays.scale[k][at.block()] = scale;
    at.access().store(static_cast<std::uint8_t*>(work.arrays.slot[kFirstState + k]) + at.i, codes);
  });
}

// What threads `thread` and following do of elements [begin, end), which begin a block. All of a
// warp's threads go round together.
template <class Lanes, int kCount, class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_blocks(const Work<Functor, Storage, kWhole>& work,
                                  const Row<Functor>& row, const Draws<Storage::kShare>& draws,
                                  std::int64_t begin, std::int64_t end, int thread,
                                  Observation (&observed)[Lanes::kPlayed]) {
  constexpr int kPlayed = Lanes::kPlayed, kStates = Functor::kStates;
  const int lane = thread % kLanes;
  FUSED_ADAMW_NO_UNROLL
  for (std::int64_t first = begin + (thread - lane) * kCount; first < end;
       first += kThreads * kCount) {
    Uncoded<kStates, kCount> states[kPlayed];
    for (int l = 0; l < kPlayed; ++l) {
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) states[l].largest[k] = 0;
      const Place<kCount> at(first + (lane + l) * kCount, end);
      if (at.count > 0) update_pack(work, row, draws, at, states[l], observed[l]);
    }
    FUSED_ADAMW_UNROLL
    for (int k = 0; k < kStates; ++k) {
      std::uint32_t largest[kPlayed];
      for (int l = 0; l < kPlayed; ++l) largest[l] = states[l].largest[k];
      Lanes::template share<kCodeBlock / kCount>(largest);
      for (int l = 0; l < kPlayed; ++l) states[l].largest[k] = largest[l];
    }
    for (int l = 0; l < kPlayed; ++l) {
      const Place<kCount> at(first + (lane + l) * kCount, end);
      if (at.count > 0) encode_pack(work, at, states[l]);
    }
  }
}

template <class Lanes, class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_coded(const Work<Functor, Storage, kWhole>& work,
                                 const Row<Functor>& row, int thread,
                                 Observation (&observed)[Lanes::kPlayed]) {
  const std::int64_t begin = work.begin, end = work.end;
  const std::int64_t rest =
      work.arrays.aligned() ? begin + (end - begin) / kCodeBlock * kCodeBlock : begin;
  const auto draws = draws_of(work, row.pass.random_step);
  update_blocks<Lanes, Storage::kPerThread>(work, row, draws, begin, rest, thread, observed);
  update_blocks<Lanes, kRaggedCount>(work, row, draws, rest, end, thread, observed);
}

}  // namespace fused_adamw::cuda
