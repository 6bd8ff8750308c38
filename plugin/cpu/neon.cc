#include "cpu/simd/neon.h"

#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& neon_kernels() {
  static const Kernels kernels = Variant<Neon>::kernels("neon");
  return kernels;
}

}  // namespace jax_gluon::cpu
