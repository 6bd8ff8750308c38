// Attention on an Apple GPU, or on the software device.
#import <Foundation/Foundation.h>

#include <algorithm>
#include <utility>

#include "metal/attention_encoder.h"
#include "metal/commands.h"
#include "metal/context.h"
#include "metal/metal.h"
#include "metal/quantize_encoder.h"
#include "metal/shader_sources.h"
#include "numerics.h"

#if defined(JAX_GLUON_SOFTWARE_METAL)
#include "softmetal/softmetal.h"
#endif

namespace jax_gluon {
namespace metal {
namespace {

// Rows of queries that share a kv head, below which the keys are split instead of the queries.
constexpr int64_t kDecodeRows = 16;
constexpr int64_t kDecodeKeys = 256;
constexpr int64_t kMaxSplits = 16;
constexpr const char* kForwardStem = "attention_forward";
constexpr const char* kDecodeStem = "attention_decode";
constexpr const char* kNoPages = "Metal has no kernels for keys and values in pages";
constexpr const char* kNoParts = "Metal has no backward pass over a part of the keys";

MTLSize grid(int64_t x, int64_t y, int64_t z) {
  return MTLSizeMake(static_cast<NSUInteger>(x), static_cast<NSUInteger>(y),
                     static_cast<NSUInteger>(z));
}

const char* arithmetic(DType matrices) {
  return matrices == DType::kF16 ? "float16" : matrices == DType::kBF16 ? "bfloat16" : "float32";
}

// Rows of queries that share a kv head.
int64_t rows_of(const AttentionCall& call) {
  return call.T * call.N / std::max<int64_t>(call.K, 1);
}

void add_pipelines(const char* arithmetic, KernelOffers& offers) {
  offers.add({Kernel::kBaseline, arithmetic, {}, {}, {}, {}});
  offers.add({Kernel::kGluon, arithmetic, {}, {}, {}, {}});
}

class MetalDevice : public Device {
 public:
  explicit MetalDevice(Context& context) : context_(context) {}

  KernelOffers offers(const AttentionForwardCall& call) const override {
    KernelOffers offers;
    if (has(call, Kernel::kDecode)) {
      offers.add({Kernel::kDecode,
                  arithmetic(forward_matrices(context_, call, kDecodeStem)),
                  {0, kDecodeRows, kDecodeKeys, 0},
                  {},
                  {},
                  {}});
    }
    add_pipelines(arithmetic(forward_matrices(context_, call, kForwardStem)), offers);
    return offers;
  }
  KernelOffers offers(const AttentionBackwardCall& call) const override {
    KernelOffers offers;
    add_pipelines(arithmetic(backward_matrices(call)), offers);
    return offers;
  }
  KernelOffers offers(const AttentionBackwardBiasCall&) const override { return one_kernel(); }
  KernelOffers offers(const AttentionTangentCall&) const { return one_kernel(); }

  Status forward(const AttentionForwardCall& call, Parallel&, KernelRun& ran) override {
    if (call.page_tokens != 0) return kNoPages;
    return run_pass(call, ran, [&](Buffers& buffers, Commands& commands) {
      for (const QuantizeCall& each : call.quantize) {
        QuantizeEncoder(context_, buffers, each).dispatch(commands);
      }
      AttentionEncoder encoder(context_, buffers, call);
      encoder.bind_results(call);
      if (call.metal_kernel == Kernel::kDecode) {
        const int64_t rows = rows_of(call);
        const int64_t splits = std::min(ceil_div(call.S, kDecodeKeys), kMaxSplits);
        const std::string stem = kDecodeStem;
        encoder.bind_decode(splits);
        const DType matrices = forward_matrices(context_, call, stem);
        encoder.dispatch(commands, stem, stem + "_" + encoder.suffix(matrices),
                         grid(splits * ceil_div(rows, 8), call.K, call.B), 1);
        encoder.dispatch(commands, stem, stem + "_combine", grid(rows, call.K, call.B), 0);
        return matrices;
      }
      const std::string stem = kForwardStem;
      const DType matrices = forward_matrices(context_, call, stem);
      encoder.dispatch(commands, stem, stem + infix(call) + encoder.suffix(matrices),
                       grid(ceil_div(call.T, kBlockRows), call.N, call.B), 1);
      return matrices;
    });
  }

