#include "ffi/call_reader.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "ffi/block_mask_reader.h"
#include "ffi/codes_reader.h"
#include "ffi/page_reader.h"
#include "ffi/row_reader.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

const std::vector<ffi::DataType> kFloats = {ffi::DataType::F32, ffi::DataType::BF16,
                                            ffi::DataType::F16};
constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 4;
constexpr int64_t kMaxMaskBlock = int64_t{1} << 20;

Kernel read_kernel(BufferReader& reader, const std::string& attribute) {
  const std::string name = reader.text(attribute);
  const auto kernel = kernel_named(name);
  if (!kernel) {
    std::string names;
    for (const char* each : kKernelNames) names += (names.empty() ? "" : ", ") + std::string(each);
    reader.fail("attribute " + attribute + " is \"" + name + "\", expected one of " + names);
  }
  return kernel.value_or(Kernel::kBaseline);
}

KernelChoice read_cpu_kernel(BufferReader& reader) {
  KernelChoice choice;
  choice.kernel = read_kernel(reader, "cpu_kernel");
  choice.block_k = reader.integer("cpu_block_k", 0, kMaxBlockKeys);
  choice.subtile = reader.integer("cpu_subtile", 0, kMaxBlockKeys);
  choice.stages = reader.integer("cpu_stages", 0, kMaxStages);
  return choice;
}

