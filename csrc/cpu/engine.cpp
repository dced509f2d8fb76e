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

using UpdateSpan = void (*)(const TensorEntry&, const float* coefficients, std::int64_t begin,
                            std::int64_t end);

// Elements [begin, end) of one tensor, one at a time.
template <class Rule, class Format>
FUSED_ADAMW_HD void update_elements(const TensorEntry& tensor, const typename Rule::Coefficients& c,
                                    std::int64_t begin, std::int64_t end) {
  using Param = typename Format::Param;
  using State = typename Format::State;
  auto* param = static_cast<Param*>(tensor.slot[kParam]);
  const auto* grad = static_cast<const typename Format::Grad*>(tensor.slot[kGrad]);
  State* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) {
    state[k] = static_cast<State*>(tensor.slot[kFirstState + k]);
  }

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = begin; i < end; ++i) {
    float p = to_float(param[i]);
    float s[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = to_float(state[k][i]);

    Rule::update(c, p, to_float(grad[i]), s);

    param[i] = from_float<Param>(p);
    for (int k = 0; k < Rule::kStates; ++k) state[k][i] = from_float<State>(s[k]);
  }
}

// [note: pairs] Where every array has 16 bits, a vector of words holds two elements a lane.
// Widening and narrowing then stay within the lanes, which is half as fast again as moving 16-bit
// values between vectors of different widths (measured on AVX2: 1.28 against 0.86 elements a
// nanosecond).
using Word = std::uint32_t __attribute__((may_alias, aligned(2)));

template <class Format>
constexpr bool kAll16Bit =
    sizeof(typename Format::Param) == 2 && sizeof(typename Format::Grad) == 2 &&
    sizeof(typename Format::State) == 2;

// Elements [begin, begin + 2 * pairs).
template <class Rule, class Format>
FUSED_ADAMW_HD void update_pairs(const TensorEntry& tensor, const typename Rule::Coefficients& c,
                                 std::int64_t begin, std::int64_t pairs) {
  using Param = typename Format::Param;
  using Grad = typename Format::Grad;
  using State = typename Format::State;
  const auto words = [&](int slot) {
    return reinterpret_cast<Word*>(static_cast<std::uint16_t*>(tensor.slot[slot]) + begin);
  };
  Word* param = words(kParam);
  const Word* grad = words(kGrad);
  Word* state[Rule::kStates];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = words(kFirstState + k);

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < pairs; ++i) {
    const std::uint32_t p = param[i], g = grad[i];
    float p0 = first_of<Param>(p), p1 = second_of<Param>(p);
    float s0[Rule::kStates], s1[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) {
      const std::uint32_t s = state[k][i];
      s0[k] = first_of<State>(s);
      s1[k] = second_of<State>(s);
    }

    Rule::update(c, p0, first_of<Grad>(g), s0);
    Rule::update(c, p1, second_of<Grad>(g), s1);

    param[i] = pair_of<Param>(p0, p1);
    for (int k = 0; k < Rule::kStates; ++k) state[k][i] = pair_of<State>(s0[k], s1[k]);
  }
}

template <class Rule, class Format>
FUSED_ADAMW_HD void update_span(const TensorEntry& tensor, const float* coefficients,
                                std::int64_t begin, std::int64_t end) {
  const auto c = *reinterpret_cast<const typename Rule::Coefficients*>(coefficients);
  if constexpr (kAll16Bit<Format>) {
    const std::int64_t pairs = (end - begin) / 2;
    update_pairs<Rule, Format>(tensor, c, begin, pairs);
    update_elements<Rule, Format>(tensor, c, begin + 2 * pairs, end);
  } else {
    update_elements<Rule, Format>(tensor, c, begin, end);
  }
}

template <class Rule, class Format>
void update_baseline(const TensorEntry& tensor, const float* c, std::int64_t begin,
                     std::int64_t end) {
  update_span<Rule, Format>(tensor, c, begin, end);
}

#if defined(__x86_64__)
template <class Rule, class Format>
FUSED_ADAMW_AVX2 void update_avx2(const TensorEntry& tensor, const float* c, std::int64_t begin,
                                  std::int64_t end) {
  update_span<Rule, Format>(tensor, c, begin, end);
}

template <class Rule, class Format>
FUSED_ADAMW_AVX512 void update_avx512(const TensorEntry& tensor, const float* c, std::int64_t begin,
                                      std::int64_t end) {
  update_span<Rule, Format>(tensor, c, begin, end);
}
#endif

template <class Rule, class Format>
UpdateSpan at_level(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return update_avx512<Rule, Format>;
  if (level == SimdLevel::kAvx2) return update_avx2<Rule, Format>;
#endif
  (void)level;
  return update_baseline<Rule, Format>;
}

UpdateSpan find_update(const Bucket& bucket, SimdLevel level) {
  UpdateSpan found = nullptr;
  visit_rule(bucket.rule, [&](auto rule) {
    visit_format(Formats{}, bucket.format,
                 [&](auto format) { found = at_level<decltype(rule), decltype(format)>(level); });
  });
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
  const UpdateSpan update_span = find_update(bucket, level);
  const auto row = [&](const TensorEntry& tensor) {
    return bucket.coefficients.data() + tensor.row * bucket.coefficients_per_row;
  };

  if (threads <= 1 || bucket.numel < kSerial) {
    const DefaultFloatEnvironment environment;
    for (const TensorEntry& tensor : bucket.tensors) {
      update_span(tensor, row(tensor), 0, tensor.numel);
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
        update_span(tensor, row(tensor), span.begin, span.end);
      });
    }
  }
}

}  // namespace fused_adamw::cpu
