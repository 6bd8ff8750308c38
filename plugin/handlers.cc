#include "handlers.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "decoder.h"
#include "device.h"
#include "metal/metal.h"
#include "xla/ffi/api/ffi.h"
#include "xla_parallel.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

const std::vector<ffi::DataType> kFloats = {ffi::DataType::F32, ffi::DataType::BF16,
                                            ffi::DataType::F16};
constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 4;

// Where a call is to run, as its attribute `device` says.
enum class Wanted : int64_t { kCpu = 0, kMetal = 1, kEither = 2 };

Wanted decode_device(Decoder& decoder) {
  return static_cast<Wanted>(decoder.integer("device", 0, 2));
}

// Runs `run` on the device that is wanted; `products` are the call's multiply-accumulates, and
// `widest` its longest row.
template <class Run>
Status run_on(Wanted wanted, int64_t products, int64_t widest, Run run) {
  if (wanted == Wanted::kCpu || (wanted == Wanted::kEither && !prefers_metal(products, widest))) {
    return run(cpu_device());
  }
  std::string why;
  if (Device* device = metal_device(&why)) return run(*device);
  if (wanted == Wanted::kEither) return run(cpu_device());
  return "there is no Metal device: " + why;
}

int64_t products_of(const AttentionCall& call) {
  return call.B * call.N * call.T * call.S * (call.H + call.V);
}

// How an operand's rows are stored, as the attributes say: codes are followed by their scale, and
// by an offset and a mean where they have them.
struct Format {
  int64_t bits = 0, token_block = 0, head_block = 0, offset = 0;
  bool has_mean = false;

  size_t operands() const {
    return bits == 0 ? 1 : size_t{2} + (offset != 0 ? 1 : 0) + (has_mean ? 1 : 0);
  }
  // The shape of the elements that stand in a buffer of `shape`.
  Shape elements(Shape shape) const {
    if (bits == 4) shape.back() *= 2;
    return shape;
  }
};

Format decode_format(Decoder& decoder, const std::string& name) {
  Format format;
  format.bits = decoder.integer(name + "_bits", 0, 8);
  if (format.bits != 0 && format.bits != 4 && format.bits != 8) {
    decoder.fail("attribute " + name + "_bits is " + std::to_string(format.bits) +
                 ", expected 0, 4 or 8");
    format.bits = 0;
  }
  format.token_block = decoder.integer(name + "_token_block", 0, kMost);
  format.head_block = decoder.integer(name + "_head_block", 0, kMost);
  format.offset = decoder.integer(name + "_offset", 0, 2);
  format.has_mean = decoder.flag(name + "_has_mean");
  return format;
}

int64_t blocks(int64_t extent, int64_t size) {
  return size == 0 ? 1 : extent / size + (extent % size != 0 ? 1 : 0);
}

// Rows of `shape` [batch, tokens, heads, columns].
QuantizableOperand decode_rows(Decoder& decoder, const std::string& name, const Format& format,
                               const Shape& shape) {
  using Offset = Quantization::Offset;
  QuantizableOperand x;
  if (format.bits == 0) {
    static_cast<Operand&>(x) = decoder.float_operand(name, shape);
    return x;
  }
  const bool packed = format.bits == 4;
  Shape stored = shape;
  if (packed) stored.back() /= 2;
  static_cast<Operand&>(x) =
      decoder.operand_of(name, stored, {packed ? ffi::DataType::U8 : ffi::DataType::S8});
  Quantization& q = x.quantization;
  q.bits = format.bits;
  q.token_block = format.token_block;
  // One group a row is one scale a row.
  q.head_block = format.head_block >= shape[3] && shape[3] > 1 ? 0 : format.head_block;
  q.offset_kind = static_cast<Offset>(format.offset);
  const std::vector<ffi::DataType> floats = {ffi::DataType::F32, ffi::DataType::BF16};
  const Shape blocked = {shape[0], blocks(shape[1], q.token_block), shape[2],
                         blocks(shape[3], q.head_block)};
  q.scale = decoder.operand_of(name + "_scale", blocked, floats, true);
  if (q.offset_kind == Offset::kZeroPoint) {
    q.offset = decoder.operand_of(name + "_zero_point", blocked, {ffi::DataType::S8}, true);
  } else if (q.offset_kind == Offset::kMinimum) {
    q.offset = decoder.operand_of(name + "_minimum", blocked, floats, true);
  }
  if (format.has_mean) {
    q.mean =
        decoder.operand_of(name + "_mean", {shape[0], 1, shape[2], shape[3]}, {ffi::DataType::F32});
  }
  // Kernels read a scale for each element of a row as a contiguous run.
  const bool is_short = q.scale.stride[2] == 0 || (q.offset && q.offset.stride[2] == 0);
  if (!decoder.failed() && q.head_block != 0 && blocked[3] > 1 && is_short) {
    decoder.fail("operand " + name + "_scale has one scale a row, expected " +
                 std::to_string(blocked[3]));
  }
  return x;
}

