#include "cpu/engine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/float_environment.h"
#include "core/pass.h"
#include "core/planner.h"
#include "core/square_sum.h"
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
#define FUSED_ADAMW_UNROLL_LANES _Pragma("unroll")
#else
#define FUSED_ADAMW_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#define FUSED_ADAMW_UNROLL_LANES _Pragma("GCC unroll 32")
#endif

namespace fused_adamw::cpu {
namespace {

// [note: blocks] What a step does beside its rule follows the update block by block, while the
// block's arrays are in the L1 cache: memory sees one pass, and the rule needs no other body.
constexpr std::int64_t kPassBlock = 1024;

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

// What knows no rule, at one level. `count` numbers of a dtype of 16 bits become floats, or back;
// the rest takes any dtype.
struct Tools {
  void (*widen)(const void* from, Dtype dtype, float* to, std::int64_t count);
  void (*narrow)(const float* from, Dtype dtype, void* to, std::int64_t count);
  void (*average)(const void* param, Dtype dtype, float* ema, float weight, std::int64_t count);
  double (*square_sum)(const void* grad, Dtype dtype, std::int64_t count);
  Observation (*observe)(const float* grad, const float* before, const float* after,
                         std::int64_t count);
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

// `ema` follows `param`.
template <class T>
FUSED_ADAMW_HD void average(const void* param, float* ema, float weight, std::int64_t count) {
  const T* values = static_cast<const T*>(param);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) ema[i] = averaged(ema[i], to_float(values[i]), weight);
}

FUSED_ADAMW_HD void average_any(const void* param, Dtype dtype, float* ema, float weight,
                                std::int64_t count) {
  if (dtype == Dtype::kFloat32) return average<float>(param, ema, weight, count);
  dtype == Dtype::kBfloat16 ? average<bfloat16>(param, ema, weight, count)
                            : average<float16>(param, ema, weight, count);
}

// Of at most a segment: see [note: square sums]. Unrolled, so that the lanes are registers.
FUSED_ADAMW_HD double segment_square_sum(const float* values, std::int64_t count) {
  constexpr std::int64_t kAhead = 2048;  // elements: what the loop waits for is then under way
  double lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    __builtin_prefetch(values + i + kAhead);
    __builtin_prefetch(values + i + kAhead + kLanes / 2);
    FUSED_ADAMW_UNROLL_LANES
    for (int l = 0; l < kLanes; ++l) lane[l] += square(values[i + l]);
  }
  for (int l = 0; i + l < count; ++l) lane[l] += square(values[i + l]);
  fold_by_halves(lane, kLanes);
  return lane[0];
}

// Of one chunk, or what there is of it.
FUSED_ADAMW_HD double square_sum_any(const void* grad, Dtype dtype, std::int64_t count) {
  const float* floats = static_cast<const float*>(grad);
  const std::uint16_t* halves = static_cast<const std::uint16_t*>(grad);
  alignas(64) float buffer[kSegment];
  double sum = 0.0;
  for (std::int64_t begin = 0; begin < count; begin += kSegment) {
    const std::int64_t length = std::min(kSegment, count - begin);
    if (dtype != Dtype::kFloat32) widen_any(halves + begin, dtype, buffer, length);
    sum += segment_square_sum(dtype == Dtype::kFloat32 ? floats + begin : buffer, length);
  }
  return sum;
}

// Of at most kPassBlock elements.
FUSED_ADAMW_HD Observation observe_floats(const float* grad, const float* before,
                                          const float* after, std::int64_t count) {
  alignas(64) float change[kPassBlock];
  int nonfinite = 0, lost = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    change[i] = after[i] - before[i];
    nonfinite += is_nonfinite(grad[i]);
    lost += is_lost(grad[i], before[i], after[i]);
  }
  return {segment_square_sum(grad, count), segment_square_sum(change, count),
          segment_square_sum(after, count), static_cast<double>(nonfinite),
          static_cast<double>(lost)};
}

