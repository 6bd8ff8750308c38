#include "cpu/simd/neon_matrix.h"
#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& neon_i8mm_bf16_kernels() {
  static const Kernels kernels =
      Variant<NeonMatrix, true, BlockInt8Core, BlockBf16Core>::kernels("neon_i8mm_bf16");
  return kernels;
}

}  // namespace jax_gluon::cpu
