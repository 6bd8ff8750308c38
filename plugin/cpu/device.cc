// The CPU device: picks an instruction-set variant of the kernels at run time.
#include "device.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/amx_support.h"
#include "cpu/arm64_support.h"
#include "cpu/kernels.h"
#include "cpu/memory/block_pool.h"

namespace jax_gluon {
namespace cpu {
namespace {

// Variants that are compiled in and that this processor runs, best first.
const std::vector<const Kernels*>& variants() {
  static const std::vector<const Kernels*> supported = [] {
    std::vector<const Kernels*> found;
#if defined(JAX_GLUON_HAVE_AVX512)
    // The builtin also asks whether the operating system saves the registers.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
#if defined(JAX_GLUON_HAVE_AMX)
      if (__builtin_cpu_supports("avx512bf16") && may_use_amx()) found.push_back(&amx_kernels());
#endif
      if (__builtin_cpu_supports("avx512bf16") && avx512_bf16_is_fast()) {
        found.push_back(&avx512_bf16_kernels());
      }
      found.push_back(&avx512_kernels());
    }
#endif
#if defined(JAX_GLUON_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      found.push_back(&avx2_kernels());
    }
#endif
#if defined(JAX_GLUON_HAVE_NEON_I8MM_BF16)
    if (has_i8mm_and_bf16()) found.push_back(&neon_i8mm_bf16_kernels());
#endif
#if defined(JAX_GLUON_HAVE_NEON_DOTPROD)
    if (has_dotprod()) found.push_back(&neon_dotprod_kernels());
#endif
#if defined(JAX_GLUON_HAVE_NEON)
    found.push_back(&neon_kernels());
#endif
    found.push_back(&portable_kernels());
#if defined(JAX_GLUON_HAVE_EMULATED_AVX512)
    found.push_back(&emulated_avx512_kernels());
    found.push_back(&emulated_amx_kernels());
#endif
    return found;
  }();
  return supported;
}

std::string names() {
  std::string text;
  for (const Kernels* kernels : variants()) {
    if (!text.empty()) text += ", ";
    text += kernels->isa;
  }
  return text;
}

// The variant that the environment forces, else the best; null if the forced one can't run.
const Kernels* selected() {
  const char* forced = std::getenv("JAX_GLUON_CPU_ISA");
  if (!forced || !*forced) return variants().front();
  for (const Kernels* candidate : variants()) {
    if (std::strcmp(forced, candidate->isa) == 0) return candidate;
  }
  return nullptr;
}

Status unsupported() {
  const char* forced = std::getenv("JAX_GLUON_CPU_ISA");
  return "JAX_GLUON_CPU_ISA is '" + std::string(forced ? forced : "") +
         "', expected one of those that this build and processor have: " + names();
}

class CpuDevice : public Device {
 public:
  Status forward(const AttentionForwardCall& call, Parallel& parallel, KernelRun& run) override {
    for (const QuantizeCall& each : call.quantize) {
      if (Status status = quantize(each, parallel)) return status;
    }
    return run_sized(&Kernels::forward, &Kernels::forward_offers, call, parallel, run);
  }
  Status backward(const AttentionBackwardCall& call, Parallel& parallel, KernelRun& run) override {
    return run_sized(&Kernels::backward, &Kernels::backward_offers, call, parallel, run);
  }
  Status backward_bias(const AttentionBackwardBiasCall& call, Parallel& parallel,
                       KernelRun& run) override {
    return run_pass(&Kernels::backward_bias, call, parallel, run);
  }
  Status tangent(const AttentionTangentCall& call, Parallel& parallel, KernelRun& run) override {
    return run_pass(&Kernels::tangent, call, parallel, run);
  }
  Status quantize(const QuantizeCall& call, Parallel& parallel) override {
    const Kernels* kernels = selected();
    return kernels ? kernels->quantize(call, parallel) : unsupported();
  }
  KernelOffers offers(const AttentionForwardCall& call) const override {
    const Kernels* kernels = selected();
    return kernels ? kernels->forward_offers(call) : KernelOffers();
  }
  KernelOffers offers(const AttentionBackwardCall& call) const override {
    const Kernels* kernels = selected();
    return kernels ? kernels->backward_offers(call) : KernelOffers();
  }
  KernelOffers offers(const AttentionBackwardBiasCall& call) const override {
    const Kernels* kernels = selected();
    return kernels ? kernels->backward_bias_offers(call) : KernelOffers();
  }

 private:
  template <class Call>
  static Status run_pass(Status (*Kernels::*pass)(const Call&, Parallel&, KernelRun&),
                         const Call& call, Parallel& parallel, KernelRun& run) {
    const Kernels* kernels = selected();
    if (!kernels) return unsupported();
    run.device = "cpu";
    run.variant = kernels->isa;
    return (kernels->*pass)(call, parallel, run);
  }
  // The same of a pass whose kernels have sizes.
  template <class Call>
  static Status run_sized(Status (*Kernels::*pass)(const Call&, Parallel&, KernelRun&),
                          KernelOffers (*Kernels::*offers)(const Call&), const Call& call,
                          Parallel& parallel, KernelRun& run) {
    const Kernels* kernels = selected();
    if (!kernels) return unsupported();
    const KernelChoice sized = with_sizes(call.cpu_kernel, (kernels->*offers)(call));
    if (sized == call.cpu_kernel) return run_pass(pass, call, parallel, run);
    Call sized_call = call;
    sized_call.cpu_kernel = sized;
    return run_pass(pass, sized_call, parallel, run);
  }
};

}  // namespace
}  // namespace cpu

Device& cpu_device() {
  static cpu::CpuDevice device;
  return device;
}

std::string cpu_isa() {
  const cpu::Kernels* kernels = cpu::selected();
  return kernels ? kernels->isa : "unsupported";
}

ScratchState cpu_scratch_state() {
  const cpu::BlockPoolState state = cpu::block_pool_state();
  return {state.kept_bytes, state.made_blocks};
}

std::string cpu_isa_refusal() { return cpu::amx_refusal(); }

std::vector<std::string> cpu_isas_supported() {
  std::vector<std::string> names;
  for (const cpu::Kernels* kernels : cpu::variants()) names.emplace_back(kernels->isa);
  return names;
}

}  // namespace jax_gluon