// `count` elements whose arrays are float32.
template <class Functor>
FUSED_ADAMW_HD void update_floats(const Row<Functor>& row, float* const* slot, std::int64_t count) {
  const auto c = row.rule;
  const float factor = row.pass.grad_factor;
  float* param = slot[kParam];
  const float* grad = slot[kGrad];
  float* state[Functor::kStates + 1];
  for (int k = 0; k < Functor::kStates; ++k) state[k] = slot[kFirstState + k];

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) {
    float p = param[i];
    StateArray<Functor::kStates> s;
    for (int k = 0; k < Functor::kStates; ++k) s[k] = state[k][i];

    Functor::update(c, p, grad[i] * factor, s);

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
FUSED_ADAMW_HD void update_pairs(const Row<Functor>& row, Word* const* slot, std::int64_t pairs) {
  const auto c = row.rule;
  const float factor = row.pass.grad_factor;
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

    Functor::update(c, p0, first_of<bfloat16>(g) * factor, s0);
    Functor::update(c, p1, second_of<bfloat16>(g) * factor, s1);

    param[i] = pair_of_bfloat16s(p0, p1);
    for (int k = 0; k < Functor::kStates; ++k) state[k][i] = pair_of_bfloat16s(s0[k], s1[k]);
  }
}

// [note: staging] Arrays of other dtypes pass through buffers of floats in the L1 cache, a block at
// a time, so that a rule is compiled twice, and not once for every combination of dtypes.
constexpr std::int64_t kBlock = 512;

template <class Functor>
FUSED_ADAMW_HD void update_staged(const Row<Functor>& row, const Work& work, const Tools& tools) {
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
      if (slot[k] == buffer[k]) tools.widen(memory(k), dtype, buffer[k], count);
    }
    update_floats<Functor>(row, slot, count);
    for (int k = 0; k < kSlots; ++k) {
      if (k == kGrad || slot[k] != buffer[k]) continue;
      tools.narrow(buffer[k], work.format.of_slot(k), memory(k), count);
    }
  }
}

template <class Functor>
FUSED_ADAMW_HD void update_span(const Work& work, const Tools& tools) {
  constexpr int kSlots = kFirstState + Functor::kStates;
  const auto row = *reinterpret_cast<const Row<Functor>*>(work.coefficients);
  if (work.format.all(Dtype::kFloat32)) {
    float* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) slot[k] = work.slot<float>(k);
    update_floats<Functor>(row, slot, work.end - work.begin);
  } else if (work.format.all(Dtype::kBfloat16)) {
    Word* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) {
      slot[k] = reinterpret_cast<Word*>(work.slot<std::uint16_t>(k));
    }
    const std::int64_t pairs = (work.end - work.begin) / 2;
    update_pairs<Functor>(row, slot, pairs);
    const Work last{work.tensor, work.format, work.coefficients, work.begin + 2 * pairs, work.end};
    update_staged<Functor>(row, last, tools);
  } else {
    update_staged<Functor>(row, work, tools);
  }
}

using UpdateSpan = void (*)(const Work&, const Tools&);

#define FUSED_ADAMW_LEVEL(name, target)                                                         \
  template <class Functor>                                                                      \
  target void update_##name(const Work& work, const Tools& tools) {                             \
    update_span<Functor>(work, tools);                                                          \
  }                                                                                             \
  target void widen_##name(const void* from, Dtype dtype, float* to, std::int64_t count) {      \
    widen_any(from, dtype, to, count);                                                          \
  }                                                                                             \
  target void narrow_##name(const float* from, Dtype dtype, void* to, std::int64_t count) {     \
    narrow_any(from, dtype, to, count);                                                         \
  }                                                                                             \
  target void average_##name(const void* param, Dtype dtype, float* ema, float weight,          \
                             std::int64_t count) {                                              \
    average_any(param, dtype, ema, weight, count);                                              \
  }                                                                                             \
  target double square_sum_##name(const void* grad, Dtype dtype, std::int64_t count) {          \
    return square_sum_any(grad, dtype, count);                                                  \
  }                                                                                             \
  target Observation observe_##name(const float* grad, const float* before, const float* after, \
                                    std::int64_t count) {                                       \
    return observe_floats(grad, before, after, count);                                          \
  }                                                                                             \
  constexpr Tools kTools_##name{widen_##name, narrow_##name, average_##name, square_sum_##name, \
                                observe_##name};

