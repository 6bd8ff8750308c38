#pragma once

#include <stdexcept>

namespace jax_gluon::metal {

// What went wrong, in Metal's words and with a hint. Devices turn it into a Status.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace jax_gluon::metal
