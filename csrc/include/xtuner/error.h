// The one exception type of the core: something the caller passed cannot be used.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace xt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws Error with all parts streamed into one message.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace xt
