#include "core/planner.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

namespace fused_adamw {

FlatRanges::FlatRanges(std::vector<std::int64_t> numels, std::int64_t target,
                       std::int64_t alignment)
    : starts_(std::move(numels)),
      target_(std::max<std::int64_t>(target, 1)),
      alignment_(alignment) {
  std::int64_t total = 0;
  for (std::int64_t& start : starts_) {
    const std::int64_t numel = start;
    start = total;
    total += numel;
  }
  starts_.push_back(total);
  count_ = (total + target_ - 1) / target_;
}

std::int64_t FlatRanges::tensor_at(std::int64_t element) const {
  return std::upper_bound(starts_.begin(), starts_.end(), element) - starts_.begin() - 1;
}

std::int64_t FlatRanges::cut(std::int64_t offset, std::int64_t numel) const {
  if (offset <= 0) return 0;
  if (offset >= numel) return numel;
  return offset / alignment_ * alignment_;
}

std::vector<Launch> plan_launches(const std::vector<std::int64_t>& numels,
                                  const std::vector<std::int32_t>& rows,
                                  const LaunchLimits& limits) {
  std::vector<Launch> launches;
  std::unordered_map<std::int32_t, std::int32_t> local_row;
  std::int64_t blocks = 0;
  for (std::size_t i = 0; i < numels.size(); ++i) {
    if (numels[i] == 0) continue;
    const std::int64_t chunks = (numels[i] - 1) / limits.chunk + 1;
    if (chunks > limits.blocks)
      throw std::length_error("a tensor needs more blocks than a grid has");
    const bool new_row = local_row.find(rows[i]) == local_row.end();
    const bool full = launches.empty() ||
                      static_cast<int>(launches.back().tensors.size()) == limits.tensors ||
                      (new_row && static_cast<int>(launches.back().rows.size()) == limits.rows) ||
                      blocks + chunks > limits.blocks;
    if (full) {
      launches.emplace_back();
      launches.back().first_chunk.push_back(0);
      local_row.clear();
      blocks = 0;
    }
    Launch& launch = launches.back();
    const auto [found, inserted] =
        local_row.emplace(rows[i], static_cast<std::int32_t>(launch.rows.size()));
    if (inserted) launch.rows.push_back(rows[i]);
    blocks += chunks;
    launch.tensors.push_back(static_cast<std::int64_t>(i));
    launch.row_of.push_back(found->second);
    launch.first_chunk.push_back(static_cast<std::uint32_t>(blocks));
  }
  return launches;
}

}  // namespace fused_adamw
