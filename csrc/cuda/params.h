// Parameters with something beside them, and random bits, for Joined and Coded.
#pragma once

#include <cstdint>

#include "core/extent.h"
#include "core/platform.h"
#include "cuda/packs.h"
#include "cuda/words.h"
#include "storage/beside.h"
#include "storage/random.h"

namespace fused_adamw::cuda {

// Words of random bits for kCount neighbours, each of which takes 32 >> kShare of them. Where the
// first one's part is not the lowest of its word, which only a shard's may be, `shift` says how far
// up it is, and there is a word more.
template <int kCount, int kShare>
struct RandomWords {
  static constexpr int kWords = kCount == 1 ? 1 : kCount >> kShare ? (kCount >> kShare) + 1 : 2;
  std::uint32_t source[kWords];
  int shift;

  // Word `w`, beginning with the part of element `w << kShare`.
  FUSED_ADAMW_HD std::uint32_t word(int w) const {
    return funnel(source[w], kWords > 1 ? source[w + 1] : 0, shift);
  }
  // Those of state `k`, where these are of the parameter.
  FUSED_ADAMW_HD RandomWords of_state(int k) const {
    RandomWords words{{}, shift};
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < kWords; ++w) words.source[w] = word_of_state(source[w], k);
    return words;
  }
};

// The random bits of a chunk's elements.
template <int kShare>
struct Draws {
  std::uint64_t key;
  std::uint32_t step;
  const Extent& extent;
  std::uint32_t upper;  // 32 bits of the index of the first element's word
  RandomStream stream;  // of words with these

  // The chunk begins at element `begin` of the tensor.
  FUSED_ADAMW_HD Draws(std::uint64_t key, std::uint32_t step, const Extent& extent,
                       std::int64_t begin)
      : key(key),
        step(step),
        extent(extent),
        upper(static_cast<std::uint32_t>(extent.number(begin) >> kShare >> 32)),
        stream(key, step, upper) {}

  // Of kCount elements from `i` on, which are in one run.
  template <int kCount>
  FUSED_ADAMW_HD RandomWords<kCount, kShare> of(std::int64_t i) const {
    using Words = RandomWords<kCount, kShare>;
    const std::int64_t number = extent.number(i), index = number >> kShare;
    const auto lower = static_cast<std::uint32_t>(index);
    const auto upper = static_cast<std::uint32_t>(index >> 32);
    RandomStream first = stream, next = stream;
    if (upper != this->upper || lower > ~std::uint32_t{Words::kWords - 1}) {  // hardly ever
      first = {key, step, upper};
      next = {key, step, upper + 1};
    }
    Words words;
    words.shift = static_cast<int>(number & ((1 << kShare) - 1)) * (32 >> kShare);
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < Words::kWords; ++w) {
      words.source[w] = (lower + w >= lower ? first : next).word(lower + w);
    }
    return words;
  }
};

// Writes bfloat16, rounded stochastically.
template <int kCount>
FUSED_ADAMW_HD void round_stochastically(const float (&value)[kCount],
                                         const RandomWords<kCount, kShareOf16Bits>& random,
                                         std::uint32_t* to) {
  if constexpr (kCount == 1) {
    to[0] = rounded_stochastically(value[0], random.word(0) & 0xffffu).bits;
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; j += 2) {
      to[j / 2] = pair_rounded_stochastically(value[j], value[j + 1], random.word(j / 2));
    }
  }
}

// [note: raw params] Parameters and what is beside them as they lie in memory, in the registers of
// as many floats: a float32 parameter or a master fills them, others have a half each.
template <int kCount>
using RawParams = Raw<kCount * 4>;

// Calls use(Kind{}) with what is beside a bfloat16 parameter and makes a value with it.
template <class Storage, class Use>
FUSED_ADAMW_HD void with_beside(Beside beside, Use&& use) {
  if constexpr (Storage::kHasCodes) {
    return beside == Beside::kRemainder8 ? use(Remainder8{}) : use(Remainder16{});
  } else {
    return beside == Beside::kRemainder16 ? use(Remainder16{}) : use(Compensation{});
  }
}

// Whether the value is a float32 as it lies in memory: the parameter beside codes, else a master.
template <class Storage>
FUSED_ADAMW_HD bool is_whole(const Format& format) {
  return Storage::kHasCodes ? format.param == Dtype::kFloat32 : format.beside == Beside::kMaster;
}