// The operands that every attention call starts with; returns the length of its real batch axis.
int64_t decode_call(Decoder& decoder, AttentionCall& call, bool* has_d_log_sum_exp,
                    Shape* bias_shape) {
  call.scale = decoder.finite("scale");
  call.soft_cap = decoder.finite("soft_cap");
  if (call.soft_cap < 0.0f) {
    decoder.fail("attribute soft_cap is " + std::to_string(call.soft_cap) +
                 ", expected 0 (none) or more");
  }
  call.causal = decoder.flag("causal");
  call.window_left = decoder.integer("window_left", -1, kMost);
  call.window_right = decoder.integer("window_right", -1, kMost);
  const bool has_bias = decoder.flag("has_bias");
  const bool has_mask = decoder.flag("has_mask");
  const bool has_query_seq_lengths = decoder.flag("has_query_seq_lengths");
  const bool has_key_value_seq_lengths = decoder.flag("has_key_value_seq_lengths");
  const Format formats[] = {decode_format(decoder, "query"), decode_format(decoder, "key"),
                            decode_format(decoder, "value")};
  if (has_d_log_sum_exp) *has_d_log_sum_exp = decoder.flag("has_d_log_sum_exp");

  decoder.set_leading(4);
  if (bias_shape && !has_bias) decoder.fail("attribute has_bias is 0, expected 1");
  const size_t key_at = formats[0].operands(), value_at = key_at + formats[1].operands();
  const Shape query = formats[0].elements(decoder.peek_shape(0, "query", 4));
  const Shape key = formats[1].elements(decoder.peek_shape(key_at, "key", 4));
  const Shape value = formats[2].elements(decoder.peek_shape(value_at, "value", 4));
  if (decoder.failed()) return 0;
  const int64_t batch = query[0];
  call.B = decoder.flat_batch(batch);
  call.T = query[1];
  call.N = query[2];
  call.H = query[3];
  call.S = key[1];
  call.K = key[2];
  call.V = value[3];
  if (call.H < 1 || call.V < 1) {
    decoder.fail("query has shape " + to_string(query) + " and value " + to_string(value) +
                 ", expected head dims of at least 1");
    return 0;
  }
  if (call.K == 0 ? call.N != 0 : call.N % call.K != 0) {
    decoder.fail("query has " + std::to_string(call.N) + " heads, expected a multiple of key's " +
                 std::to_string(call.K));
    return 0;
  }
  const Shape key_shape = {batch, call.S, call.K, call.H};
  const Shape value_shape = {batch, call.S, call.K, call.V};
  call.query = decode_rows(decoder, "query", formats[0], query);
  call.key = decode_rows(decoder, "key", formats[1], key_shape);
  call.value = decode_rows(decoder, "value", formats[2], value_shape);
  const Shape logits = {batch, call.N, call.T, call.S};
  if (has_bias) call.bias = decoder.float_operand("bias", logits, true, bias_shape);
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  if (has_mask) {
    call.mask = static_cast<const uint8_t*>(decoder.operand(
        "mask", logits, true, {ffi::DataType::PRED}, &dtype, &call.mask_batch_offset, &strides));
    std::copy(strides.begin(), strides.begin() + 3, call.mask_stride);
  }
  const std::vector<ffi::DataType> ints = {ffi::DataType::S32};
  if (has_query_seq_lengths) {
    call.query_seq_lengths = static_cast<const int32_t*>(
        decoder.operand("query_seq_lengths", {batch}, false, ints, &dtype,
                        &call.query_seq_lengths_offset, &strides));
  }
  if (has_key_value_seq_lengths) {
    call.key_value_seq_lengths = static_cast<const int32_t*>(
        decoder.operand("key_value_seq_lengths", {batch}, false, ints, &dtype,
                        &call.key_value_seq_lengths_offset, &strides));
  }
  return batch;
}

