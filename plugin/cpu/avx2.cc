#include "cpu/simd/avx2.h"

#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& avx2_kernels() {
  static const Kernels kernels = Variant<Avx2>::kernels("avx2");
  return kernels;
}

}  // namespace jax_gluon::cpu
