#include "cpu/engine.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/float_environment.h"
#include "core/pass.h"
#include "core/planner.h"
#include "core/square_sum.h"
#include "rules/registry.h"
#include "storage/format.h"
#include "storage/random.h"

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
  FUSED_ADAMW_HD void* slot_bytes(int k) const {
    return static_cast<char*>(tensor.slot[k]) + begin * element_size(format.of_slot(k));
  }
  template <class T>
  FUSED_ADAMW_HD T* beside() const {
    return static_cast<T*>(tensor.beside) + begin;
  }
  FUSED_ADAMW_HD void* beside_bytes() const {
    return static_cast<char*>(tensor.beside) + begin * besides_size(format.beside);
  }
};

// Halves of random words.
using Half = std::uint16_t __attribute__((may_alias));

// What knows no rule, at one level. `count` numbers of a dtype of 16 bits become floats, or back;
// the rest takes any dtype. `random` has the random bits of each element.
struct Tools {
  void (*widen)(const void* from, Dtype dtype, float* to, std::int64_t count);
  void (*narrow)(const float* from, Dtype dtype, void* to, std::int64_t count);
  void (*draw)(const RandomStream& stream, std::uint32_t first, std::uint32_t* words,
               std::uint32_t count);
  void (*turn)(const std::uint32_t* words, int k, std::uint32_t* turned, std::uint32_t count);
  void (*narrow_randomly)(const float* from, const Half* random, void* to, std::int64_t count);
  void (*join)(const void* param, const void* beside, Beside kind, float* to, std::int64_t count);
  void (*split)(const float* from, const std::uint8_t* random, void* param, void* beside,
                Beside kind, std::int64_t count);
  void (*decode)(const void* codes, const float* scales, StateKind kind, float* to,
                 std::int64_t count);
  void (*encode)(const float* from, StateKind kind, void* codes, float* scales, std::int64_t count);
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

FUSED_ADAMW_HD void draw_words(const RandomStream& from, std::uint32_t first, std::uint32_t* words,
                               std::uint32_t count) {
  const RandomStream stream = from;
  for (std::uint32_t i = 0; i < count; ++i) words[i] = stream.word(first + i);
}

FUSED_ADAMW_HD void turn_words(const std::uint32_t* words, int k, std::uint32_t* turned,
                               std::uint32_t count) {
  const auto turn = [&](auto&& word_of) {
    FUSED_ADAMW_INDEPENDENT_ITERATIONS
    for (std::uint32_t i = 0; i < count; ++i) turned[i] = word_of(words[i]);
  };
  if (k == 0) return turn([](std::uint32_t x) { return word_of_state(x, 0); });
  if (k == 1) return turn([](std::uint32_t x) { return word_of_state(x, 1); });
  turn([](std::uint32_t x) { return word_of_state(x, 2); });
}

FUSED_ADAMW_HD void narrow_any_randomly(const float* from, const Half* random, void* to,
                                        std::int64_t count) {
  bfloat16* values = static_cast<bfloat16*>(to);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) values[i] = rounded_stochastically(from[i], random[i]);
}

template <class Kind>
FUSED_ADAMW_HD void join(const void* param, const void* beside, float* to, std::int64_t count) {
  const bfloat16* params = static_cast<const bfloat16*>(param);
  const auto* besides = static_cast<const typename Kind::Element*>(beside);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) to[i] = Kind::value(params[i], besides[i]);
}

template <class Kind>
FUSED_ADAMW_HD void split(const float* from, const std::uint8_t* random, void* param, void* beside,
                          std::int64_t count) {
  bfloat16* params = static_cast<bfloat16*>(param);
  auto* besides = static_cast<typename Kind::Element*>(beside);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) {
    Kind::store(from[i], std::is_same_v<Kind, Remainder8> ? random[i] : 0u, params[i], besides[i]);
  }
}

// Of a bfloat16 parameter. A master is its value where it is.
FUSED_ADAMW_HD void join_any(const void* param, const void* beside, Beside kind, float* to,
                             std::int64_t count) {
  if (kind == Beside::kRemainder16) return join<Remainder16>(param, beside, to, count);
  if (kind == Beside::kRemainder8) return join<Remainder8>(param, beside, to, count);
  join<Compensation>(param, beside, to, count);
}

