#include "cpu/engine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/float_environment.h"
#include "core/planner.h"
#include "rules/registry.h"

// [note: SIMD levels] The body below is plain scalar C++ that the compiler vectorises. It is
// inlined into one wrapper for each instruction set, which is chosen when it runs. Every level
// performs the same IEEE operations on each element, so they differ in speed only.
#if defined(__x86_64__) && defined(__clang__)
#define FUSED_ADAMW_AVX2 __attribute__((target("avx2")))
#define FUSED_ADAMW_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512)))
#elif defined(__x86_64__)
#define FUSED_ADAMW_AVX2 __attribute__((target("avx2")))
#define FUSED_ADAMW_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

// Slots never overlap (checked before a step), so iterations do not depend on each other. Not `omp
// simd`: it turns the local arrays into vectors of arrays, and gcc then gives up.
#if defined(__clang__)
#define FUSED_ADAMW_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ADAMW_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace fused_adamw::cpu {
namespace {

// Elements [begin, end) of one tensor.
struct Work {
  const TensorEntry& tensor;
  const Format& format;
  const float* coefficients;
  std::int64_t begin, end;

  template <class T>
  FUSED_ADAMW_HD T* slot(int k) const {
    return static_cast<T*>(tensor.slot[k]) + begin;
  }
};

// Changes `count` numbers of a dtype of 16 bits to float, or back.
struct Conversions {
  void (*widen)(const void* from, Dtype dtype, float* to, std::int64_t count);
  void (*narrow)(const float* from, Dtype dtype, void* to, std::int64_t count);
};

template <class T>
FUSED_ADAMW_HD void widen(const void* from, float* to, std::int64_t count) {
  const T* values = static_cast<const T*>(from);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) to[i] = to_float(values[i]);
}

template <class T>
FUSED_ADAMW_HD void narrow(const float* from, void* to, std::int64_t count) {
  T* values = static_cast<T*>(to);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) values[i] = from_float<T>(from[i]);
}

FUSED_ADAMW_HD void widen_any(const void* from, Dtype dtype, float* to, std::int64_t count) {
  dtype == Dtype::kBfloat16 ? widen<bfloat16>(from, to, count) : widen<float16>(from, to, count);
}

FUSED_ADAMW_HD void narrow_any(const float* from, Dtype dtype, void* to, std::int64_t count) {
  dtype == Dtype::kBfloat16 ? narrow<bfloat16>(from, to, count) : narrow<float16>(from, to, count);
}

// `count` elements whose arrays are float32.
template <class Functor>
FUSED_ADAMW_HD void update_floats(const typename Functor::Coefficients& c, float* const* slot,
                                  std::int64_t count) {
  float* param = slot[kParam];
  const float* grad = slot[kGrad];
  float* state[Functor::kStates + 1];
  for (int k = 0; k < Functor::kStates; ++k) state[k] = slot[kFirstState + k];

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) {
    float p = param[i];
    StateArray<Functor::kStates> s;
    for (int k = 0; k < Functor::kStates; ++k) s[k] = state[k][i];

    Functor::update(c, p, grad[i], s);

    param[i] = p;
    for (int k = 0; k < Functor::kStates; ++k) state[k][i] = s[k];
  }
}

// [note: pairs] Where every array is bfloat16, a vector of words holds two elements a lane.
// Widening and narrowing then stay within the lanes, which is half as fast again as moving 16-bit
// values between vectors of different widths (measured on AVX2: 1.28 against 0.86 elements a
// nanosecond).
using Word = std::uint32_t __attribute__((may_alias, aligned(2)));

// For what comes of bfloat16 numbers alone. Their NaNs have a lower half of zeros, as has the NaN
// that an operation makes, and operations pass a NaN's payload on: so a NaN stays one, and the test
// for it, a fifth of the time of an update, is spared.
FUSED_ADAMW_HD std::uint32_t pair_of_bfloat16s(float first, float second) {
  return rounded_to_bfloat16(first) >> 16 | (rounded_to_bfloat16(second) & 0xffff0000u);
}

template <class Functor>
FUSED_ADAMW_HD void update_pairs(const typename Functor::Coefficients& c, Word* const* slot,
                                 std::int64_t pairs) {
  Word* param = slot[kParam];
  const Word* grad = slot[kGrad];
  Word* state[Functor::kStates + 1];
  for (int k = 0; k < Functor::kStates; ++k) state[k] = slot[kFirstState + k];

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < pairs; ++i) {
    const std::uint32_t p = param[i], g = grad[i];
    float p0 = first_of<bfloat16>(p), p1 = second_of<bfloat16>(p);
    StateArray<Functor::kStates> s0, s1;
    for (int k = 0; k < Functor::kStates; ++k) {
      const std::uint32_t s = state[k][i];
      s0[k] = first_of<bfloat16>(s);
      s1[k] = second_of<bfloat16>(s);
    }

    Functor::update(c, p0, first_of<bfloat16>(g), s0);
    Functor::update(c, p1, second_of<bfloat16>(g), s1);

    param[i] = pair_of_bfloat16s(p0, p1);
    for (int k = 0; k < Functor::kStates; ++k) state[k][i] = pair_of_bfloat16s(s0[k], s1[k]);
  }
}

// [note: staging] Arrays of other dtypes pass through buffers of floats in the L1 cache, a block at
// a time, so that a rule is compiled twice, and not once for every combination of dtypes.
constexpr std::int64_t kBlock = 512;

