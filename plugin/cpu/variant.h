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

namespace jax_gluon::cpu {
namespace {

template <class Isa, bool kBf16Dot = false>
struct Variant {
  // Calls body(core) with the core that multiplies a call's blocks.
  template <class Body>
  static auto with_core(const AttentionForwardCall& call, Body body) {
    if (ForwardBlocks<Int8Core<Isa>>::takes(call)) return body(Int8Core<Isa>());
    if constexpr (kBf16Dot) {
      if (ForwardBlocks<Bf16Core<Isa>>::takes(call)) return body(Bf16Core<Isa>());
    }
    return body(F32Core<Isa>());
  }

  static KernelOffers forward_offers(const AttentionForwardCall& call) {
    KernelOffers offers;
    if (AttentionSmall<Isa>::takes(call)) offers.push_back(AttentionSmall<Isa>::offer());
    if (AttentionDecode<Isa>::takes(call)) offers.push_back(AttentionDecode<Isa>::offer(call));
    with_core(call, [&](auto core) {
      using Blocks = ForwardBlocks<decltype(core)>;
      offers.push_back(Blocks::baseline_offer());
      offers.push_back(Blocks::gluon_offer());
    });
    return offers;
  }
  static Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    const KernelOffers offers = forward_offers(call);
    std::string wrong = check("the CPU", call.cpu_kernel, offers);
    if (!wrong.empty()) return wrong;
    const KernelOffer* offer = find(offers, call.cpu_kernel.kernel);
    run.kernel = offer->kernel;
    run.arithmetic = offer->arithmetic;
    switch (offer->kernel) {
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
    return {};
  }

  static KernelOffers backward_offers(const AttentionBackwardCall& call) {
    KernelOffers offers;
    if (AttentionSmall<Isa>::takes(call)) offers.push_back(AttentionSmall<Isa>::offer());
    offers.push_back(AttentionBackward<Isa, Kernel::kBaseline>::offer(call));
    offers.push_back(AttentionBackward<Isa, Kernel::kGluon>::offer(call));
    return offers;
  }
  static Status backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    const KernelOffers offers = backward_offers(call);
    std::string wrong = check("the CPU", call.cpu_kernel, offers);
    if (!wrong.empty()) return wrong;
    const KernelOffer* offer = find(offers, call.cpu_kernel.kernel);
    run.kernel = offer->kernel;
    run.arithmetic = offer->arithmetic;
    if (offer->kernel == Kernel::kSmall) {
      AttentionSmall<Isa>::run(call, parallel);
    } else if (offer->kernel == Kernel::kGluon) {
      run_backward<Kernel::kGluon>(call, parallel, run);
    } else {
      run_backward<Kernel::kBaseline>(call, parallel, run);
    }
    return {};
  }
  template <Kernel kKernel>
  static void run_backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    AttentionBackward<Isa, kKernel> backward(call, parallel);
    backward.run();
    backward.describe(run);
  }

  static KernelOffers backward_bias_offers(const AttentionBackwardBiasCall&) {
    return {{Kernel::kBaseline, "float32", "", {}, {}, {}}};
  }
  static Status backward_bias(const AttentionBackwardBiasCall& call, Parallel& parallel,
                              KernelRun& run) {
    const KernelOffers offers = backward_bias_offers(call);
    std::string wrong = check("the CPU", call.cpu_kernel, offers);
    if (!wrong.empty()) return wrong;
    run.kernel = offers.front().kernel;
    run.arithmetic = offers.front().arithmetic;
    AttentionBackwardBias<Isa>(call, parallel).run();
    return {};
  }

  static Status quantize(const QuantizeCall& call, Parallel& parallel) {
    Quantize<Isa>(call, parallel).run();
    return {};
  }

  static Kernels kernels(const char* isa) {
    return {isa,      forward,        backward,        backward_bias,
            quantize, forward_offers, backward_offers, backward_bias_offers};
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
