// One instruction-set variant of every kernel, from its SIMD type: what it offers for a call, and
// what it runs. Both go by `takes` of the kernels.
#pragma once

#include "cpu/backward/attention_backward.h"
#include "cpu/backward/attention_backward_bias.h"
#include "cpu/decode/attention_decode.h"
#include "cpu/forward/attention_forward.h"
#include "cpu/forward/attention_forward_gluon.h"
#include "cpu/kernels.h"
#include "cpu/quantize/quantize.h"
#include "cpu/small/attention_small.h"
#include "cpu/tangent/attention_tangent.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, bool kBf16Dot = false, template <class> class CodeCore = Int8Core,
          template <class> class PairCore = Bf16Core>
struct Variant {
  // Calls body(core) with the core that multiplies a call's blocks.
  template <class Body>
  static auto with_core(const AttentionForwardCall& call, Body body) {
    if (ForwardBlocks<CodeCore<Isa>>::takes(call)) return body(CodeCore<Isa>());
    if constexpr (kBf16Dot) {
      if (ForwardBlocks<PairCore<Isa>>::takes(call)) return body(PairCore<Isa>());
    }
    return body(F32Core<Isa>());
  }

  static void describe(const AttentionCall& call, const KernelOffers& offers, KernelRun& run) {
    run.kernel = call.cpu_kernel.kernel;
    for (const KernelOffer& offer : offers) {
      if (offer.kernel == run.kernel) run.arithmetic = offer.arithmetic;
    }
  }

  static KernelOffers forward_offers(const AttentionForwardCall& call) {
    KernelOffers offers;
    if (AttentionSmall<Isa>::takes(call)) offers.add(AttentionSmall<Isa>::offer(call));
    if (AttentionDecode<Isa>::takes(call)) offers.add(AttentionDecode<Isa>::offer(call));
    with_core(call, [&](auto core) {
      using Blocks = ForwardBlocks<decltype(core)>;
      offers.add(Blocks::baseline_offer());
      offers.add(Blocks::gluon_offer());
    });
    return offers;
  }
  static Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    const KernelOffers offers = forward_offers(call);
    Status wrong = check("the CPU", call.cpu_kernel, offers);
    if (wrong) return wrong;
    describe(call, offers, run);
    switch (run.kernel) {
      case Kernel::kSmall:
        AttentionSmall<Isa>::run(call, parallel);
        break;
      case Kernel::kDecode:
        AttentionDecode<Isa>::run(call, parallel);
        break;
      case Kernel::kBaseline:
        with_core(call, [&](auto core) {
          using Core = decltype(core);
          run.block_k = ForwardBlocks<Core>::block_keys(call);
          AttentionForward<Core>(call, parallel).run();
        });
        break;
      case Kernel::kGluon:
        with_core(call, [&](auto core) {
          using Core = decltype(core);
          run.block_k = ForwardBlocks<Core>::ring_keys(call);
          run.subtile = ForwardBlocks<Core>::subtile_keys(call);
          run.stages = call.cpu_kernel.stages;
          AttentionForwardGluon<Core>(call, parallel).run();
        });
        break;
    }
    return wrong;
  }

  static KernelOffers backward_offers(const AttentionBackwardCall& call) {
    KernelOffers offers;
    if (AttentionSmall<Isa>::takes(call)) offers.add(AttentionSmall<Isa>::offer(call));
    offers.add(AttentionBackward<Isa, Kernel::kBaseline>::offer(call));
    offers.add(AttentionBackward<Isa, Kernel::kGluon>::offer(call));
    return offers;
  }
  static Status backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    const KernelOffers offers = backward_offers(call);
    Status wrong = check("the CPU", call.cpu_kernel, offers);
    if (wrong) return wrong;
    describe(call, offers, run);
    if (run.kernel == Kernel::kSmall) {
      AttentionSmall<Isa>::run(call, parallel);
    } else if (run.kernel == Kernel::kGluon) {
      run_backward<Kernel::kGluon>(call, parallel, run);
    } else {
      run_backward<Kernel::kBaseline>(call, parallel, run);
    }
    return wrong;
  }
  template <Kernel kKernel>
  static void run_backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    AttentionBackward<Isa, kKernel> backward(call, parallel);
    backward.run();
    backward.describe(run);
  }

  static KernelOffers backward_bias_offers(const AttentionBackwardBiasCall&) {
    KernelOffers offers;
    offers.add({Kernel::kBaseline, "float32", {}, {}, {}, {}});
    return offers;
  }
  static Status backward_bias(const AttentionBackwardBiasCall& call, Parallel& parallel,
                              KernelRun& run) {
    const KernelOffers offers = backward_bias_offers(call);
    Status wrong = check("the CPU", call.cpu_kernel, offers);
    if (wrong) return wrong;
    describe(call, offers, run);
    AttentionBackwardBias<Isa>(call, parallel).run();
    return wrong;
  }

  static Status tangent(const AttentionTangentCall& call, Parallel& parallel, KernelRun& run) {
    KernelOffers offers;
    offers.add({Kernel::kBaseline, name_of(Arithmetic::kF32), {}, {}, {}, {}});
    Status wrong = check("the CPU", call.cpu_kernel, offers);
    if (wrong) return wrong;
    describe(call, offers, run);
    AttentionTangent<Isa>(call, parallel).run();
    return wrong;
  }

  static Status quantize(const QuantizeCall& call, Parallel& parallel) {
    Quantize<Isa>(call, parallel).run();
    return {};
  }

  static Kernels kernels(const char* isa) {
    return {isa,      forward,        backward,        backward_bias,       tangent,
            quantize, forward_offers, backward_offers, backward_bias_offers};
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
