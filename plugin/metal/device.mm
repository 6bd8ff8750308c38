// Attention on an Apple GPU, or on the software device.
#import <Foundation/Foundation.h>

#include <algorithm>

#include "metal/context.h"
#include "metal/encoder.h"
#include "metal/metal.h"

#if defined(JAX_GLUON_SOFTWARE_METAL)
#include "softmetal/softmetal.h"
#endif

namespace jax_gluon {
namespace metal {
namespace {

constexpr int64_t kBlockRows = 32;
// Multiply-accumulates of a command buffer: longer work is cut along the batch, so that the GPU's
// watchdog does not end it.
constexpr int64_t kWorkOfACommandBuffer = int64_t{1} << 40;
// Rows of queries that share a kv head, below which the keys are split instead of the queries.
constexpr int64_t kDecodeRows = 16;
constexpr int64_t kDecodeKeys = 256;
constexpr int64_t kMaxSplits = 16;

int64_t blocks(int64_t extent, int64_t size) { return (extent + size - 1) / size; }

MTLSize grid(int64_t x, int64_t y, int64_t z) {
  return MTLSizeMake(static_cast<NSUInteger>(x), static_cast<NSUInteger>(y),
                     static_cast<NSUInteger>(z));
}

std::vector<BatchRange> parts_of(const AttentionCall& call, int64_t products) {
  const int64_t work =
      std::max<int64_t>(1, call.N * call.T * call.S * (call.H + call.V) * products);
  const int64_t step = std::max<int64_t>(1, kWorkOfACommandBuffer / work);
  std::vector<BatchRange> parts;
  for (int64_t b = 0; b < call.B; b += step) parts.push_back({b, std::min(b + step, call.B)});
  return parts;
}

class MetalDevice : public Device {
 public:
  explicit MetalDevice(Context& context) : context_(context) {}

  Status forward(const AttentionForwardCall& call, Parallel&) override {
    return guarded([&] {
      for (const BatchRange part : parts_of(call, 1)) {
        Buffers buffers(context_);
        AttentionEncoder encoder(context_, buffers, call, part);
        encoder.bind_results(call);
        id<MTLCommandBuffer> commands = context_.command_buffer();
        const int64_t rows = call.T * call.N / call.K;
        if (rows <= kDecodeRows && call.S >= kDecodeKeys) {
          const int64_t splits = std::min(blocks(call.S, kDecodeKeys), kMaxSplits);
          encoder.bind_decode(splits);
          encoder.dispatch(commands, "attention_decode",
                           "attention_decode_" + encoder.forward_suffix(),
                           grid(splits * blocks(rows, 8), call.K, encoder.entries()));
          encoder.dispatch(commands, "attention_decode", "attention_decode_combine",
                           grid(rows, call.K, encoder.entries()));
        } else {
          encoder.dispatch(commands, "attention_forward",
                           "attention_forward_" + encoder.forward_suffix(),
                           grid(blocks(call.T, kBlockRows), call.N, encoder.entries()));
        }
        context_.run(commands);
        buffers.copy_back();
      }
    });
  }

  Status backward(const AttentionBackwardCall& call, Parallel&) override {
    return guarded([&] {
      for (const BatchRange part : parts_of(call, 4)) {
        Buffers buffers(context_);
        AttentionEncoder encoder(context_, buffers, call, part);
        encoder.bind_cotangents(call);
        encoder.bind_gradients(call);
        id<MTLCommandBuffer> commands = context_.command_buffer();
        encoder.dispatch(commands, "attention_backward_query",
                         "attention_backward_query_" + encoder.backward_suffix(),
                         grid(blocks(call.T, kBlockRows), call.N, encoder.entries()));
        encoder.dispatch(commands, "attention_backward_key_value",
                         "attention_backward_key_value_" + encoder.backward_suffix(),
                         grid(blocks(call.S, kBlockRows), call.K, encoder.entries()));
        context_.run(commands);
        buffers.copy_back();
      }
    });
  }

  // Not cut: its sums go over the batch.
  Status backward_bias(const AttentionBackwardBiasCall& call, Parallel&) override {
    return guarded([&] {
      Buffers buffers(context_);
      AttentionEncoder encoder(context_, buffers, call, {0, call.B});
      encoder.bind_cotangents(call);
      encoder.bind_bias_gradient(call);
      const int64_t key_block = 8192 / (4 * encoder.head_dim());
      id<MTLCommandBuffer> commands = context_.command_buffer();
      encoder.dispatch(
          commands, "attention_backward_bias",
          "attention_backward_bias_float_" + std::to_string(encoder.head_dim()),
          grid(blocks(call.t, kBlockRows), blocks(call.s, key_block), call.L * call.b * call.n));
      context_.run(commands);
      buffers.copy_back();
    });
  }

  Status quantize(const QuantizeCall& call, Parallel&) override {
    return guarded([&] { run_quantize(call); });
  }

 private:
  template <class Run>
  Status guarded(Run run) {
    @autoreleasepool {
      try {
        run();
        return {};
      } catch (const Error& error) {
        return std::string("Metal: ") + error.what();
      }
    }
  }