FUSED_ADAMW_HD void split_any(const float* from, const std::uint8_t* random, void* param,
                              void* beside, Beside kind, std::int64_t count) {
  if (kind == Beside::kRemainder16) return split<Remainder16>(from, random, param, beside, count);
  if (kind == Beside::kRemainder8) return split<Remainder8>(from, random, param, beside, count);
  if (kind == Beside::kCompensation) return split<Compensation>(from, random, param, beside, count);
  bfloat16* params = static_cast<bfloat16*>(param);  // of a master
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::int64_t i = 0; i < count; ++i) params[i] = rounded_away(from[i]);
}

// One block of codes, or what there is of it.
template <class Codes>
FUSED_ADAMW_HD void decode_block(const void* from, float scale, float* to, int count) {
  using Code = typename Codes::Code;
  const Code* codes = static_cast<const Code*>(from);
  const float unit = Codes::unit_of(scale);
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (int i = 0; i < count; ++i) to[i] = Codes::value_of(codes[i], unit);
}

template <class Codes>
FUSED_ADAMW_HD float encode_block(const float* from, void* to, int count) {
  using Code = typename Codes::Code;
  Code* codes = static_cast<Code*>(to);
  std::int32_t largest = 0;  // below 2^31, so as signed as not
  for (int i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<std::int32_t>(Codes::magnitude_bits(from[i])));
  }
  const float scale = Codes::scale_of(static_cast<std::uint32_t>(largest));
  const float factor = Codes::factor_of(scale);
  if (factor == 0.0f) {
    std::memset(codes, 0, static_cast<std::size_t>(count));
    return scale;
  }
  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (int i = 0; i < count; ++i) codes[i] = static_cast<Code>(Codes::code_of(from[i], factor));
  return scale;
}

template <class Codes>
FUSED_ADAMW_HD void decode(const void* codes, const float* scales, float* to, std::int64_t count) {
  const auto* bytes = static_cast<const std::uint8_t*>(codes);
  std::int64_t i = 0;
  for (; i + kCodeBlock <= count; i += kCodeBlock) {
    decode_block<Codes>(bytes + i, *scales++, to + i, kCodeBlock);
  }
  if (i < count) decode_block<Codes>(bytes + i, *scales, to + i, static_cast<int>(count - i));
}

template <class Codes>
FUSED_ADAMW_HD void encode(const float* from, void* codes, float* scales, std::int64_t count) {
  auto* bytes = static_cast<std::uint8_t*>(codes);
  std::int64_t i = 0;
  for (; i + kCodeBlock <= count; i += kCodeBlock) {
    *scales++ = encode_block<Codes>(from + i, bytes + i, kCodeBlock);
  }
  if (i < count) {
    *scales = encode_block<Codes>(from + i, bytes + i, static_cast<int>(count - i));
  }
}

FUSED_ADAMW_HD void decode_any(const void* codes, const float* scales, StateKind kind, float* to,
                               std::int64_t count) {
  visit_codes(kind, [&](auto of) { decode<decltype(of)>(codes, scales, to, count); });
}

