#include "cpu/simd/portable.h"

#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& portable_kernels() {
  static const Kernels kernels = Variant<Portable>::kernels("portable");
  return kernels;
}

}  // namespace jax_gluon::cpu
