#define JAX_GLUON_EMULATE_AVX512
#include "cpu/simd/avx512.h"
#include "cpu/transposed/transposed_variant.h"
#include "cpu/variant.h"

namespace jax_gluon::cpu {

namespace {

const Kernels& row_kernels() {
  static const Kernels kernels = Variant<Avx512, true>::kernels("emulated_avx512");
  return kernels;
}

}  // namespace

const Kernels& emulated_avx512_kernels() {
  static const Kernels kernels = TransposedVariant<Avx512, row_kernels>::kernels("emulated_avx512");
  return kernels;
}

}  // namespace jax_gluon::cpu
