// The kernels of one instruction-set variant, and the variants there are. Each is a file of its
// own, compiled for its instruction set only: <name>.cc.
#pragma once

#include "device.h"

namespace jax_gluon::cpu {

struct Kernels {
  const char* isa;
  Status (*forward)(const AttentionForwardCall&, Parallel&, KernelRun&);
  Status (*backward)(const AttentionBackwardCall&, Parallel&, KernelRun&);
  Status (*backward_bias)(const AttentionBackwardBiasCall&, Parallel&, KernelRun&);
  Status (*tangent)(const AttentionTangentCall&, Parallel&, KernelRun&);
  Status (*quantize)(const QuantizeCall&, Parallel&);
  KernelOffers (*forward_offers)(const AttentionForwardCall&);
  KernelOffers (*backward_offers)(const AttentionBackwardCall&);
  KernelOffers (*backward_bias_offers)(const AttentionBackwardBiasCall&);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
const Kernels& neon_kernels();
const Kernels& neon_dotprod_kernels();
const Kernels& neon_i8mm_bf16_kernels();
// Whether dot products of bfloat16 do more in a second than multiplications of float32: measured,
// once. On some processors they take four times as long.
bool avx512_bf16_is_fast();
// The AVX-512 and AMX kernels on emulated intrinsics: slow, for tests on processors without them.
const Kernels& emulated_avx512_kernels();
const Kernels& emulated_amx_kernels();

}  // namespace jax_gluon::cpu
