#include "handlers.h"

#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "decoder.h"
#include "device.h"
#include "xla/ffi/api/ffi.h"
#include "xla_parallel.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

const std::vector<ffi::DataType> kFloats = {ffi::DataType::F32, ffi::DataType::BF16,
                                            ffi::DataType::F16};
constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 4;

// The operands that every attention call starts with; returns the length of its real batch axis.
int64_t decode_call(Decoder& decoder, AttentionCall& call, bool* has_d_log_sum_exp,
                    Shape* bias_shape) {
  call.scale = decoder.finite("scale");
  call.soft_cap = decoder.finite("soft_cap");
  if (call.soft_cap < 0.0f) decoder.fail("attribute soft_cap is negative");
  call.causal = decoder.flag("causal");
  call.window_left = decoder.integer("window_left", -1, kMost);
  call.window_right = decoder.integer("window_right", -1, kMost);
  const bool has_bias = decoder.flag("has_bias");
  const bool has_mask = decoder.flag("has_mask");
  const bool has_query_seq_lengths = decoder.flag("has_query_seq_lengths");
  const bool has_key_value_seq_lengths = decoder.flag("has_key_value_seq_lengths");
  const bool quantized = decoder.flag("quantized");
  if (has_d_log_sum_exp) *has_d_log_sum_exp = decoder.flag("has_d_log_sum_exp");

  decoder.set_leading(4);
  if (bias_shape && !has_bias) decoder.fail("attribute has_bias is 0, expected 1");
  const Shape query = decoder.peek_shape(0, "query", 4);
  const Shape key = decoder.peek_shape(1, "key", 4);
  const Shape value = decoder.peek_shape(2, "value", 4);
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
  const auto F32 = ffi::DataType::F32;
  if (quantized) {
    call.query = decoder.operand_of("query", query, ffi::DataType::S8);
    call.key = decoder.operand_of("key", key_shape, ffi::DataType::S8);
    call.value = decoder.operand_of("value", value_shape, ffi::DataType::S8);
    call.query_scale = decoder.operand_of("query_scale", {batch, call.T, call.N}, F32);
    call.key_scale = decoder.operand_of("key_scale", {batch, call.S, call.K}, F32);
    call.value_scale = decoder.operand_of("value_scale", {batch, call.S, call.K}, F32);
    Operand mean = decoder.operand_of("key_mean", {batch, 1, call.K, call.H}, F32);
    mean.stride[0] = mean.stride[1];
    mean.stride[1] = mean.stride[2];
    mean.stride[2] = 0;
    call.key_mean = std::move(mean);
  } else {
    call.query = decoder.float_operand("query", query);
    call.key = decoder.float_operand("key", key_shape);
    call.value = decoder.float_operand("value", value_shape);
    if (!decoder.failed() &&
        (call.query.dtype != call.key.dtype || call.query.dtype != call.value.dtype)) {
      decoder.fail("query, key and value have different element types, expected one");
    }
  }
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
  call.log_sum_exp = decoder.operand_of("log_sum_exp", rows, ffi::DataType::F32);
  call.d_out = decoder.float_operand("d_out", out);
  if (has_d_log_sum_exp) {
    call.d_log_sum_exp = decoder.operand_of("d_log_sum_exp", rows, ffi::DataType::F32);
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
    const int64_t batch = decode_call(decoder, call, nullptr, nullptr);
    call.out = decoder.result("out", {batch, call.T, call.N, call.V}, kFloats);
    call.log_sum_exp = decoder.result("log_sum_exp", {batch, call.T, call.N}, {ffi::DataType::F32});
    return finish(decoder, target, [&]() -> Status {
      if (call.B * call.T * call.N == 0) return {};
      XlaParallel parallel(pool);
      return cpu_device().forward(call, parallel);
    });
  });
}

ffi::Error attention_backward(ffi::ThreadPool pool, ffi::RemainingArgs args,
                              ffi::RemainingRets results, ffi::Dictionary attributes) {
  const char* target = "jax_gluon.attention_backward";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    AttentionBackwardCall call;
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
      return cpu_device().backward(call, parallel);
    });
  });
}

ffi::Error attention_backward_bias(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                   ffi::RemainingRets results, ffi::Dictionary attributes) {
  const char* target = "jax_gluon.attention_backward_bias";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    AttentionBackwardBiasCall call;
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
      return cpu_device().backward_bias(call, parallel);
    });
  });
}

ffi::Error quantize(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                    ffi::Dictionary attributes) {
  const char* target = "jax_gluon.quantize";
  return guarded(target, [&] {
    Decoder decoder(target, args, results, attributes);
    QuantizeCall call;
    call.center = decoder.flag("center");
    const bool has_lengths = decoder.flag("has_lengths");
    decoder.set_leading(4);
    const Shape shape = decoder.peek_shape(0, "x", 4);
    call.B = decoder.flat_batch(shape[0]);
    call.S = shape[1];
    call.K = shape[2];
    call.H = shape[3];
    call.x = decoder.float_operand("x", shape);
    if (has_lengths) {
      ffi::DataType dtype;
      std::vector<int64_t> strides;
      call.lengths = static_cast<const int32_t*>(decoder.operand("lengths", {shape[0]}, false,
                                                                 {ffi::DataType::S32}, &dtype,
                                                                 &call.lengths_offset, &strides));
    }
    call.data = decoder.result("data", shape, {ffi::DataType::S8});
    call.scale = decoder.result("scale", {shape[0], call.S, call.K}, {ffi::DataType::F32});
    if (call.center) {
      call.mean = decoder.result("mean", {shape[0], 1, call.K, call.H}, {ffi::DataType::F32});
    }
    return finish(decoder, target, [&]() -> Status {
      XlaParallel parallel(pool);
      return cpu_device().quantize(call, parallel);
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
