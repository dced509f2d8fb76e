// The update of arrays whose elements stand for themselves: all storages but Coded.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "cuda/packs.h"
#include "cuda/params.h"
#include "cuda/storages.h"
#include "cuda/work.h"

namespace fused_adamw::cuda {

// One array of states, of dtype `dtype`; `slot` is its place among the slots.
template <class Storage, int kCount>
FUSED_ADAMW_HD void store_states(const Format& format, const float (&value)[kCount],
                                 const std::uint32_t (&bits)[kCount], int slot, void* to,
                                 std::int64_t i) {
  if (Storage::kHasBeside && format.stochastic && format.state == Dtype::kBfloat16) {
    Pack<bfloat16, kCount> pack;
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      pack.at[j] = rounded_stochastically(value[j], bits_of_state(bits[j], slot - kFirstState));
    }
    *reinterpret_cast<Pack<bfloat16, kCount>*>(static_cast<bfloat16*>(to) + i) = pack;
    return;
  }
  Storage::with_type(format.state,
                     [&](auto type) { store(static_cast<decltype(type)*>(to) + i, value); });
}

// Elements [begin, end) of one tensor, which are a multiple of kCount, so many at a time by each
// thread.
template <int kCount, class Draws, class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_range(const Work<Functor, Storage, kWhole>& work,
                                 const Row<Functor>& row, const Draws& draws, std::int64_t begin,
                                 std::int64_t end, int thread, Observation& observed) {
  constexpr int kStates = Functor::kStates, kSlots = kFirstState + kStates;
  constexpr bool kHasBeside = Storage::kHasBeside;
  constexpr int kFirstPlain = kHasBeside ? kGrad : kParam;
  constexpr Wide<kCount> access;
  const auto& arguments = work.arguments;
  const auto& arrays = work.arrays;
  const Format format = arguments.format;
  FUSED_ADAMW_NO_UNROLL  // the rest of a tensor is not worth the registers
      for (std::int64_t i = begin + thread * kCount; i < end; i += kThreads * kCount) {
    Raw<kCount * Storage::kWidest> raw[kSlots];
    if constexpr (kHasBeside) {
      load_params<Storage, kCount>(format, arrays.slot[kParam], arrays.beside(), i, access,
                                   raw[kParam]);
    }
    FUSED_ADAMW_UNROLL
    for (int k = kFirstPlain; k < kSlots; ++k) {
      Storage::with_type(format.of_slot(k), [&](auto type) {
        access.load(static_cast<const decltype(type)*>(arrays.slot[k]) + i, raw[k]);
      });
    }
    Raw<kCount * sizeof(float)> raw_ema{};
    if constexpr (kWhole) {
      if (arguments.has_ema) access.load(static_cast<const float*>(arrays.ema()) + i, raw_ema);
    }
    float value[kSlots][kCount];
    if constexpr (kHasBeside) values_of<Storage>(format, raw[kParam], value[kParam]);
    FUSED_ADAMW_UNROLL
    for (int k = kFirstPlain; k < kSlots; ++k) {
      Storage::with_type(format.of_slot(k),
                         [&](auto type) { widen<decltype(type)>(raw[k], value[k]); });
    }

    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      StateArray<kStates> state;
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) state[k] = value[kFirstState + k][j];
      Functor::update(row.rule, value[kParam][j], value[kGrad][j] * row.pass.grad_factor, state);
      FUSED_ADAMW_UNROLL
      for (int k = 0; k < kStates; ++k) value[kFirstState + k][j] = state[k];
    }

    std::uint32_t bits[kCount] = {};
    RawParams<kCount> stored;
    if constexpr (kHasBeside) {
      if (format.stochastic) draws.draw(i, bits);
      encode_params<Storage>(
          format, value[kParam], [&](auto& to) { memcpy(to, bits, sizeof bits); }, stored);
      store_params<Storage, kCount>(format, stored, arrays.slot[kParam], arrays.beside(), i,
                                    access);
    } else {
      Storage::with_type(format.param, [&](auto type) {
        store(static_cast<decltype(type)*>(arrays.slot[kParam]) + i, value[kParam]);
      });
    }
    FUSED_ADAMW_UNROLL
    for (int k = kFirstState; k < kSlots; ++k) {
      store_states<Storage>(format, value[k], bits, k, arrays.slot[k], i);
    }

    if constexpr (kWhole) {
      if (arguments.has_ema || arguments.observed != nullptr) {  // they follow what was stored
        if constexpr (kHasBeside) {
          values_of<Storage>(format, stored, value[kParam]);
        } else {
          Storage::with_type(format.param, [&](auto type) {
            using T = decltype(type);
            FUSED_ADAMW_UNROLL
            for (int j = 0; j < kCount; ++j)
              value[kParam][j] = to_float(from_float<T>(value[kParam][j]));
          });
        }
      }
      if (arguments.observed != nullptr) {
        float before[kCount];
        if constexpr (kHasBeside) {
          values_of<Storage>(format, raw[kParam], before);
        } else {
          Storage::with_type(format.param,
                             [&](auto type) { widen<decltype(type)>(raw[kParam], before); });
        }
        FUSED_ADAMW_UNROLL
        for (int j = 0; j < kCount; ++j) {
          observed = observed + observe(value[kGrad][j], before[j], value[kParam][j]);
        }
      }
      if (arguments.has_ema) {
        float ema[kCount];
        widen<float>(raw_ema, ema);
        FUSED_ADAMW_UNROLL
        for (int j = 0; j < kCount; ++j) {
          ema[j] = averaged(ema[j], value[kParam][j], row.pass.ema_weight);
        }
        store(arrays.ema() + i, ema);
      }
      if (arguments.zero_grads) {
        const float zero[kCount] = {};
        Storage::with_type(format.grad, [&](auto type) {
          store(static_cast<decltype(type)*>(arrays.slot[kGrad]) + i, zero);
        });
      }
    }
  }
}

// All that one thread does: whole packs, and what is left of the tensor, or all of one that is not
// aligned.
template <class Functor, class Storage, bool kWhole>
FUSED_ADAMW_HD void update_packs(const Work<Functor, Storage, kWhole>& work,
                                 const Row<Functor>& row, int thread, Observation& observed) {
  constexpr int kPack = Storage::kPerThread;
  const std::int64_t begin = work.begin, end = work.end;
  const std::int64_t rest = work.arrays.aligned() ? begin + (end - begin) / kPack * kPack : begin;
  const auto draws = draws_of(work, row.pass.random_step);
  update_range<kPack>(work, row, draws, begin, rest, thread, observed);
  update_range<1>(work, row, draws, rest, end, thread, observed);
}

}  // namespace fused_adamw::cuda
