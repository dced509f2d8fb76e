// Where a shard's elements are in the whole tensor.
//
// [note: runs] Random bits follow from the number of an element in the whole tensor, in the order
// of its memory. That of a shard of rows is its first element's and counted on. A shard of columns
// has a run of every row, as many elements as it has columns: the next run begins `stride` elements
// after it in the whole tensor. A run of coded elements is a multiple of their block.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/platform.h"

namespace fused_adamw {

struct Extent {
  std::int64_t offset;  // number of the first element
  std::int64_t run;     // elements in a run; 0: all
  std::int64_t stride;  // from one run's first element to the next one's

  // Of element `i`, counted in memory.
  FUSED_ADAMW_HD std::int64_t number(std::int64_t i) const { return i + shift(i); }

  // What is added to `i` for it: the same for all of a run.
  FUSED_ADAMW_HD std::int64_t shift(std::int64_t i) const {
    if (run == 0) return offset;
    const auto index = static_cast<std::uint64_t>(i) / static_cast<std::uint64_t>(run);
    return offset + static_cast<std::int64_t>(index) * (stride - run);
  }

  // Whether `count` neighbours from any multiple of `count` on are in one run.
  FUSED_ADAMW_HD bool keeps_together(int count) const { return run % count == 0; }
};

// Calls visit(begin, end) for each run in elements [begin, end) of a tensor.
template <class Visit>
void for_each_run(const Extent& extent, std::int64_t begin, std::int64_t end, Visit&& visit) {
  while (begin < end) {
    const std::int64_t next =
        extent.run ? std::min(end, (begin / extent.run + 1) * extent.run) : end;
    visit(begin, next);
    begin = next;
  }
}

}  // namespace fused_adamw
