#include "cpu/simd/amx.h"

#include "cpu/transposed/transposed_variant.h"

namespace jax_gluon::cpu {

const Kernels& amx_kernels() {
  static const Kernels kernels = TransposedVariant<Amx, avx512_kernels>::kernels("amx");
  return kernels;
}

}  // namespace jax_gluon::cpu
