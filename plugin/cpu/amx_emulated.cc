#define JAX_GLUON_EMULATE_AVX512
#include "cpu/simd/amx.h"
#include "cpu/transposed/transposed_variant.h"

namespace jax_gluon::cpu {

const Kernels& emulated_amx_kernels() {
  static const Kernels kernels =
      TransposedVariant<Amx, emulated_avx512_kernels>::kernels("emulated_amx");
  return kernels;
}

}  // namespace jax_gluon::cpu