// The operands that every attention call starts with; returns the length of its real batch axis.
// With `made`, which takes how they are stored, codes may be the call's to make.
int64_t read_call(BufferReader& reader, AttentionCall& call, bool* has_d_log_sum_exp,
                  Shape* bias_shape, std::vector<Format>* made = nullptr) {
  call.cpu_kernel = read_cpu_kernel(reader);
  call.metal_kernel = read_kernel(reader, "metal_kernel");
  call.scale = reader.finite("scale");
  call.soft_cap = reader.finite("soft_cap");
  if (call.soft_cap < 0.0f) {
    reader.fail("attribute soft_cap is " + std::to_string(call.soft_cap) +
                ", expected 0 (none) or more");
  }
  call.head_major = reader.flag("head_major");
  call.causal = reader.flag("causal");
  call.window_left = reader.integer("window_left", -1, kMax);
  call.window_right = reader.integer("window_right", -1, kMax);
  const bool has_bias = reader.flag("has_bias");
  const bool has_mask = reader.flag("has_mask");
  const int64_t mask_block = reader.integer("mask_block", 0, kMaxMaskBlock);
  const bool has_query_seq_lengths = reader.flag("has_query_seq_lengths");
  const bool has_query_offset = reader.flag("has_query_offset");
  const bool has_sinks = reader.flag("has_sinks");
  const bool has_segment_ids = reader.flag("has_segment_ids");
  const bool has_positions = reader.flag("has_positions");
  call.dropout.threshold = static_cast<uint32_t>(reader.integer("dropout_threshold", 0, 0xFFFF));
  const float dropout_scale = reader.finite("dropout_scale");
  if (call.dropout) call.dropout.scale = dropout_scale;
  const bool has_key_value_seq_lengths = reader.flag("has_key_value_seq_lengths");
  const std::vector<Format> formats = {read_format(reader, "query", made != nullptr),
                                       read_format(reader, "key", made != nullptr),
                                       read_format(reader, "value", made != nullptr)};
  if (made) *made = formats;
  const Pages pages = read_pages(reader, formats, made != nullptr);
  if (has_d_log_sum_exp) *has_d_log_sum_exp = reader.flag("has_d_log_sum_exp");

  reader.set_leading(4);
  if (bias_shape && !has_bias) reader.fail("attribute has_bias is 0, expected 1");
  const size_t key_at = formats[0].operands(), value_at = key_at + formats[1].operands();
  const auto elements = [&](const Format& format, size_t at, const char* name) {
    // Codes have tokens before heads, whatever floats have.
    RowReader rows(reader, call.head_major && format.is_float());
    return format.elements(rows.peek_shape(at, name, 4));
  };
  const Shape query = elements(formats[0], 0, "query");
  const Shape key = elements(formats[1], key_at, "key");
  const Shape value = elements(formats[2], value_at, "value");
  check_pages(reader, pages, key);
  if (reader.failed()) return 0;
  const int64_t batch = query[0];
  call.B = reader.flat_batch(batch);
  call.T = query[1];
  call.N = query[2];
  call.H = query[3];
  call.S = pages ? pages.tokens * pages.count : key[1];
  call.K = key[2];
  call.V = value[3];
  if (call.H < 1 || call.V < 1) {
    reader.fail("query has shape " + to_string(query) + " and value " + to_string(value) +
                ", expected head dims of at least 1");
    return 0;
  }
  if (call.K == 0 ? call.N != 0 : call.N % call.K != 0) {
    reader.fail("query has " + std::to_string(call.N) + " heads, expected a multiple of key's " +
                std::to_string(call.K));
    return 0;
  }
  const Shape stored = pages ? Shape{key[0], key[1]} : Shape{batch, call.S};
  const Shape key_shape = {stored[0], stored[1], call.K, call.H};
  const Shape value_shape = {stored[0], stored[1], call.K, call.V};
  const auto rows = [&](const char* name, const Format& format, const Shape& shape) {
    if (!format.is_float()) return read_codes_of_rows(reader, name, format, shape, batch);
    QuantizableOperand x;
    static_cast<Operand&>(x) = RowReader(reader, call.head_major).float_operand(name, shape);
    return x;
  };
  call.query = rows("query", formats[0], query);
  call.key = rows("key", formats[1], key_shape);
  call.value = rows("value", formats[2], value_shape);
  const Shape logits = {batch, call.N, call.T, call.S};
  if (has_bias) call.bias = reader.float_operand("bias", logits, true, bias_shape);
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  if (has_mask && mask_block != 0) {
    read_block_mask(reader, mask_block, batch, call);
  } else if (has_mask) {
    call.mask = static_cast<const uint8_t*>(reader.operand(
        "mask", logits, true, {ffi::DataType::PRED}, &dtype, &call.mask_batch_offset, &strides));
    std::copy(strides.begin(), strides.begin() + 3, call.mask_stride);
  }
  const std::vector<ffi::DataType> ints = {ffi::DataType::S32};
  if (has_query_seq_lengths) {
    call.query_seq_lengths = static_cast<const int32_t*>(
        reader.operand("query_seq_lengths", {batch}, false, ints, &dtype,
                       &call.query_seq_lengths_offset, &strides));
  }
  if (has_key_value_seq_lengths) {
    call.key_value_seq_lengths = static_cast<const int32_t*>(
        reader.operand("key_value_seq_lengths", {batch}, false, ints, &dtype,
                       &call.key_value_seq_lengths_offset, &strides));
  }
  if (has_query_offset) {
    call.query_offset = static_cast<const int32_t*>(reader.operand(
        "query_offset", {batch}, false, ints, &dtype, &call.query_offset_offset, &strides));
  }
  if (has_sinks) {
    call.sinks = reader.operand_of("sinks", {batch, call.N}, {ffi::DataType::F32}, true);
  }
  const auto read_tokens = [&](const char* name, int64_t tokens, TokenIntegers& x) {
    x.data = static_cast<const int32_t*>(
        reader.operand(name, {batch, tokens}, false, ints, &dtype, &x.batch_offset, &strides));
  };
  if (has_segment_ids) {
    read_tokens("query_segment_ids", call.T, call.query_segment_ids);
    read_tokens("key_value_segment_ids", call.S, call.key_value_segment_ids);
  }
  if (has_positions) {
    read_tokens("query_positions", call.T, call.query_positions);
    read_tokens("key_value_positions", call.S, call.key_value_positions);
  }
  if (call.dropout) read_tokens("dropout_seeds", 7, call.dropout.seeds);
  if (pages) read_page_table(reader, pages, key[0], batch, call);
  if (!reader.failed()) call.visible_keys = find_visible_keys(call);
  return batch;
}

void read_forward_results(BufferReader& reader, AttentionForwardCall& call, int64_t batch) {
  RowReader floats(reader, call.head_major);
  call.out = floats.result("out", {batch, call.T, call.N, call.V}, kFloats);
  const Shape rows = {batch, call.T, call.N};
  call.row_maximum = floats.result("row_maximum", rows, {ffi::DataType::F32});
  call.log2_sum = floats.result("log2_sum", rows, {ffi::DataType::F32});
}

// What a backward call reads besides: the forward call's results and the cotangents.
template <class Call>
void read_cotangents(BufferReader& reader, Call& call, int64_t batch, bool has_d_log_sum_exp) {
  call.is_partial = reader.flag("is_partial");
  if (call.is_partial && !has_d_log_sum_exp) {
    reader.fail("attribute has_d_log_sum_exp is 0, expected 1 where is_partial is");
  }
  const Shape rows = {batch, call.T, call.N};
  const Shape out = {batch, call.T, call.N, call.V};
  RowReader floats(reader, call.head_major);
  call.out = floats.float_operand("out", out);
  call.row_maximum = floats.operand_of("row_maximum", rows, {ffi::DataType::F32});
  call.log2_sum = floats.operand_of("log2_sum", rows, {ffi::DataType::F32});
  call.d_out = floats.float_operand("d_out", out);
  if (has_d_log_sum_exp) {
    call.d_log_sum_exp = floats.operand_of("d_log_sum_exp", rows, {ffi::DataType::F32});
  }
}

}  // namespace

