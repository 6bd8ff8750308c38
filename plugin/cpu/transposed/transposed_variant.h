// A variant whose forward pass, and the baseline of whose backward pass, run on matrix tiles where
// they take the call; all else is that of another variant.
#pragma once

#include "cpu/kernels.h"
#include "cpu/transposed/attention_backward_transposed.h"
#include "cpu/transposed/attention_forward_transposed.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, const Kernels& (*kOthers)()>
struct TransposedVariant {
  using Int8 = TransposedInt8Core<Isa>;
  using Bf16 = TransposedBf16Core<Isa>;
  template <class Core>
  using Baseline = AttentionForwardTransposed<Core, Kernel::kBaseline>;
  template <class Core>
  using Gluon = AttentionForwardTransposed<Core, Kernel::kGluon>;

  template <class Core, bool kCodes>
  using BackwardOf = AttentionBackwardTransposed<Core, kCodes>;

  static bool takes(const AttentionForwardCall& call) {
    return Baseline<Int8>::takes(call) || Baseline<Bf16>::takes(call);
  }
  static bool is_pipeline(Kernel kernel) {
    return kernel == Kernel::kBaseline || kernel == Kernel::kGluon;
  }

  static KernelOffers forward_offers(const AttentionForwardCall& call) {
    KernelOffers offers = kOthers().forward_offers(call);
    if (!takes(call)) return offers;
    for (size_t i = 0; i < offers.size; ++i) {
      KernelOffer& offer = offers.data[i];
      if (!is_pipeline(offer.kernel)) continue;
      const Kernel kernel = offer.kernel;
      offer =
          Baseline<Int8>::takes(call) ? Baseline<Int8>::offer(call) : Baseline<Bf16>::offer(call);
      offer.kernel = kernel;
    }
    return offers;
  }
  static Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    const Kernel kernel = call.cpu_kernel.kernel;
    if (!takes(call) || !is_pipeline(kernel)) return kOthers().forward(call, parallel, run);
    Status wrong = check("the CPU", call.cpu_kernel, forward_offers(call));
    if (wrong) return wrong;
    run.kernel = kernel;
    if (Baseline<Int8>::takes(call)) {
      run_core<Int8>(call, parallel, run);
    } else {
      run_core<Bf16>(call, parallel, run);
    }
    return wrong;
  }
  template <class Core>
  static void run_core(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    run.arithmetic = name_of(Core::kArithmetic);
    run.block_k = Baseline<Core>::block_keys(call);
    if (run.kernel == Kernel::kGluon) {
      Gluon<Core>(call, parallel).run();
    } else {
      Baseline<Core>(call, parallel).run();
    }
  }

  static KernelOffers backward_offers(const AttentionBackwardCall& call) {
    KernelOffers offers = kOthers().backward_offers(call);
    if (!backward_takes(call)) return offers;
    for (size_t i = 0; i < offers.size; ++i) {
      KernelOffer& offer = offers.data[i];
      if (offer.kernel == Kernel::kBaseline) offer = BackwardOf<Bf16, false>::offer();
    }
    return offers;
  }
  static Status backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    if (call.cpu_kernel.kernel != Kernel::kBaseline || !backward_takes(call)) {
      return kOthers().backward(call, parallel, run);
    }
    Status wrong = check("the CPU", call.cpu_kernel, backward_offers(call));
    if (wrong) return wrong;
    run.kernel = Kernel::kBaseline;
    run.arithmetic = name_of(Arithmetic::kBf16);
    if (BackwardOf<Int8, true>::takes(call)) {
      run_backward<Int8, true>(call, parallel, run);
    } else if (BackwardOf<Bf16, true>::takes(call)) {
      run_backward<Bf16, true>(call, parallel, run);
    } else {
      run_backward<Bf16, false>(call, parallel, run);
    }
    return wrong;
  }
  static bool backward_takes(const AttentionBackwardCall& call) {
    return BackwardOf<Int8, true>::takes(call) || BackwardOf<Bf16, true>::takes(call) ||
           BackwardOf<Bf16, false>::takes(call);
  }
  template <class Core, bool kCodes>
  static void run_backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    BackwardOf<Core, kCodes> backward(call, parallel);
    backward.run();
    backward.describe(run);
  }

  static Kernels kernels(const char* isa) {
    Kernels kernels = kOthers();
    kernels.isa = isa;
    kernels.forward = forward;
    kernels.forward_offers = forward_offers;
    kernels.backward = backward;
    kernels.backward_offers = backward_offers;
    return kernels;
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
