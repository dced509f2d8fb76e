// Cuts a list of tensors into pieces of work. Pure C++: no CUDA, no threads, no Python.
#pragma once

#include <cstdint>
#include <vector>

namespace fused_adamw {

// Elements [begin, end) of tensor `tensor`.
struct Span {
  std::int64_t tensor;
  std::int64_t begin;
  std::int64_t end;
};

// [note: flat ranges] The CPU engine sees the list as one array of all elements, laid end to end,
// and cuts it into equal ranges whatever the tensors' sizes: a range may hold a piece of a large
// tensor or hundreds of small ones, so that threads are equally busy in both cases.
class FlatRanges {
 public:
  // Ranges of about `target` elements over tensors of `numels[i]`; inner cuts fall on multiples of
  // `alignment` elements of a tensor, so that vector bodies start aligned where the tensor does.
  FlatRanges(std::vector<std::int64_t> numels, std::int64_t target,
             std::int64_t alignment = kAlignment);

  std::int64_t count() const { return count_; }

  // Calls visit(Span) for each tensor piece in range `index`, in order.
  template <class Visit>
  void for_each(std::int64_t index, Visit&& visit) const {
    const std::int64_t begin = index * target_, end = begin + target_;
    for (std::int64_t tensor = tensor_at(begin); tensor < tensors() && starts_[tensor] < end;
         ++tensor) {
      const std::int64_t numel = starts_[tensor + 1] - starts_[tensor];
      const std::int64_t from = cut(begin - starts_[tensor], numel);
      const std::int64_t to = cut(end - starts_[tensor], numel);
      if (from < to) visit(Span{tensor, from, to});
    }
  }

 private:
  static constexpr std::int64_t kAlignment = 64;

  std::int64_t tensors() const { return static_cast<std::int64_t>(starts_.size()) - 1; }
  std::int64_t tensor_at(std::int64_t element) const;
  // The offset within a tensor at which a cut at `offset` falls.
  std::int64_t cut(std::int64_t offset, std::int64_t numel) const;

  std::vector<std::int64_t> starts_;  // prefix sums: tensor i holds [starts_[i], starts_[i + 1])
  std::int64_t target_;
  std::int64_t alignment_;
  std::int64_t count_;
};

// One kernel launch: tensors[first, last) of the plan's order, `blocks` chunks in all.
struct Launch {
  std::vector<std::int64_t> tensors;       // indices into the bucket, empty tensors left out
  std::vector<std::int32_t> rows;          // distinct coefficient rows that the launch needs
  std::vector<std::int32_t> row_of;        // for each tensor, its index into `rows`
  std::vector<std::uint32_t> first_chunk;  // for each tensor its first block; one more at the end
};

struct LaunchLimits {
  int tensors;                       // most tensors in a launch
  int rows;                          // most distinct coefficient rows in a launch
  std::int64_t chunk;                // elements a block
  std::int64_t blocks = 2147483647;  // most blocks in a grid (x dimension)
};

// [note: launches] A block finds its tensor by searching `first_chunk`. A launch is closed when the
// next tensor would not fit into its limits. A tensor whose chunks alone exceed `blocks` is refused
// (std::length_error): with 16384 elements a chunk that is 2^45 elements.
std::vector<Launch> plan_launches(const std::vector<std::int64_t>& numels,
                                  const std::vector<std::int32_t>& rows,
                                  const LaunchLimits& limits);

}  // namespace fused_adamw
