#include "metal/choice.h"

#include <cstdlib>
#include <cstring>

#include "metal/metal.h"

namespace jax_gluon {

bool metal_by_default() {
  const char* given = std::getenv("JAX_GLUON_METAL_BY_DEFAULT");
  if (given && *given) return std::strcmp(given, "1") == 0;
#if defined(__APPLE__)
  return true;
#else
  return false;
#endif
}

bool prefers_metal(int64_t products, int64_t widest, int64_t min_products) {
  if (widest > kMaxHeadDimOfMetal || !metal_by_default()) return false;
  return products >= (min_products < 0 ? kMinProductsForMetal : min_products);
}

}  // namespace jax_gluon
