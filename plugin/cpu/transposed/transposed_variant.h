// A variant whose forward pass runs on matrix tiles where they take the call; all else, and all
// other passes, are those of another variant.
#pragma once

#include "cpu/kernels.h"
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

  static Kernels kernels(const char* isa) {
    Kernels kernels = kOthers();
    kernels.isa = isa;
    kernels.forward = forward;
    kernels.forward_offers = forward_offers;
    return kernels;
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
