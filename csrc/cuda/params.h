// Parameters with something beside them, and random bits, for Joined and Coded.
#pragma once

#include <cstdint>

#include "core/platform.h"
#include "cuda/packs.h"
#include "storage/beside.h"
#include "storage/bytes.h"
#include "storage/random.h"

namespace fused_adamw::cuda {

FUSED_ADAMW_HD std::uint32_t upper_of(std::int64_t index) {
  return static_cast<std::uint32_t>(index >> 32);
}

// The random bits of a chunk's elements.
struct Draws {
  std::uint64_t key;
  std::uint32_t step;
  std::int64_t offset;  // of the tensor's first element
  RandomStream stream;  // of the chunk's first element
  // Whether packs begin at multiples of their length, and all indices share their upper 32 bits.
  // Hardly any tensor begins elsewhere: only shards do.
  bool is_simple;

  FUSED_ADAMW_HD Draws(std::uint64_t key, std::uint32_t step, std::int64_t offset,
                       std::int64_t begin, std::int64_t end, int pack)
      : key(key),
        step(step),
        offset(offset),
        stream(key, step, upper_of(offset + begin)),
        is_simple(offset % pack == 0 && upper_of(offset + begin) == upper_of(offset + end - 1)) {}

  // Of kCount elements from `i` on, a multiple of kCount.
  template <int kCount>
  FUSED_ADAMW_HD void draw(std::int64_t i, std::uint32_t (&bits)[kCount]) const {
    const std::int64_t index = offset + i;
    const std::uint32_t lower = static_cast<std::uint32_t>(index);
    if (is_simple) {
      const std::uint32_t folded = stream.folded(lower);
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; ++j) bits[j] = stream.finished(folded ^ j);
    } else {
      const RandomStream here(key, step, upper_of(index)), next(key, step, upper_of(index) + 1);
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const std::uint32_t at = lower + static_cast<std::uint32_t>(j);
        bits[j] = at < lower ? next.bits(at) : here.bits(at);
      }
    }
  }
};

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

// Four neighbours' parameters and remainders, from and to the words that have them: two words of
// parameters, and two or one of remainders. See [note: remainders].
template <class Kind>
struct Four;

template <>
struct Four<Remainder16> {
  FUSED_ADAMW_HD static void values(const std::uint32_t* params, const std::uint32_t* remainders,
                                    float* value) {
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < 2; ++w) {
      const std::uint32_t lower = remainders[w] ^ 0x80008000u;
      value[2 * w] = without_carry(permuted(params[w], lower, 0x1054));
      value[2 * w + 1] = without_carry(permuted(params[w], lower, 0x3276));
    }
  }
  FUSED_ADAMW_HD static void store(const float* value, const std::uint32_t*, std::uint32_t* params,
                                   std::uint32_t* remainders) {
    FUSED_ADAMW_UNROLL
    for (int w = 0; w < 2; ++w) {
      const std::uint32_t x = with_carry(value[2 * w], 0), y = with_carry(value[2 * w + 1], 0);
      params[w] = permuted(x, y, 0x7632);
      remainders[w] = permuted(x, y, 0x5410) ^ 0x80008000u;
    }
  }
};

template <>
struct Four<Remainder8> {
  FUSED_ADAMW_HD static void values(const std::uint32_t* params, const std::uint32_t* remainders,
                                    float* value) {
    // With zeros for the lowest bytes.
    const std::uint32_t even = (remainders[0] ^ 0x80808080u) & 0x00ff00ffu;
    const std::uint32_t odd = (remainders[0] ^ 0x80808080u) & 0xff00ff00u;
    value[0] = without_carry(permuted(params[0], even, 0x1045));
    value[1] = without_carry(permuted(params[0], odd, 0x3254));
    value[2] = without_carry(permuted(params[1], even, 0x1067));
    value[3] = without_carry(permuted(params[1], odd, 0x3276));
  }
  FUSED_ADAMW_HD static void store(const float* value, const std::uint32_t* random,
                                   std::uint32_t* params, std::uint32_t* remainders) {
    std::uint32_t x[4];
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < 4; ++j) x[j] = with_carry(value[j], random[j] & 0xffu);
    params[0] = permuted(x[0], x[1], 0x7632);
    params[1] = permuted(x[2], x[3], 0x7632);
    const std::uint32_t first = permuted(x[0], x[1], 0x0051), second = permuted(x[2], x[3], 0x0051);
    remainders[0] = permuted(first, second, 0x5410) ^ 0x80808080u;
  }
};

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
    if constexpr (Storage::kHasCodes && kCount % 4 == 0) {
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

// The inverse; draw(bits) makes the random bits of the elements.
template <class Storage, int kCount, class Draw>
FUSED_ADAMW_HD void encode_params(const Format& format, const float (&value)[kCount], Draw&& draw,
                                  RawParams<kCount>& raw) {
  if (is_whole<Storage>(format)) {
    memcpy(&raw, value, sizeof value);
    return;
  }
  raw = {};
  std::uint32_t bits[kCount] = {};
  if (!Storage::kHasCodes && format.beside == Beside::kNothing) {  // stochastic
    draw(bits);
    FUSED_ADAMW_UNROLL
    for (int j = 0; j < kCount; ++j) {
      raw.put(j * 2, rounded_stochastically(value[j], bits_of_param(bits[j])));
    }
    return;
  }
  with_beside<Storage>(format.beside, [&](auto kind) {
    using Kind = decltype(kind);
    using Element = typename Kind::Element;
    constexpr int kSize = sizeof(Element);
    if constexpr (std::is_same_v<Kind, Remainder8>) draw(bits);
    if constexpr (Storage::kHasCodes && kCount % 4 == 0) {
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; j += 4) {
        Four<Kind>::store(value + j, bits + j, raw.words + j / 2,
                          raw.words + kCount / 2 + j * kSize / 4);
      }
    } else {
      FUSED_ADAMW_UNROLL
      for (int j = 0; j < kCount; ++j) {
        bfloat16 param;
        Element beside;
        Kind::store(value[j], bits[j], param, beside);
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
  Pack<bfloat16, kCount> rounded;
  FUSED_ADAMW_UNROLL
  for (int j = 0; j < kCount; ++j) rounded.at[j] = rounded_away(value[j]);
  *reinterpret_cast<Pack<bfloat16, kCount>*>(static_cast<bfloat16*>(param) + i) = rounded;
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