// What a backward call reads besides: the forward call's results and the cotangents.
template <class Call>
void decode_cotangents(Decoder& decoder, Call& call, int64_t batch, bool has_d_log_sum_exp) {
  const Shape rows = {batch, call.T, call.N};
  const Shape out = {batch, call.T, call.N, call.V};
  call.out = decoder.float_operand("out", out);
  call.row_maximum = decoder.operand_of("row_maximum", rows, {ffi::DataType::F32});
  call.log2_sum = decoder.operand_of("log2_sum", rows, {ffi::DataType::F32});
  call.d_out = decoder.float_operand("d_out", out);
  if (has_d_log_sum_exp) {
    call.d_log_sum_exp = decoder.operand_of("d_log_sum_exp", rows, {ffi::DataType::F32});
  }
}

void zero(const Result& result, int64_t count) {
  std::memset(result.data, 0, static_cast<size_t>(count) * size_of(result.dtype));
}

// Runs a decoded call: what was wrong with it, or what went wrong in it, becomes the error.
template <class Run>
ffi::Error finish(Decoder& decoder, const std::string& target, Run run) {
  decoder.finish();
  if (decoder.failed()) return ffi::Error::InvalidArgument(decoder.error());
  if (Status status = run()) return ffi::Error(ffi::ErrorCode::kInternal, target + ": " + *status);
  return ffi::Error::Success();
}

// Calls `handle`, which may throw: memory may run out anywhere.
template <class Handle>
ffi::Error guarded(const char* target, Handle handle) {
  try {
    return handle();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      std::string(target) + ": out of memory for scratch");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(target) + ": " + error.what());
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(target) + ": unknown exception");
  }
}

ffi::Error attention_forward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                             ffi::RemainingRets results, ffi::Dictionary attributes) {
  const char* target = "jax_gluon.attention_forward";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    AttentionForwardCall call;
    const Wanted wanted = decode_device(decoder);
    const int64_t batch = decode_call(decoder, call, nullptr, nullptr);
    call.out = decoder.result("out", {batch, call.T, call.N, call.V}, kFloats);
    const Shape rows = {batch, call.T, call.N};
    call.row_maximum = decoder.result("row_maximum", rows, {ffi::DataType::F32});
    call.log2_sum = decoder.result("log2_sum", rows, {ffi::DataType::F32});
    return finish(decoder, target, [&]() -> Status {
      if (call.B * call.T * call.N == 0) return {};
      XlaParallel parallel(pool);
      return run_on(wanted, products_of(call), std::max(call.H, call.V),
                    [&](Device& device) { return device.forward(call, parallel); });
    });
  });
}

ffi::Error attention_backward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                              ffi::RemainingRets results, ffi::Dictionary attributes) {
  const char* target = "jax_gluon.attention_backward";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    AttentionBackwardCall call;
    const Wanted wanted = decode_device(decoder);
    bool has_d_log_sum_exp = false;
    const int64_t batch = decode_call(decoder, call, &has_d_log_sum_exp, nullptr);
    decode_cotangents(decoder, call, batch, has_d_log_sum_exp);
    call.d_query = decoder.result("d_query", {batch, call.T, call.N, call.H}, kFloats);
    call.d_key = decoder.result("d_key", {batch, call.S, call.K, call.H}, kFloats);
    call.d_value = decoder.result("d_value", {batch, call.S, call.K, call.V}, kFloats);
    return finish(decoder, target, [&]() -> Status {
      if (call.B * call.T * call.N * call.S == 0) {
        zero(call.d_query, call.B * call.T * call.N * call.H);
        zero(call.d_key, call.B * call.S * call.K * call.H);
        zero(call.d_value, call.B * call.S * call.K * call.V);
        return {};
      }
      XlaParallel parallel(pool);
      return run_on(wanted, products_of(call), std::max(call.H, call.V),
                    [&](Device& device) { return device.backward(call, parallel); });
    });
  });
}

