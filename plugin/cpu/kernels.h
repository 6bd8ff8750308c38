#pragma once
#include "../device.h"
namespace jax_gluon::cpu {
struct Kernels {
  const char* isa;
  Status (*forward)(const AttentionForwardCall&, Parallel&);
  Status (*backward)(const AttentionBackwardCall&, Parallel&);
  Status (*backward_bias)(const AttentionBackwardBiasCall&, Parallel&);
  Status (*quantize)(const QuantizeCall&, Parallel&);
};
const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
}  // namespace jax_gluon::cpu
