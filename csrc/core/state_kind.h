// What a rule's state is, for formats that do not keep it as a plain number.
#pragma once

#include <cstdint>

namespace fused_adamw {

enum class StateKind : std::uint8_t {
  kSigned,     // a first moment
  kSquare,     // a second moment: its root is of a gradient's size
  kMagnitude,  // not negative
};
constexpr const char* kStateKindNames[] = {"signed", "square", "magnitude"};

}  // namespace fused_adamw