FUSED_ADAMW_HD void encode_any(const float* from, StateKind kind, void* codes, float* scales,
                               std::int64_t count) {
  visit_codes(kind, [&](auto of) { encode<decltype(of)>(from, codes, scales, count); });
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
  const Half* halves = static_cast<const std::uint16_t*>(grad);
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

// Up with the probability of what is cut off, each by its half of `random`.
FUSED_ADAMW_HD std::uint32_t pair_of_bfloat16s(float first, float second, std::uint32_t random) {
  return (bits_of(first) + (random & 0xffffu)) >> 16 |
         ((bits_of(second) + (random >> 16)) & 0xffff0000u);
}

// Where it is stochastic, `from` rounds, beginning with word `word`.
template <class Functor, bool kStochastic>
FUSED_ADAMW_HD void update_pairs(const Row<Functor>& row, Word* const* slot, std::uint32_t pairs,
                                 const RandomStream& from, std::uint32_t word) {
  const auto c = row.rule;
  const float factor = row.pass.grad_factor;
  const RandomStream stream = from;
  Word* param = slot[kParam];
  const Word* grad = slot[kGrad];
  Word* state[Functor::kStates + 1];
  for (int k = 0; k < Functor::kStates; ++k) state[k] = slot[kFirstState + k];

  FUSED_ADAMW_INDEPENDENT_ITERATIONS
  for (std::uint32_t i = 0; i < pairs; ++i) {
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

    if constexpr (kStochastic) {
      const std::uint32_t random = stream.word(word + i);
      param[i] = pair_of_bfloat16s(p0, p1, random);
      for (int k = 0; k < Functor::kStates; ++k) {
        state[k][i] = pair_of_bfloat16s(s0[k], s1[k], word_of_state(random, k));
      }
    } else {
      param[i] = pair_of_bfloat16s(p0, p1);
      for (int k = 0; k < Functor::kStates; ++k) state[k][i] = pair_of_bfloat16s(s0[k], s1[k]);
    }
  }
}

// [note: staging] Arrays of other formats pass through buffers of floats in the L1 cache, a block
// at a time, so that a rule is compiled twice, and not once for every format. Blocks begin where
// blocks of codes do: all ranges of work are cut at multiples of 64.
constexpr std::int64_t kBlock = 512;

// The full values of parameters: where they are, or in `buffer`.
FUSED_ADAMW_HD float* full_values(const Work& work, const Tools& tools, float* buffer) {
  const Format& format = work.format;
  const std::int64_t count = work.end - work.begin;
  if (format.beside == Beside::kMaster) return work.beside<float>();
  if (format.beside == Beside::kNothing && format.param == Dtype::kFloat32) {
    return work.slot<float>(kParam);
  }
  const void* param = work.slot<std::uint16_t>(kParam);
  if (format.beside == Beside::kNothing) {
    tools.widen(param, format.param, buffer, count);
  } else {
    tools.join(param, work.beside_bytes(), format.beside, buffer, count);
  }
  return buffer;
}

// The random words of at most kBlock elements.
struct RandomWords {
  static constexpr int kMost = kBlock / 2 + 1;  // an element may be the second of its word
  alignas(64) std::uint32_t words[kMost];
  alignas(64) std::uint32_t turned[kMost];
  std::int64_t first = 0;  // index of the first element
  std::uint32_t count;

  // Indices of words may pass a multiple of 2^32.
  FUSED_ADAMW_HD void draw(const Work& work, const Tools& tools, std::uint32_t step) {
    const int share = work.format.stochastic ? kShareOf16Bits : kShareOf8Bits;
    first = work.tensor.extent.number(work.begin);
    const std::int64_t word = first >> share;
    const std::int64_t end = ((first + (work.end - work.begin) - 1) >> share) + 1;
    count = static_cast<std::uint32_t>(end - word);
    for (std::int64_t at = word; at < end;) {
      const std::int64_t next = std::min(end, ((at >> 32) + 1) << 32);
      const RandomStream stream(work.tensor.key, step, static_cast<std::uint32_t>(at >> 32));
      tools.draw(stream, static_cast<std::uint32_t>(at), words + (at - word),
                 static_cast<std::uint32_t>(next - at));
      at = next;
    }
  }

  // Of each element, little-endian.
  FUSED_ADAMW_HD const std::uint8_t* bytes() const {
    return reinterpret_cast<const std::uint8_t*>(words) + (first & 3);
  }
  FUSED_ADAMW_HD const Half* halves() const {
    return reinterpret_cast<const Half*>(words) + (first & 1);
  }
  FUSED_ADAMW_HD const Half* halves_of_state(int k, const Tools& tools) {
    tools.turn(words, k, turned, count);
    return reinterpret_cast<const Half*>(turned) + (first & 1);
  }
};

FUSED_ADAMW_HD void store_params(const Work& work, const Tools& tools, const float* values,
                                 const RandomWords& random) {
  const Format& format = work.format;
  const std::int64_t count = work.end - work.begin;
  if (format.param == Dtype::kFloat32) return;
  void* param = work.slot<std::uint16_t>(kParam);
  if (format.stochastic) {
    tools.narrow_randomly(values, random.halves(), param, count);
  } else if (format.beside == Beside::kNothing || format.param == Dtype::kFloat16) {
    tools.narrow(values, format.param, param, count);
  } else {
    tools.split(values, random.bytes(), param, work.beside_bytes(), format.beside, count);
  }
}

template <class Functor>
FUSED_ADAMW_HD void update_staged(const Row<Functor>& row, const Work& work, const Tools& tools) {
  constexpr int kSlots = kFirstState + Functor::kStates;
  const Format& format = work.format;
  alignas(64) float buffer[kSlots][kBlock];
  RandomWords random;
  float* slot[kSlots];
  for (std::int64_t begin = work.begin; begin < work.end; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, work.end - begin);
    const Work block{work.tensor, format, work.coefficients, begin, begin + count};
    const auto scales = [&](int k) { return work.tensor.scale[k] + begin / kCodeBlock; };
    slot[kParam] = full_values(block, tools, buffer[kParam]);
    for (int k = kGrad; k < kSlots; ++k) {
      const Dtype dtype = format.of_slot(k);
      slot[k] = dtype == Dtype::kFloat32 ? block.slot<float>(k) : buffer[k];
      if (dtype == Dtype::kBfloat16 || dtype == Dtype::kFloat16) {
        tools.widen(block.slot<std::uint16_t>(k), dtype, buffer[k], count);
      }
    }
    for (int k = 0; k < Functor::kStates && format.state == Dtype::kCode8; ++k) {
      tools.decode(block.slot<std::uint8_t>(kFirstState + k), scales(k), Functor::kKinds[k],
                   buffer[kFirstState + k], count);
    }
    if (format.draws()) random.draw(block, tools, row.pass.random_step);

    update_floats<Functor>(row, slot, count);

    store_params(block, tools, slot[kParam], random);
    for (int k = 0; k < Functor::kStates; ++k) {
      const int at = kFirstState + k;
      if (slot[at] != buffer[at]) continue;
      if (format.state == Dtype::kCode8) {
        tools.encode(buffer[at], Functor::kKinds[k], block.slot<std::uint8_t>(at), scales(k),
                     count);
      } else if (format.stochastic) {
        tools.narrow_randomly(buffer[at], random.halves_of_state(k, tools),
                              block.slot<std::uint16_t>(at), count);
      } else {
        tools.narrow(buffer[at], format.state, block.slot<std::uint16_t>(at), count);
      }
    }
  }
}