FUSED_ADAMW_LEVEL(baseline, )
#if defined(__x86_64__)
FUSED_ADAMW_LEVEL(avx2, FUSED_ADAMW_AVX2)
FUSED_ADAMW_LEVEL(avx512, FUSED_ADAMW_AVX512)
#endif

const Tools& tools_at(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return kTools_avx512;
  if (level == SimdLevel::kAvx2) return kTools_avx2;
#endif
  (void)level;
  return kTools_baseline;
}

template <class Functor>
UpdateSpan update_at(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return update_avx512<Functor>;
  if (level == SimdLevel::kAvx2) return update_avx2<Functor>;
#endif
  (void)level;
  return update_baseline<Functor>;
}

// The code for one bucket at one level.
struct Code {
  UpdateSpan update;
  const Tools& tools;
};

Code find_code(int functor, SimdLevel level) {
  UpdateSpan update = nullptr;
  visit_functor(functor, [&](auto functor) { update = update_at<decltype(functor)>(level); });
  return {update, tools_at(level)};
}

// Elements as floats: where they are, or in `buffer`.
const float* as_floats(const Tools& tools, const Work& work, int slot, float* buffer) {
  const Dtype dtype = work.format.of_slot(slot);
  if (dtype == Dtype::kFloat32) return work.slot<float>(slot);
  tools.widen(work.slot<std::uint16_t>(slot), dtype, buffer, work.end - work.begin);
  return buffer;
}

// Elements [begin, end) of one tensor.
Observation update_in_blocks(const Bucket& bucket, const Code& code, const Work& work) {
  const Tools& tools = code.tools;
  const float weight = reinterpret_cast<const PassCoefficients*>(
                           work.coefficients + bucket.coefficients_per_row - kPassCoefficients)
                           ->ema_weight;
  const int param_size = element_size(bucket.format.param);
  const int grad_size = element_size(bucket.format.grad);
  alignas(64) float before[kPassBlock], after[kPassBlock], grad[kPassBlock];
  Observation sum{};
  for (std::int64_t begin = work.begin; begin < work.end; begin += kPassBlock) {
    const std::int64_t end = std::min(work.end, begin + kPassBlock), count = end - begin;
    const Work block{work.tensor, work.format, work.coefficients, begin, end};
    char* param = static_cast<char*>(work.tensor.slot[kParam]) + begin * param_size;
    float* ema = bucket.has_ema ? work.tensor.ema + begin : nullptr;
    if (ema != nullptr) {
      for (std::int64_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(ema + i, 1);
    }
    if (bucket.observed != nullptr) {
      const float* values = as_floats(tools, block, kParam, before);
      if (values != before) std::copy_n(values, count, before);
    }

    code.update(block, tools);

    if (ema != nullptr) tools.average(param, bucket.format.param, ema, weight, count);
    if (bucket.observed != nullptr) {
      sum = sum + tools.observe(as_floats(tools, block, kGrad, grad), before,
                                as_floats(tools, block, kParam, after), count);
    }
    if (bucket.zero_grads) {
      std::memset(static_cast<char*>(work.tensor.slot[kGrad]) + begin * grad_size, 0,
                  static_cast<std::size_t>(count * grad_size));
    }
  }
  return sum;
}

// Ranges are handed out one by one, so that a thread the system holds up does not hold up the
// others. They are large enough for the hardware's prefetchers to run and small enough that each
// thread gets several.
constexpr std::int64_t kMostPerRange = 65536;
constexpr std::int64_t kLeastPerRange = 8192;
// Below this a second thread costs more than it saves (measured: waking it takes 2-5 us).
constexpr std::int64_t kSerial = 16384;

std::int64_t range_size(std::int64_t numel, int threads, std::int64_t most = kMostPerRange) {
  return std::clamp(numel / (4 * threads), kLeastPerRange, most);
}
// One array that is only read is read faster in longer stretches.
constexpr std::int64_t kMostPerReadRange = 1 << 20;

std::vector<std::int64_t> numels_of(const Bucket& bucket) {
  std::vector<std::int64_t> numels(bucket.tensors.size());
  std::transform(bucket.tensors.begin(), bucket.tensors.end(), numels.begin(),
                 [](const TensorEntry& tensor) { return tensor.numel; });
  return numels;
}

// Calls visit(i) for 0 <= i < count, each once.
template <class Visit>
void in_parallel(int threads, std::int64_t count, Visit&& visit) {
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(threads)
  {
    const DefaultFloatEnvironment environment;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) visit(i);
  }
}

