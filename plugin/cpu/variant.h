// One instruction-set variant of every kernel, from its SIMD type.
#pragma once

#include "cpu/backward/attention_backward.h"
#include "cpu/backward/attention_backward_bias.h"
#include "cpu/decode/attention_decode.h"
#include "cpu/forward/attention_forward.h"
#include "cpu/forward/attention_forward_gluon.h"
#include "cpu/kernels.h"
#include "cpu/quantize/quantize.h"
#include "cpu/small/small_backward.h"
#include "cpu/small/small_forward.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, bool kBf16Dot = false>
struct Variant {
  template <class Core>
  static void forward_of(const AttentionForwardCall& call, Parallel& parallel) {
    if (call.cpu_kernel.pipeline == Pipeline::kGluon) {
      GluonForward<Core>(call, parallel).run();
    } else {
      AttentionForward<Core>(call, parallel).run();
    }
  }
  static Status forward(const AttentionForwardCall& call, Parallel& parallel) {
    if (SmallHeads<Isa>::takes(call)) {
      SmallForward<Isa>(call, parallel).run();
      return {};
    }
    if (AttentionDecode<Isa>::takes(call)) {
      AttentionDecode<Isa>::run(call, parallel);
      return {};
    }
    if (ForwardBlocks<Int8Core<Isa>>::takes(call)) {
      forward_of<Int8Core<Isa>>(call, parallel);
      return {};
    }
    if constexpr (kBf16Dot) {
      if (ForwardBlocks<Bf16Core<Isa>>::takes(call)) {
        forward_of<Bf16Core<Isa>>(call, parallel);
        return {};
      }
    }
    forward_of<F32Core<Isa>>(call, parallel);
    return {};
  }
  static Status backward(const AttentionBackwardCall& call, Parallel& parallel) {
    if (SmallHeads<Isa>::takes(call)) {
      SmallBackward<Isa>(call, parallel).run();
    } else if (call.cpu_kernel.pipeline == Pipeline::kGluon) {
      AttentionBackward<Isa, Pipeline::kGluon>(call, parallel).run();
    } else {
      AttentionBackward<Isa, Pipeline::kBaseline>(call, parallel).run();
    }
    return {};
  }
  static Status backward_bias(const AttentionBackwardBiasCall& call, Parallel& parallel) {
    AttentionBackwardBias<Isa>(call, parallel).run();
    return {};
  }
  static Status quantize(const QuantizeCall& call, Parallel& parallel) {
    Quantize<Isa>(call, parallel).run();
    return {};
  }
  static Kernels kernels(const char* isa) {
    return {isa, forward, backward, backward_bias, quantize};
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
