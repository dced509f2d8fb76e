// Default rounding and denormals kept, whatever the caller's thread has set.
#pragma once

#include <cfenv>

namespace fused_adamw {

// torch.set_flush_denormal(True) would change results silently; within this scope it does not.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace fused_adamw
