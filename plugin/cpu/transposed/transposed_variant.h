// A variant that has the transposed kernels for the calls that they take; all else is that of
// another variant. On tile registers these are both passes, on vectors forward of INT8 codes and,
// with kBackward, backward.
#pragma once

#include "cpu/kernels.h"
#include "cpu/transposed/attention_backward_transposed.h"
#include "cpu/transposed/attention_forward_codes.h"
#include "cpu/transposed/attention_forward_transposed.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, const Kernels& (*kOthers)(), bool kBackward = true>
struct TransposedVariant {
  using Int8 = TransposedInt8Core<Isa>;
  using Bf16 = TransposedBf16Core<Isa>;
  template <class Core>
  using Baseline = AttentionForwardTransposed<Core, Kernel::kBaseline>;
  template <class Core>
  using Gluon = AttentionForwardTransposed<Core, Kernel::kGluon>;

  template <class Core, bool kCodes, Kernel kKernel = Kernel::kBaseline>
  using Backward = AttentionBackwardTransposed<Core, kCodes, kKernel>;

  using Codes = AttentionForwardCodes<Isa>;

  static bool is_pipeline(Kernel kernel) {
    return kernel == Kernel::kBaseline || kernel == Kernel::kGluon;
  }

  // On vectors, INT8 codes by the gluon pipeline.
  static bool takes(const AttentionForwardCall& call, Kernel kernel) {
    if constexpr (Isa::kHasTiles) {
      return is_pipeline(kernel) && (Baseline<Int8>::takes(call) || Baseline<Bf16>::takes(call));
    } else {
      return kernel == Kernel::kGluon && Codes::takes(call);
    }
  }
  static KernelOffer offer(const AttentionForwardCall& call, Kernel kernel) {
    if constexpr (Isa::kHasTiles) {
      KernelOffer offer =
          Baseline<Int8>::takes(call) ? Baseline<Int8>::offer(call) : Baseline<Bf16>::offer(call);
      offer.kernel = kernel;
      return offer;
    } else {
      return Codes::offer(call);
    }
  }
  static KernelOffers forward_offers(const AttentionForwardCall& call) {
    KernelOffers offers = kOthers().forward_offers(call);
    for (size_t i = 0; i < offers.size; ++i) {
      const Kernel kernel = offers.data[i].kernel;
      if (takes(call, kernel)) offers.data[i] = offer(call, kernel);
      // Of few queries too: a program whose extents are symbolic has the pipeline of any size.
      if (!Isa::kHasTiles && kernel == Kernel::kGluon &&
          CodesEngine<Isa>::takes_with_any_queries(call)) {
        offers.data[i].reason = "it is the faster one for INT8 codes";
      }
    }
    return offers;
  }
  static Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    const Kernel kernel = call.cpu_kernel.kernel;
    if (!takes(call, kernel)) return kOthers().forward(call, parallel, run);
    Status wrong = check("the CPU", call.cpu_kernel, forward_offers(call));
    if (wrong) return wrong;
    run.kernel = kernel;
    if constexpr (!Isa::kHasTiles) {
      run_forward<Codes>(call, parallel, run, Arithmetic::kInt8);
    } else if (Baseline<Int8>::takes(call)) {
      run_core<Int8>(call, parallel, run);
    } else {
      run_core<Bf16>(call, parallel, run);
    }
    return wrong;
  }
  template <class Core>
  static void run_core(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) {
    if (run.kernel == Kernel::kGluon) {
      run_forward<Gluon<Core>>(call, parallel, run, Core::kArithmetic);
    } else {
      run_forward<Baseline<Core>>(call, parallel, run, Core::kArithmetic);
    }
  }
  template <class Forward>
  static void run_forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run,
                          Arithmetic arithmetic) {
    run.arithmetic = name_of(arithmetic);
    run.block_k = Forward::block_keys(call);
    Forward(call, parallel).run();
  }

  static KernelOffers backward_offers(const AttentionBackwardCall& call) {
    KernelOffers offers = kOthers().backward_offers(call);
    if (!backward_takes(call)) return offers;
    for (size_t i = 0; i < offers.size; ++i) {
      KernelOffer& offer = offers.data[i];
      if (offer.kernel == Kernel::kBaseline) offer = Backward<Bf16, false>::offer();
      if (offer.kernel == Kernel::kGluon) offer = Backward<Bf16, false, Kernel::kGluon>::offer();
    }
    return offers;
  }
  static Status backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    const Kernel kernel = call.cpu_kernel.kernel;
    if (!backward_takes(call) || !is_pipeline(kernel)) {
      return kOthers().backward(call, parallel, run);
    }
    Status wrong = check("the CPU", call.cpu_kernel, backward_offers(call));
    if (wrong) return wrong;
    run.kernel = kernel;
    run.arithmetic = name_of(Arithmetic::kBf16);
    if constexpr (Isa::kHasTiles) {
      if (Backward<Int8, true>::takes(call)) {
        run_backward<Int8, true>(call, parallel, run);
        return wrong;
      }
    }
    if (Backward<Bf16, true>::takes(call)) {
      run_backward<Bf16, true>(call, parallel, run);
    } else {
      run_backward<Bf16, false>(call, parallel, run);
    }
    return wrong;
  }
  static bool backward_takes(const AttentionBackwardCall& call) {
    return (Isa::kHasTiles && Backward<Int8, true>::takes(call)) ||
           Backward<Bf16, true>::takes(call) || Backward<Bf16, false>::takes(call);
  }
  template <class Core, bool kCodes>
  static void run_backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) {
    const auto differentiate = [&](auto&& backward) {
      backward.run();
      backward.describe(run);
    };
    if (run.kernel == Kernel::kGluon) {
      differentiate(Backward<Core, kCodes, Kernel::kGluon>(call, parallel));
    } else {
      differentiate(Backward<Core, kCodes>(call, parallel));
    }
  }

  static Kernels kernels(const char* isa) {
    Kernels kernels = kOthers();
    kernels.isa = isa;
    kernels.forward = forward;
    kernels.forward_offers = forward_offers;
    if constexpr (kBackward) {
      kernels.backward = backward;
      kernels.backward_offers = backward_offers;
    }
    return kernels;
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
