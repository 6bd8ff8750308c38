// Where the user's caches are, by the rules of `cache_folder` of jax_gluon/_plan/tuned_table.py.
#pragma once

#include <cstdlib>
#include <string>

namespace jax_gluon {

// Empty where there is none.
inline std::string cache_folder() {
  if (const char* given = std::getenv("JAX_GLUON_CACHE_DIR"); given && *given) return given;
#if !defined(__APPLE__)
  if (const char* given = std::getenv("XDG_CACHE_HOME"); given && *given) {
    return std::string(given) + "/jax_gluon";
  }
#endif
  const char* home = std::getenv("HOME");
  if (!home || !*home) return "";
#if defined(__APPLE__)
  return std::string(home) + "/Library/Caches/jax_gluon";
#else
  return std::string(home) + "/.cache/jax_gluon";
#endif
}

}  // namespace jax_gluon
