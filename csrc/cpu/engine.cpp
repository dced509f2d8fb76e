#include "cpu/engine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/planner.h"
#include "cpu/float_environment.h"
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

template <class Rule, class Format>
FUSED_ADAMW_HD void update_span(const TensorEntry& tensor, const float* coefficients,
                                std::int64_t begin, std::int64_t end) {
  using Param = typename Format::Param;
  using Grad = typename Format::Grad;
  using State = typename Format::State;
  constexpr int kStates = Rule::kStates;

  const auto c = *reinterpret_cast<const typename Rule::Coefficients*>(coefficients);
  auto* __restrict param = static_cast<Param*>(tensor.slot[kParam]);
  const auto* __restrict grad = static_cast<const Grad*>(tensor.slot[kGrad]);
  State* state[kStates];
  for (int k = 0; k < kStates; ++k) state[k] = static_cast<State*>(tensor.slot[kFirstState + k]);

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = begin; i < end; ++i) {
    float p = to_float(param[i]);
    float s[kStates];
    for (int k = 0; k < kStates; ++k) s[k] = to_float(state[k][i]);

    Rule::update(c, p, to_float(grad[i]), s);

    param[i] = from_float<Param>(p);
    for (int k = 0; k < kStates; ++k) state[k][i] = from_float<State>(s[k]);
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