AttentionForwardCall read_forward(BufferReader& reader) {
  AttentionForwardCall call;
  std::vector<Format> formats;
  const int64_t batch = read_call(reader, call, nullptr, nullptr, &formats);
  read_forward_results(reader, call, batch);
  if (reader.failed()) return call;
  QuantizeCall query, key_value;  // for who can be seen alone
  if (reader.flag("has_query_visible")) {
    read_visible(reader, "query_visible", batch, call.T, &query.visible, &query.visible_offset);
  }
  if (reader.flag("has_key_value_visible")) {
    read_visible(reader, "key_value_visible", batch, call.S, &key_value.visible,
                 &key_value.visible_offset);
  }
  if (reader.failed()) return call;
  const auto make = [&](const char* name, const Format& format, const Shape& shape,
                        QuantizableOperand& x, QuantizeCall made) {
    if (!format.is_made || reader.failed()) return;
    made.L = reader.leading_count();
    made.B = call.B;
    read_made_codes(reader, name, format, shape, x, made);
    call.quantize.push_back(std::move(made));
  };
  make("query", formats[0], {batch, call.T, call.N, call.H}, call.query, query);
  make("key", formats[1], {batch, call.S, call.K, call.H}, call.key, key_value);
  make("value", formats[2], {batch, call.S, call.K, call.V}, call.value, key_value);
  return call;
}

AttentionBackwardCall read_backward(BufferReader& reader) {
  AttentionBackwardCall call;
  bool has_d_log_sum_exp = false;
  const int64_t batch = read_call(reader, call, &has_d_log_sum_exp, nullptr);
  read_cotangents(reader, call, batch, has_d_log_sum_exp);
  RowReader floats(reader, call.head_major);
  call.d_query = floats.result("d_query", {batch, call.T, call.N, call.H}, kFloats);
  call.d_key = floats.result("d_key", {batch, call.S, call.K, call.H}, kFloats);
  call.d_value = floats.result("d_value", {batch, call.S, call.K, call.V}, kFloats);
  return call;
}

AttentionTangentCall read_tangent(BufferReader& reader) {
  AttentionTangentCall call;
  const bool has_query = reader.flag("has_query_tangent");
  const bool has_key = reader.flag("has_key_tangent");
  const bool has_value = reader.flag("has_value_tangent");
  const bool has_bias = reader.flag("has_bias_tangent");
  const bool has_sinks = reader.flag("has_sinks_tangent");
  const int64_t batch = read_call(reader, call, nullptr, nullptr);
  if (has_bias && !call.bias) reader.fail("attribute has_bias is 0, expected 1");
  if (has_sinks && !call.sinks) reader.fail("attribute has_sinks is 0, expected 1");
  RowReader floats(reader, call.head_major);
  if (has_query) {
    call.query_tangent = floats.float_operand("query_tangent", {batch, call.T, call.N, call.H});
  }
  if (has_key) {
    call.key_tangent = floats.float_operand("key_tangent", {batch, call.S, call.K, call.H});
  }
  if (has_value) {
    call.value_tangent = floats.float_operand("value_tangent", {batch, call.S, call.K, call.V});
  }
  if (has_bias) {
    call.bias_tangent = reader.float_operand("bias_tangent", {batch, call.N, call.T, call.S}, true);
  }
  if (has_sinks) {
    call.sinks_tangent =
        reader.operand_of("sinks_tangent", {batch, call.N}, {ffi::DataType::F32}, true);
  }
  read_forward_results(reader, call, batch);
  call.tangent_out = floats.result("tangent_out", {batch, call.T, call.N, call.V}, kFloats);
  call.tangent_log_sum_exp =
      floats.result("tangent_log_sum_exp", {batch, call.T, call.N}, {ffi::DataType::F32});
  return call;
}

AttentionBackwardBiasCall read_backward_bias(BufferReader& reader) {
  AttentionBackwardBiasCall call;
  bool has_d_log_sum_exp = false;
  Shape bias(4, 1);
  const int64_t batch = read_call(reader, call, &has_d_log_sum_exp, &bias);
  read_cotangents(reader, call, batch, has_d_log_sum_exp);
  call.d_bias = reader.result("d_bias", bias, kFloats);
  call.L = reader.leading_count();
  call.b = bias[0];
  call.n = bias[1];
  call.t = bias[2];
  call.s = bias[3];
  return call;
}

}  // namespace jax_gluon
