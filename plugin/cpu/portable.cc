#include "simd_portable.h"
#include "variant.h"

namespace jax_gluon::cpu {

const Kernels& portable_kernels() {
  static const Kernels kernels = Variant<Portable>::kernels("portable");
  return kernels;
}

}  // namespace jax_gluon::cpu