  Status backward(const AttentionBackwardCall& call, Parallel&, KernelRun& ran) override {
    if (call.is_partial) return kNoParts;
    return run_pass(call, ran, [&](Buffers& buffers, Commands& commands) {
      AttentionEncoder encoder(context_, buffers, call);
      encoder.bind_cotangents(call);
      encoder.bind_gradients(call);
      const std::string suffix = infix(call) + encoder.suffix(backward_matrices(call));
      const std::string first = "attention_backward_query";
      encoder.dispatch(commands, first, first + suffix,
                       grid(ceil_div(call.T, kBlockRows), call.N, call.B), 2);
      const std::string second = "attention_backward_key_value";
      encoder.dispatch(commands, second, second + suffix,
                       grid(ceil_div(call.S, kBlockRows), call.K, call.B), 2);
      return backward_matrices(call);
    });
  }

  Status backward_bias(const AttentionBackwardBiasCall& call, Parallel&, KernelRun& ran) override {
    if (call.is_partial) return kNoParts;
    return run_pass(call, ran, [&](Buffers& buffers, Commands& commands) {
      AttentionEncoder encoder(context_, buffers, call);
      encoder.bind_cotangents(call);
      const std::string stem = "attention_backward_bias";
      const std::string name = stem + "_" + encoder.suffix(DType::kF32);
      // As refines_delta of shaders/backward_rows.h.
      if (!has_only(call, DType::kF32)) {
        encoder.bind_bias_statistics();
        encoder.dispatch(commands, stem, name,
                         grid(ceil_div(call.T, kBlockRows), 1, call.B * call.N), 1);
      }
      encoder.bind_bias_gradient(call);
      const int64_t key_block = kTileBytes / (4 * encoder.head_dim());
      encoder.dispatch(
          commands, stem, name,
          grid(ceil_div(call.t, kBlockRows), ceil_div(call.s, key_block), call.L * call.b * call.n),
          1);
      return DType::kF32;
    });
  }

  Status tangent(const AttentionTangentCall& call, Parallel&, KernelRun& ran) override {
    return run_pass(call, ran, [&](Buffers& buffers, Commands& commands) {
      AttentionEncoder encoder(context_, buffers, call);
      encoder.bind_results(call);
      encoder.bind_tangents(call);
      const std::string stem = "attention_tangent";
      encoder.dispatch(commands, stem, stem + "_" + encoder.suffix(DType::kF32),
                       grid(ceil_div(call.T, kBlockRows), call.N, call.B), 3);
      return DType::kF32;
    });
  }

  Status quantize(const QuantizeCall& call, Parallel&) override {
    return run([&](Buffers& buffers, Commands& commands) {
      QuantizeEncoder(context_, buffers, call).dispatch(commands);
    });
  }

 private:
  static bool has(const AttentionForwardCall& call, Kernel kernel) {
    if (kernel == Kernel::kDecode) {
      return rows_of(call) <= kDecodeRows && call.S >= kDecodeKeys && !call.dropout;
    }
    return kernel == Kernel::kBaseline || kernel == Kernel::kGluon;
  }
  static bool has(const AttentionBackwardCall&, Kernel kernel) {
    return kernel == Kernel::kBaseline || kernel == Kernel::kGluon;
  }
  static bool has(const AttentionBackwardBiasCall&, Kernel kernel) {
    return kernel == Kernel::kBaseline;
  }
  static bool has(const AttentionTangentCall&, Kernel kernel) {
    return kernel == Kernel::kBaseline;
  }
  // Of a pass that has no other.
  static KernelOffers one_kernel() {
    KernelOffers offers;
    offers.add({Kernel::kBaseline, "float32", {}, {}, {}, {}});
    return offers;
  }

