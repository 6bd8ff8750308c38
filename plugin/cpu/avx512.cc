#include "cpu/simd/avx512.h"

#include <x86intrin.h>

#include "cpu/transposed/transposed_variant.h"
#include "cpu/variant.h"

namespace jax_gluon::cpu {
namespace {

// The fewest clock ticks, of several runs, that `step` takes for 12 accumulators and 256 rounds.
template <class Step>
uint64_t fewest_ticks(const Step& step) {
  uint64_t fewest = ~uint64_t{0};
  for (int run = 0; run < 16; ++run) {
    Avx512::F sums[12];
    for (Avx512::F& sum : sums) sum = Avx512::zero();
    const uint64_t start = __rdtsc();
    for (int round = 0; round < 256; ++round) {
      JAX_GLUON_UNROLL
      for (Avx512::F& sum : sums) {
        step(sum);
        // Else the compiler might do several rounds at once.
        __asm__ volatile("" : "+v"(sum));
      }
    }
    const uint64_t ticks = __rdtsc() - start;
    if (ticks < fewest) fewest = ticks;
  }
  return fewest;
}

const Kernels& row_kernels() {
  static const Kernels kernels = Variant<Avx512>::kernels("avx512");
  return kernels;
}

const Kernels& bf16_row_kernels() {
  static const Kernels kernels = Variant<Avx512, true>::kernels("avx512_bf16");
  return kernels;
}

}  // namespace

bool avx512_bf16_is_fast() {
  static const bool is_fast = [] {
    const Avx512::F x = Avx512::zero();
    const Avx512::I pair = Avx512::set1_i32(0);
    const uint64_t floats = fewest_ticks([&](Avx512::F& sum) { sum = Avx512::fma(x, x, sum); });
    const uint64_t pairs =
        fewest_ticks([&](Avx512::F& sum) { sum = Avx512::dot_bf16(sum, pair, pair); });
    // Each dot product is two multiplications.
    return pairs < 2 * floats;
  }();
  return is_fast;
}

const Kernels& avx512_kernels() {
  static const Kernels kernels =
      TransposedVariant<Avx512, row_kernels, /*kBackward=*/false>::kernels("avx512");
  return kernels;
}

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels =
      TransposedVariant<Avx512, bf16_row_kernels>::kernels("avx512_bf16");
  return kernels;
}

}  // namespace jax_gluon::cpu