ffi::Error attention_backward_bias(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                   ffi::RemainingRets results, ffi::Dictionary attributes) {
  const char* target = "jax_gluon.attention_backward_bias";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    AttentionBackwardBiasCall call;
    const Wanted wanted = decode_device(decoder);
    bool has_d_log_sum_exp = false;
    Shape bias(4, 1);
    const int64_t batch = decode_call(decoder, call, &has_d_log_sum_exp, &bias);
    decode_cotangents(decoder, call, batch, has_d_log_sum_exp);
    call.d_bias = decoder.result("d_bias", bias, kFloats);
    call.L = decoder.leading_count();
    call.b = bias[0];
    call.n = bias[1];
    call.t = bias[2];
    call.s = bias[3];
    return finish(decoder, target, [&]() -> Status {
      if (call.B * call.T * call.N * call.S == 0) {
        zero(call.d_bias, call.L * call.b * call.n * call.t * call.s);
        return {};
      }
      XlaParallel parallel(pool);
      return run_on(wanted, products_of(call), std::max(call.H, call.V),
                    [&](Device& device) { return device.backward_bias(call, parallel); });
    });
  });
}

ffi::Error quantize(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                    ffi::Dictionary attributes) {
  const char* target = "jax_gluon.quantize";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    QuantizeCall call;
    const Wanted wanted = decode_device(decoder);
    call.bits = decoder.integer("bits", 4, 8);
    if (call.bits != 4 && call.bits != 8) {
      decoder.fail("attribute bits is " + std::to_string(call.bits) + ", expected 4 or 8");
    }
    call.symmetric = decoder.flag("symmetric");
    call.float_minimum = decoder.flag("float_minimum");
    if (call.symmetric && call.float_minimum) {
      decoder.fail("attribute float_minimum is 1, expected 0 where symmetric is 1");
    }
    call.token_block = decoder.integer("token_block", 0, kMost);
    call.head_block = decoder.integer("head_block", 0, kMost);
    call.per_tensor = decoder.flag("per_tensor");
    if (call.per_tensor && (call.token_block != 0 || call.head_block != 0)) {
      decoder.fail("attribute per_tensor is 1, expected 0 where blocks are not whole axes");
    }
    call.center = decoder.flag("center");
    call.rotate = decoder.flag("rotate");
    const bool has_lengths = decoder.flag("has_lengths");
    decoder.set_leading(4);
    const Shape shape = decoder.peek_shape(0, "x", 4);
    call.L = decoder.leading_count();
    call.B = decoder.flat_batch(shape[0]);
    call.S = shape[1];
    call.K = shape[2];
    call.H = shape[3];
    if (call.H < 1 || (call.bits == 4 && call.H % 2 != 0)) {
      decoder.fail("x has shape " + to_string(shape) +
                   ", expected a head dim of at least 1, even " + "for 4 bits");
    }
    call.x = decoder.float_operand("x", shape);
    if (has_lengths) {
      ffi::DataType dtype;
      std::vector<int64_t> strides;
      call.lengths = static_cast<const int32_t*>(decoder.operand("lengths", {shape[0]}, false,
                                                                 {ffi::DataType::S32}, &dtype,
                                                                 &call.lengths_offset, &strides));
    }
    Shape stored = shape;
    if (call.bits == 4) stored.back() /= 2;
    call.data =
        decoder.result("data", stored, {call.bits == 4 ? ffi::DataType::U8 : ffi::DataType::S8});
    const std::vector<ffi::DataType> floats = {ffi::DataType::F32, ffi::DataType::BF16};
    const Shape scale = {shape[0], blocks(call.S, call.token_block), call.per_tensor ? 1 : call.K,
                         blocks(call.H, call.head_block)};
    call.scale = decoder.result("scale", scale, floats);
    if (call.float_minimum) {
      call.offset = decoder.result("minimum", scale, floats);
    } else if (!call.symmetric) {
      call.offset = decoder.result("zero_point", scale, {ffi::DataType::S8});
    }
    if (call.center) {
      call.mean = decoder.result("mean", {shape[0], 1, call.K, call.H}, {ffi::DataType::F32});
    }
    return finish(decoder, target, [&]() -> Status {
      XlaParallel parallel(pool);
      // Without products: where either will do, the CPU is as near to the memory.
      return run_on(wanted, 0, call.H,
                    [&](Device& device) { return device.quantize(call, parallel); });
    });
  });
}

}  // namespace
}  // namespace jax_gluon

#define JAX_GLUON_BINDING \
  xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs()

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionForward, jax_gluon::attention_forward,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionBackward, jax_gluon::attention_backward,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonAttentionBackwardBias, jax_gluon::attention_backward_bias,
                              JAX_GLUON_BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxGluonQuantize, jax_gluon::quantize, JAX_GLUON_BINDING);
