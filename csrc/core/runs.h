// Shards that are not one run of the whole tensor.
//
// [note: runs] Random bits follow from the number of an element in the whole tensor, in row-major
// order. That of a shard of rows is its first element's and counted on. A shard of columns has a
// run of every row: element i of it is number
//
//   offset + i / run * stride + i % run
//
// A run of coded elements is a multiple of their block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/bucket.h"

namespace fused_adamw {

inline bool has_runs(const Bucket& bucket) {
  return bucket.format.draws() &&
         std::any_of(bucket.tensors.begin(), bucket.tensors.end(),
                     [](const TensorEntry& tensor) { return tensor.run != 0; });
}

// Calls visit(begin, end, offset) for each run in elements [begin, end) of a tensor: elements of
// it, and the offset with which they, counted from the tensor's first, get their numbers.
template <class Visit>
void for_each_run(const TensorEntry& tensor, std::int64_t begin, std::int64_t end, Visit&& visit) {
  while (begin < end) {
    const std::int64_t index = tensor.run ? begin / tensor.run : 0;
    const std::int64_t next = tensor.run ? std::min(end, (index + 1) * tensor.run) : end;
    visit(begin, next, tensor.offset + index * (tensor.stride - tensor.run));
    begin = next;
  }
}

// The same work with a tensor for each run, for engines that know of none. Nothing is observed.
inline Bucket in_runs(const Bucket& bucket) {
  Bucket result = bucket;
  result.tensors.clear();
  for (const TensorEntry& tensor : bucket.tensors) {
    for_each_run(tensor, 0, tensor.numel,
                 [&](std::int64_t begin, std::int64_t end, std::int64_t offset) {
                   TensorEntry& part = result.tensors.emplace_back(tensor);
                   const auto bytes = [](void* memory, std::int64_t count) -> void* {
                     return memory ? static_cast<char*>(memory) + count : nullptr;
                   };
                   for (int k = 0; k < kMaxSlots; ++k) {
                     const int size = element_size(bucket.format.of_slot(k));
                     part.slot[k] = bytes(part.slot[k], begin * size);
                   }
                   part.beside = bytes(part.beside, begin * besides_size(bucket.format.beside));
                   if (part.ema) part.ema += begin;
                   for (float*& scale : part.scale) {
                     if (scale) scale += begin / kCodeBlock;
                   }
                   part.offset = offset + begin;
                   part.run = part.stride = 0;
                   part.numel = end - begin;
                 });
  }
  return result;
}

}  // namespace fused_adamw