// Whether every array is bfloat16 and pairs are those that share random words, of one stream. There
// are no more of them than 32 bits count.
FUSED_ADAMW_HD bool goes_by_pairs(const Work& work) {
  const Format& format = work.format;
  if (format.param != kBf16 || format.grad != kBf16 || format.state != kBf16) return false;
  if (format.beside != Beside::kNothing || work.end - work.begin > std::int64_t{1} << 32) {
    return false;
  }
  if (!format.stochastic) return true;
  const std::int64_t first = work.tensor.extent.number(work.begin);
  const std::int64_t last = first + (work.end - work.begin) - 1;
  return first % 2 == 0 && first >> 33 == last >> 33;
}

template <class Functor>
FUSED_ADAMW_HD void update_span(const Work& work, const Tools& tools) {
  constexpr int kSlots = kFirstState + Functor::kStates;
  const auto row = *reinterpret_cast<const Row<Functor>*>(work.coefficients);
  if (work.format.all(Dtype::kFloat32)) {
    float* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) slot[k] = work.slot<float>(k);
    update_floats<Functor>(row, slot, work.end - work.begin);
  } else if (goes_by_pairs(work)) {
    Word* slot[kSlots];
    for (int k = 0; k < kSlots; ++k) {
      slot[k] = reinterpret_cast<Word*>(work.slot<std::uint16_t>(k));
    }
    const std::int64_t pairs = (work.end - work.begin) / 2;
    const std::int64_t word = work.tensor.extent.number(work.begin) / 2;
    const RandomStream stream(work.tensor.key, row.pass.random_step,
                              static_cast<std::uint32_t>(word >> 32));
    const auto count = static_cast<std::uint32_t>(pairs);
    const auto first = static_cast<std::uint32_t>(word);
    if (work.format.stochastic) {
      update_pairs<Functor, true>(row, slot, count, stream, first);
    } else {
      update_pairs<Functor, false>(row, slot, count, stream, first);
    }
    const Work last{work.tensor, work.format, work.coefficients, work.begin + 2 * pairs, work.end};
    update_staged<Functor>(row, last, tools);
  } else {
    update_staged<Functor>(row, work, tools);
  }
}

using UpdateSpan = void (*)(const Work&, const Tools&);