// Calls visit(tensor, span, index of the chunk in the list) for every chunk.
template <class Visit>
void for_each_chunk(const Bucket& bucket, int threads, std::int64_t most_per_range, Visit&& visit) {
  const auto visit_chunks = [&](const Span& span) {
    const TensorEntry& tensor = bucket.tensors[static_cast<std::size_t>(span.tensor)];
    for (std::int64_t begin = span.begin; begin < span.end; begin += kChunk) {
      const std::int64_t end = std::min(begin + kChunk, span.end);
      visit(tensor, Span{span.tensor, begin, end}, tensor.chunk + begin / kChunk);
    }
  };
  if (threads <= 1 || bucket.numel < kSerial) {
    const DefaultFloatEnvironment environment;
    for (std::size_t i = 0; i < bucket.tensors.size(); ++i) {
      visit_chunks({static_cast<std::int64_t>(i), 0, bucket.tensors[i].numel});
    }
    return;
  }
  const FlatRanges ranges(numels_of(bucket), range_size(bucket.numel, threads, most_per_range),
                          kChunk);
  in_parallel(threads, ranges.count(), [&](std::int64_t i) { ranges.for_each(i, visit_chunks); });
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
  const auto work = [&](const TensorEntry& tensor, std::int64_t begin, std::int64_t end) {
    const float* row = bucket.coefficients.data() + tensor.row * bucket.coefficients_per_row;
    return Work{tensor, bucket.format, row, begin, end};
  };
  if (bucket.observed != nullptr) {
    auto* observed = reinterpret_cast<Observation*>(bucket.observed);
    return for_each_chunk(bucket, threads, kMostPerRange,
                          [&](const TensorEntry& tensor, const Span& span, std::int64_t chunk) {
                            observed[chunk] =
                                update_in_blocks(bucket, code, work(tensor, span.begin, span.end));
                          });
  }
  const auto update_span = [&](const TensorEntry& tensor, std::int64_t begin, std::int64_t end) {
    if (bucket.is_plain()) return code.update(work(tensor, begin, end), code.tools);
    update_in_blocks(bucket, code, work(tensor, begin, end));
  };

  if (threads <= 1 || bucket.numel < kSerial) {
    const DefaultFloatEnvironment environment;
    for (const TensorEntry& tensor : bucket.tensors) {
      update_span(tensor, 0, tensor.numel);
    }
    return;
  }
  const FlatRanges ranges(numels_of(bucket), range_size(bucket.numel, threads));
  in_parallel(threads, ranges.count(), [&](std::int64_t i) {
    ranges.for_each(i, [&](const Span& span) {
      update_span(bucket.tensors[static_cast<std::size_t>(span.tensor)], span.begin, span.end);
    });
  });
}

void square_sums(const Bucket& bucket, double* partials, int threads, SimdLevel level) {
  const Tools& tools = tools_at(level);
  const Dtype dtype = bucket.format.grad;
  for_each_chunk(bucket, threads, kMostPerReadRange,
                 [&](const TensorEntry& tensor, const Span& span, std::int64_t chunk) {
                   const char* grad = static_cast<const char*>(tensor.slot[kGrad]);
                   partials[chunk] = tools.square_sum(grad + span.begin * element_size(dtype),
                                                      dtype, span.end - span.begin);
                 });
}

}  // namespace fused_adamw::cpu
