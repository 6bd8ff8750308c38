#include "cpu/simd/neon_dot.h"
#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& neon_dotprod_kernels() {
  static const Kernels kernels = Variant<NeonDot>::kernels("neon_dotprod");
  return kernels;
}

}  // namespace jax_gluon::cpu