#define FUSED_ADAMW_LEVEL(name, target)                                                          \
  template <class Functor>                                                                       \
  target void update_##name(const Work& work, const Tools& tools) {                              \
    update_span<Functor>(work, tools);                                                           \
  }                                                                                              \
  target void widen_##name(const void* from, Dtype dtype, float* to, std::int64_t count) {       \
    widen_any(from, dtype, to, count);                                                           \
  }                                                                                              \
  target void narrow_##name(const float* from, Dtype dtype, void* to, std::int64_t count) {      \
    narrow_any(from, dtype, to, count);                                                          \
  }                                                                                              \
  target void draw_##name(const RandomStream& stream, std::uint32_t first, std::uint32_t* words, \
                          std::uint32_t count) {                                                 \
    draw_words(stream, first, words, count);                                                     \
  }                                                                                              \
  target void turn_##name(const std::uint32_t* words, int k, std::uint32_t* turned,              \
                          std::uint32_t count) {                                                 \
    turn_words(words, k, turned, count);                                                         \
  }                                                                                              \
  target void narrow_randomly_##name(const float* from, const Half* random, void* to,            \
                                     std::int64_t count) {                                       \
    narrow_any_randomly(from, random, to, count);                                                \
  }                                                                                              \
  target void join_##name(const void* param, const void* beside, Beside kind, float* to,         \
                          std::int64_t count) {                                                  \
    join_any(param, beside, kind, to, count);                                                    \
  }                                                                                              \
  target void split_##name(const float* from, const std::uint8_t* random, void* param,           \
                           void* beside, Beside kind, std::int64_t count) {                      \
    split_any(from, random, param, beside, kind, count);                                         \
  }                                                                                              \
  target void decode_##name(const void* codes, const float* scales, StateKind kind, float* to,   \
                            std::int64_t count) {                                                \
    decode_any(codes, scales, kind, to, count);                                                  \
  }                                                                                              \
  target void encode_##name(const float* from, StateKind kind, void* codes, float* scales,       \
                            std::int64_t count) {                                                \
    encode_any(from, kind, codes, scales, count);                                                \
  }                                                                                              \
  target void average_##name(const void* param, Dtype dtype, float* ema, float weight,           \
                             std::int64_t count) {                                               \
    average_any(param, dtype, ema, weight, count);                                               \
  }                                                                                              \
  target double square_sum_##name(const void* grad, Dtype dtype, std::int64_t count) {           \
    return square_sum_any(grad, dtype, count);                                                   \
  }                                                                                              \
  target Observation observe_##name(const float* grad, const float* before, const float* after,  \
                                    std::int64_t count) {                                        \
    return observe_floats(grad, before, after, count);                                           \
  }                                                                                              \
  constexpr Tools kTools_##name{widen_##name,   narrow_##name,          draw_##name,             \
                                turn_##name,    narrow_randomly_##name, join_##name,             \
                                split_##name,   decode_##name,          encode_##name,           \
                                average_##name, square_sum_##name,      observe_##name};

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

// Run by run, where random bits are drawn: [note: runs].
void update_runs(const Code& code, const Work& work) {
  if (!work.format.draws()) return code.update(work, code.tools);
  for_each_run(work.tensor.extent, work.begin, work.end, [&](std::int64_t begin, std::int64_t end) {
    code.update({work.tensor, work.format, work.coefficients, begin, end}, code.tools);
  });
}

// Gradients as floats: where they are, or in `buffer`.
const float* gradients(const Work& work, const Tools& tools, float* buffer) {
  const Dtype dtype = work.format.grad;
  if (dtype == Dtype::kFloat32) return work.slot<float>(kGrad);
  tools.widen(work.slot<std::uint16_t>(kGrad), dtype, buffer, work.end - work.begin);
  return buffer;
}

// Elements [begin, end) of one tensor.
Observation update_in_blocks(const Bucket& bucket, const Code& code, const Work& work) {
  const Tools& tools = code.tools;
  const float weight = reinterpret_cast<const PassCoefficients*>(
                           work.coefficients + bucket.coefficients_per_row - kPassCoefficients)
                           ->ema_weight;
  const int grad_size = element_size(bucket.format.grad);
  alignas(64) float before[kPassBlock], after[kPassBlock], grad[kPassBlock];
  Observation sum{};
  for (std::int64_t begin = work.begin; begin < work.end; begin += kPassBlock) {
    const std::int64_t end = std::min(work.end, begin + kPassBlock), count = end - begin;
    const Work block{work.tensor, work.format, work.coefficients, begin, end};
    float* ema = bucket.has_ema ? work.tensor.ema + begin : nullptr;
    if (ema != nullptr) {
      for (std::int64_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(ema + i, 1);
    }
    if (bucket.observed != nullptr) {
      const float* values = full_values(block, tools, before);
      if (values != before) std::copy_n(values, count, before);
    }

    update_runs(code, block);

    if (ema != nullptr && work.format.beside == Beside::kNothing) {
      tools.average(block.slot_bytes(kParam), work.format.param, ema, weight, count);
    } else if (ema != nullptr) {
      tools.average(full_values(block, tools, after), Dtype::kFloat32, ema, weight, count);
    }
    if (bucket.observed != nullptr) {
      sum = sum + tools.observe(gradients(block, tools, grad), before,
                                full_values(block, tools, after), count);
    }
    if (bucket.zero_grads) {
      std::memset(block.slot_bytes(kGrad), 0, static_cast<std::size_t>(count * grad_size));
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
    if (bucket.is_plain()) return update_runs(code, work(tensor, begin, end));
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