  void run_quantize(const QuantizeCall& call);

  Context& context_;
};

void MetalDevice::run_quantize(const QuantizeCall& call) {
  if (call.B * call.S * call.K == 0) return;
  constexpr int64_t kChunk = 32;
  QuantizeParameters p = {};
  p.x = {call.x.stride[0], call.x.stride[1]};
  p.B = static_cast<int>(call.B);
  p.S = static_cast<int>(call.S);
  p.K = static_cast<int>(call.K);
  p.H = static_cast<int>(call.H);
  p.batch_per_map = static_cast<int>(call.B / call.L);
  p.x_type = call.x.dtype == DType::kF32 ? kF32 : call.x.dtype == DType::kBF16 ? kBF16 : kF16;
  p.bits = static_cast<int>(call.bits);
  p.is_symmetric = call.symmetric;
  p.has_minimum = call.float_minimum;
  p.token_block = static_cast<int>(call.token_block);
  p.head_block = static_cast<int>(call.head_block);
  p.is_per_tensor = call.per_tensor;
  p.has_mean = call.center;
  p.has_lengths = call.lengths != nullptr;
  p.is_rotated = call.rotate;
  p.is_bfloat16 = call.scale.dtype == DType::kBF16;
  p.chunks = static_cast<int>(blocks(call.S, kChunk));

  std::vector<Int64> tables(static_cast<size_t>(2 * call.B));
  int64_t last = 0, last_length = 0;
  for (int64_t b = 0; b < call.B; ++b) {
    const auto i = static_cast<size_t>(b);
    tables[i] = call.x.batch_offset[i];
    last = std::max(last, call.x.batch_offset[i]);
    if (call.lengths) {
      tables[static_cast<size_t>(call.B + b)] = call.lengths_offset[i];
      last_length = std::max(last_length, call.lengths_offset[i]);
    }
  }
  last += (call.S - 1) * call.x.stride[0] + (call.K - 1) * call.x.stride[1] + call.H;

  Buffers buffers(context_);
  Bindings bindings(context_, buffers, kQuantizeExtremes + 1);
  bindings.read(kQuantizeParameters, &p, sizeof p);
  bindings.read(kQuantizeBatchOffsets, tables.data(), tables.size() * sizeof(Int64));
  bindings.read(kQuantizeInput, call.x.data, static_cast<size_t>(last) * size_of(call.x.dtype));
  if (call.lengths) {
    bindings.read(kQuantizeLengths, call.lengths, static_cast<size_t>(last_length + 1) * 4);
  }
  const int64_t tokens = call.token_block == 0 ? 1 : blocks(call.S, call.token_block);
  const int64_t columns = call.head_block == 0 ? 1 : blocks(call.H, call.head_block);
  const int64_t scales = call.B * tokens * (call.per_tensor ? 1 : call.K) * columns;
  const auto write = [&](int slot, const Result& x, int64_t count) {
    if (x) bindings.write(slot, x.data, static_cast<size_t>(count) * size_of(x.dtype));
  };
  write(kQuantizeData, call.data, call.B * call.S * call.K * call.H / (call.bits == 4 ? 2 : 1));
  write(kQuantizeScale, call.scale, scales);
  write(kQuantizeOffset, call.offset, scales);
  write(kQuantizeMean, call.mean, call.B * call.K * call.H);
  bindings.scratch(kQuantizeExtremes,
                   static_cast<size_t>(call.B * call.K * p.chunks * 2 * call.H) * sizeof(float));

  id<MTLCommandBuffer> commands = context_.command_buffer();
  const auto dispatch = [&](const char* name, MTLSize size) {
    bindings.dispatch(commands, context_.pipeline("quantize", name, {}), size);
  };
  constexpr int64_t kSimdgroups = 4;
  if (call.center) dispatch("quantize_mean", grid(call.K, call.B, 1));
  if (call.token_block != 0) {
    dispatch("quantize_blocks", grid(blocks(tokens, kSimdgroups), call.K, call.B));
  } else {
    dispatch("quantize_extremes", grid(blocks(p.chunks, kSimdgroups), call.K, call.B));
    dispatch("quantize_parameters", grid(call.per_tensor ? 1 : call.K, call.B, 1));
    dispatch("quantize_codes", grid(blocks(call.S, kSimdgroups), call.K, call.B));
  }
  context_.run(commands);
  buffers.copy_back();
}

struct Made {
  JaxGluonMetal metal = {};
  std::string why, name;
};

Made make() {
  Made made;
  @autoreleasepool {
    try {
      Context& context = *new Context;
      made.metal.device = new MetalDevice(context);
      made.name = context.device().name.UTF8String;
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

extern "C" __attribute__((visibility("default"))) const JaxGluonMetal* jax_gluon_metal() {
  // Made anew until there is a device.
  static std::mutex& mutex = *new std::mutex;
  static jax_gluon::metal::Made& kept = *new jax_gluon::metal::Made;
  const std::lock_guard lock(mutex);
  if (!kept.metal.device) kept = jax_gluon::metal::make();
  kept.metal.why = kept.why.c_str();
  kept.metal.name = kept.name.c_str();
  return &kept.metal;
}
