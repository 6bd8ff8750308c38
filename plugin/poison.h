// JAX_GLUON_POISON=1 fills results and scratch with 0xff bytes, NaN in every float format, before a
// kernel runs: what it forgets to write, or reads too early, then shows.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace jax_gluon {
namespace {

inline void poison(void* data, size_t bytes) {
  const char* enabled = std::getenv("JAX_GLUON_POISON");
  if (enabled && std::strcmp(enabled, "1") == 0 && bytes > 0) std::memset(data, 0xff, bytes);
}

}  // namespace
}  // namespace jax_gluon