template <class Storage, int kCount, class Access>
FUSED_ADAMW_HD void load_params(const Format& format, const void* param, const void* beside,
                                std::int64_t i, const Access& access, RawParams<kCount>& raw) {
  if (is_whole<Storage>(format)) {
    const void* from = Storage::kHasCodes ? param : beside;
    return access.load(static_cast<const float*>(from) + i, raw);
  }
  access.load(static_cast<const bfloat16*>(param) + i, raw);
  if (!Storage::kHasCodes && format.beside == Beside::kNothing) return;
  with_beside<Storage>(format.beside, [&](auto kind) {
    using Element = typename decltype(kind)::Element;
    access.load(static_cast<const Element*>(beside) + i, raw, kCount * 2);
  });
}

template <class Storage, int kCount>
FUSED_ADAMW_HD void values_of(const Format& format, const RawParams<kCount>& raw,
                              float (&value)[kCount]) {
  if (is_whole<Storage>(format)) return widen<float>(raw, value);
  if (!Storage::kHasCodes && format.beside == Beside::kNothing) {
    return widen<bfloat16>(raw, value);
  }
  with_beside<Storage>(format.beside, [&](auto kind) {
    using Kind = decltype(kind);
    using Element = typename Kind::Element;
    constexpr int kSize = sizeof(Element);
    if constexpr (kCount % 4 == 0 && kHasFour<Kind>) {
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; j += 4) {
        Four<Kind>::values(raw.words + j / 2, raw.words + kCount / 2 + j * kSize / 4, value + j);
      }
    } else {
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; ++j) {
        value[j] = Kind::value(raw.template get<bfloat16>(j * 2),
                               raw.template get<Element>(kCount * 2 + j * kSize));
      }
    }
  });
}

// The inverse; draw() makes RandomWords.
template <class Storage, int kCount, class Draw>
FUSED_ADAMW_HD void encode_params(const Format& format, const float (&value)[kCount], Draw&& draw,
                                  RawParams<kCount>& raw) {
  if (is_whole<Storage>(format)) {
    memcpy(&raw, value, sizeof value);
    return;
  }
  if constexpr (!Storage::kHasCodes) {
    if (format.beside == Beside::kNothing) return round_stochastically(value, draw(), raw.words);
  }
  with_beside<Storage>(format.beside, [&](auto kind) {
    using Kind = decltype(kind);
    using Element = typename Kind::Element;
    constexpr int kSize = sizeof(Element);
    RandomWords<kCount, Storage::kShare> random{};
    if constexpr (kSize == 1) random = draw();
    if constexpr (kCount % 4 == 0 && kHasFour<Kind>) {
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; j += 4) {
        Four<Kind>::store(value + j, random.word(j / 4), raw.words + j / 2,
                          raw.words + kCount / 2 + j * kSize / 4);
      }
    } else {
      raw = {};
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; ++j) {
        bfloat16 param;
        Element beside;
        Kind::store(value[j], byte_of(random.word(0), j), param, beside);
        raw.put(j * 2, param);
        raw.put(kCount * 2 + j * kSize, beside);
      }
    }
  });
}

// The parameter of a master.
template <int kCount>
FUSED_ADAMW_HD void store_rounded(Dtype dtype, const RawParams<kCount>& raw, void* param,
                                  std::int64_t i) {
  float value[kCount];
  widen<float>(raw, value);
  if (dtype == Dtype::kFloat16) return store(static_cast<float16*>(param) + i, value);
  Raw<kCount * 2> rounded;
  if constexpr (kCount == 1) {
    rounded.words[0] = rounded_away(value[0]).bits;
  } else {
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; j += 2)
      rounded.words[j / 2] = pair_rounded_away(value[j], value[j + 1]);
  }
  Wide<kCount>{}.store(static_cast<bfloat16*>(param) + i, rounded);
}

template <class Storage, int kCount, class Access>
FUSED_ADAMW_HD void store_params(const Format& format, const RawParams<kCount>& raw, void* param,
                                 void* beside, std::int64_t i, const Access& access) {
  if (is_whole<Storage>(format)) {
    access.store(static_cast<float*>(Storage::kHasCodes ? param : beside) + i, raw);
    if constexpr (!Storage::kHasCodes) store_rounded<kCount>(format.param, raw, param, i);
    return;
  }
  access.store(static_cast<bfloat16*>(param) + i, raw);
  if (!Storage::kHasCodes && format.beside == Beside::kNothing) return;
  with_beside<Storage>(format.beside, [&](auto kind) {
    using Element = typename decltype(kind)::Element;
    access.store(static_cast<Element*>(beside) + i, raw, kCount * 2);
  });
}

}  // namespace fused_adamw::cuda