template <class Functor>
FUSED_ADAMW_HD void update_staged(const typename Functor::Coefficients& c, const Work& work,
                                  const Conversions& conversions) {
  constexpr int kSlots = kFirstState + Functor::kStates;
  alignas(64) float buffer[kSlots][kBlock];
  float* slot[kSlots];
  for (std::int64_t begin = work.begin; begin < work.end; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, work.end - begin);
    const auto memory = [&](int k) {
      const int size = element_size(work.format.of_slot(k));
      return static_cast<char*>(work.tensor.slot[k]) + begin * size;
    };
    for (int k = 0; k < kSlots; ++k) {
      const Dtype dtype = work.format.of_slot(k);
      slot[k] = dtype == Dtype::kFloat32 ? reinterpret_cast<float*>(memory(k)) : buffer[k];
      if (slot[k] == buffer[k]) conversions.widen(memory(k), dtype, buffer[k], count);
    }
    update_floats<Functor>(c, slot, count);
    for (int k = 0; k < kSlots; ++k) {
      if (k == kGrad || slot[k] != buffer[k]) continue;
      conversions.narrow(buffer[k], work.format.of_slot(k), memory(k), count);
    }
  }
}

template <class Functor>
FUSED_ADAMW_HD void update_span(const Work& work, const Conversions& conversions) {
  constexpr int kSlots = kFirstState + Functor::kStates;
  const auto c = *reinterpret_cast<const typename Functor::Coefficients*>(work.coefficients);
  if (work.format.all(Dtype::kFloat32)) {
    float* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) slot[k] = work.slot<float>(k);
    update_floats<Functor>(c, slot, work.end - work.begin);
  } else if (work.format.all(Dtype::kBfloat16)) {
    Word* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) {
      slot[k] = reinterpret_cast<Word*>(work.slot<std::uint16_t>(k));
    }
    const std::int64_t pairs = (work.end - work.begin) / 2;
    update_pairs<Functor>(c, slot, pairs);
    const Work last{work.tensor, work.format, work.coefficients, work.begin + 2 * pairs, work.end};
    update_staged<Functor>(c, last, conversions);
  } else {
    update_staged<Functor>(c, work, conversions);
  }
}

using UpdateSpan = void (*)(const Work&, const Conversions&);

#define FUSED_ADAMW_LEVEL(name, target)                                                     \
  template <class Functor>                                                                  \
  target void update_##name(const Work& work, const Conversions& conversions) {             \
    update_span<Functor>(work, conversions);                                                \
  }                                                                                         \
  target void widen_##name(const void* from, Dtype dtype, float* to, std::int64_t count) {  \
    widen_any(from, dtype, to, count);                                                      \
  }                                                                                         \
  target void narrow_##name(const float* from, Dtype dtype, void* to, std::int64_t count) { \
    narrow_any(from, dtype, to, count);                                                     \
  }

FUSED_ADAMW_LEVEL(baseline, )
#if defined(__x86_64__)
FUSED_ADAMW_LEVEL(avx2, FUSED_ADAMW_AVX2)
FUSED_ADAMW_LEVEL(avx512, FUSED_ADAMW_AVX512)
#endif

// The code of one functor at one level.
struct Code {
  UpdateSpan update;
  Conversions conversions;
};

template <class Functor>
Code at_level(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) {
    return {update_avx512<Functor>, {widen_avx512, narrow_avx512}};
  }
  if (level == SimdLevel::kAvx2) return {update_avx2<Functor>, {widen_avx2, narrow_avx2}};
#endif
  (void)level;
  return {update_baseline<Functor>, {widen_baseline, narrow_baseline}};
}

Code find_code(int functor, SimdLevel level) {
  Code found{};
  visit_functor(functor, [&](auto functor) { found = at_level<decltype(functor)>(level); });
  return found;
}

// Ranges are handed out one by one, so that a thread the system holds up does not hold up the
// others. They are large enough for the hardware's prefetchers to run and small enough that each
// thread gets several.
constexpr std::int64_t kMostPerRange = 65536;
constexpr std::int64_t kLeastPerRange = 8192;
// Below this a second thread costs more than it saves (measured: waking it takes 2-5 us).
constexpr std::int64_t kSerial = 16384;

std::int64_t range_size(std::int64_t numel, int threads) {
  return std::clamp(numel / (4 * threads), kLeastPerRange, kMostPerRange);
}

}  // namespace

SimdLevel best_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return SimdLevel::kAvx512;
  }
  if (__builtin_cpu_supports("avx2")) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

void update(const Bucket& bucket, int threads, SimdLevel level) {
  const Code code = find_code(bucket.functor, level);
  const auto update_span = [&](const TensorEntry& tensor, std::int64_t begin, std::int64_t end) {
    const float* row = bucket.coefficients.data() + tensor.row * bucket.coefficients_per_row;
    code.update({tensor, bucket.format, row, begin, end}, code.conversions);
  };

  if (threads <= 1 || bucket.numel < kSerial) {
    const DefaultFloatEnvironment environment;
    for (const TensorEntry& tensor : bucket.tensors) {
      update_span(tensor, 0, tensor.numel);
    }
    return;
  }

  std::vector<std::int64_t> numels(bucket.tensors.size());
  std::transform(bucket.tensors.begin(), bucket.tensors.end(), numels.begin(),
                 [](const TensorEntry& tensor) { return tensor.numel; });
  const FlatRanges ranges(std::move(numels), range_size(bucket.numel, threads));
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const DefaultFloatEnvironment environment;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < ranges.count();) {
      ranges.for_each(i, [&](const Span& span) {
        const TensorEntry& tensor = bucket.tensors[static_cast<std::size_t>(span.tensor)];
        update_span(tensor, span.begin, span.end);
      });
    }
  }
}

}  // namespace fused_adamw::cpu