  // Between a kernel's stem and its suffix.
  static const char* infix(const AttentionCall& call) {
    return call.metal_kernel == Kernel::kGluon ? "_gluon_" : "_";
  }

  // As run, where there is the call's kernel for it. `encode` returns what its matrices are of.
  template <class Call, class Encode>
  Status run_pass(const Call& call, KernelRun& ran, Encode encode) {
    if (!has(call, call.metal_kernel)) return check("Metal", {call.metal_kernel}, offers(call));
    ran.device = "metal";
    ran.kernel = call.metal_kernel;
    return run([&](Buffers& buffers, Commands& commands) {
      ran.arithmetic = arithmetic(encode(buffers, commands));
      ran.variant = commands.names();
    });
  }

  // What `encode` puts into command buffers, to its end.
  template <class Encode>
  Status run(Encode encode) {
    @autoreleasepool {
      try {
        Buffers buffers(context_);
        Commands commands(context_);
        encode(buffers, commands);
        commands.run();
        buffers.copy_back();
        return {};
      } catch (const Error& error) {
        return std::string("Metal: ") + error.what();
      }
    }
  }

  Context& context_;
};

// The one context; null until there is a device.
Context* the_context = nullptr;

int64_t pin(const void* address, size_t bytes, std::string* why) {
  @autoreleasepool {
    try {
      return the_context->pins().pin(address, bytes);
    } catch (const Error& error) {
      *why = error.what();
      return 0;
    }
  }
}
void unpin(int64_t number) {
  @autoreleasepool {
    the_context->pins().unpin(number);
  }
}
int64_t pin_uses(int64_t number) { return the_context->pins().uses(number); }

std::string family_of(id<MTLDevice> device) {
  const std::pair<MTLGPUFamily, const char*> families[] = {
      {MTLGPUFamilyApple9, "Apple9"},
      {MTLGPUFamilyApple8, "Apple8"},
      {MTLGPUFamilyApple7, "Apple7"},
  };
  for (const auto& [family, name] : families) {
    if ([device supportsFamily:family]) return name;
  }
  return "none";
}

struct Made {
  JaxGluonMetal metal = {};
  std::string why, name, family;
};

Made make() {
  Made made;
  @autoreleasepool {
    try {
      Context& context = *new Context;
      the_context = &context;
      made.metal.device = new MetalDevice(context);
      made.metal.pin = pin;
      made.metal.unpin = unpin;
      made.metal.pin_uses = pin_uses;
      made.name = context.device().name.UTF8String;
      made.family = family_of(context.device());
      made.metal.shaders = kShaderSourcesDigest;
#if defined(JAX_GLUON_SOFTWARE_METAL)
      made.metal.counters_json = softmetal_counters_json;
      made.metal.counters_reset = softmetal_counters_reset;
#endif
    } catch (const Error& error) {
      made.why = error.what();
    }
  }
  return made;
}

}  // namespace
}  // namespace metal
}  // namespace jax_gluon

#if defined(JAX_GLUON_METAL_INTERFACE)
extern "C" __attribute__((visibility("default"))) const char* jax_gluon_metal_interface() {
  return JAX_GLUON_METAL_INTERFACE;
}
#endif

extern "C" __attribute__((visibility("default"))) const JaxGluonMetal* jax_gluon_metal() {
  // Made anew until there is a device.
  static std::mutex& mutex = *new std::mutex;
  static jax_gluon::metal::Made& kept = *new jax_gluon::metal::Made;
  const std::lock_guard lock(mutex);
  if (!kept.metal.device) kept = jax_gluon::metal::make();
  kept.metal.why = kept.why.c_str();
  kept.metal.name = kept.name.c_str();
  kept.metal.family = kept.family.c_str();
  return &kept.metal;
}
