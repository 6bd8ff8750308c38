#include "cpu/simd/avx512.h"

#include "cpu/variant.h"

namespace jax_gluon::cpu {

const Kernels& avx512_kernels() {
  static const Kernels kernels = Variant<Avx512>::kernels("avx512");
  return kernels;
}

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = Variant<Avx512, true>::kernels("avx512_bf16");
  return kernels;
}

}  // namespace jax_gluon::cpu
