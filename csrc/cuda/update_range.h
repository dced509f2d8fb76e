// The update of arrays whose elements stand for themselves: all storages but Coded.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "cuda/packs.h"
#include "cuda/params.h"
#include "cuda/storages.h"
#include "cuda/work.h"

namespace fused_adamw::cuda {

// The slots from `first` on but the gradient, rounded to nearest.
template <class Storage, int kCount, int kSlots, int kPointers>
FUSED_ADAMW_HD void store_slots(const Format& format, const float (&value)[kSlots][kCount],
                                int first, void* const (&to)[kPointers], std::int64_t i) {
  FUSED_ADAMW_UNROLL
  for (int k = first; k < kSlots; ++k) {
    if (k == kGrad) continue;
    Storage::with_type(format.of_slot(k), [&](auto type) {
      store(static_cast<decltype(type)*>(to[k]) + i, value[k]);
    });
  }
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

    RawParams<kCount> stored;
    if constexpr (kHasBeside) {
      RandomWords<kCount, Storage::kShare> random{};
      if (format.stochastic) random = draws.template of<kCount>(i);
      encode_params<Storage>(format, value[kParam], [&] { return random; }, stored);
      store_params<Storage, kCount>(format, stored, arrays.slot[kParam], arrays.beside(), i,
                                    access);
      if (format.stochastic && format.state == Dtype::kBfloat16) {
        FUSED_ADAMW_UNROLL
        for (int k = 0; k < kStates; ++k) {
          Raw<kCount * 2> rounded;
          round_stochastically(value[kFirstState + k], random.of_state(k), rounded.words);
          access.store(static_cast<bfloat16*>(arrays.slot[kFirstState + k]) + i, rounded);
        }
      } else {
        store_slots<Storage>(format, value, kFirstState, arrays.slot, i);
      }
    } else {
      store_slots<Storage>(format, value, kParam, arrays.slot, i);
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
  bool by_packs = work.arrays.aligned();
  if constexpr (Storage::kHasBeside)
    by_packs &= work.arguments.extent[work.tensor].keeps_together(kPack);
  const std::int64_t rest = by_packs ? begin + (end - begin) / kPack * kPack : begin;
  const auto draws = draws_of(work, row.pass.random_step);
  update_range<kPack>(work, row, draws, begin, rest, thread, observed);
  update_range<1>(work, row, draws, rest, end, thread, observed);
}

}  // namespace fused_adamw::cuda
