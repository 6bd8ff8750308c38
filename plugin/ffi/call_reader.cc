#include "ffi/call_reader.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "ffi/row_reader.h"
#include "kernels.h"
#include "numerics.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

const std::vector<ffi::DataType> kFloats = {ffi::DataType::F32, ffi::DataType::BF16,
                                            ffi::DataType::F16};
// uint16: bits of bfloat16, as the cache stores them.
const std::vector<ffi::DataType> kBf16Bits = {ffi::DataType::BF16, ffi::DataType::U16};
constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 4;
// How an operand's rows are stored, as the attributes say: codes are followed by their scale, and
// by an offset and a center where they have them. Or they come as floats, and the call makes codes
// of them, which are results of its own.
struct Format {
  int64_t bits = 0, token_block = 0, head_block = 0, offset = 0;
  bool has_center = false;
  bool has_powers = false;
  bool is_made = false;
  bool per_tensor = false;  // of codes that are made

  Quantization::Offset offset_kind() const { return static_cast<Quantization::Offset>(offset); }
  // Of rows of `shape`, but for its arrays.
  Quantization quantization(const Shape& shape) const {
    Quantization q;
    q.bits = bits;
    q.token_block = token_block;
    q.head_block = whole_head_block(head_block, shape[3]);
    q.offset_kind = offset_kind();
    q.has_powers = has_powers;
    return q;
  }
  // The shape of the scales, where an entry for each block has `shape`.
  Shape scales(Shape shape) const {
    if (has_powers) shape.back() += power_cells(token_block);
    return shape;
  }
  bool is_float() const { return bits == 0 || is_made; }
  size_t operands() const {
    return is_float() ? 1 : size_t{2} + (offset != 0 ? 1 : 0) + (has_center ? 1 : 0);
  }
  // The shape of the elements that stand in a buffer of `shape`.
  Shape elements(Shape shape) const {
    if (bits == 4 && !is_made) shape.back() *= 2;
    return shape;
  }
};

// `may_be_made`: of a call that can make codes.
Format read_format(BufferReader& reader, const std::string& name, bool may_be_made) {
  Format format;
  format.bits = reader.integer(name + "_bits", 0, 8);
  if (format.bits != 0 && format.bits != 4 && format.bits != 8) {
    reader.fail("attribute " + name + "_bits is " + std::to_string(format.bits) +
                ", expected 0, 4 or 8");
    format.bits = 0;
  }
  format.token_block = reader.integer(name + "_token_block", 0, kMax);
  format.head_block = reader.integer(name + "_head_block", 0, kMax);
  format.offset = reader.integer(name + "_offset", 0, 2);
  format.has_center = reader.flag(name + "_has_center");
  format.has_powers = reader.flag(name + "_has_powers");
  if (format.has_powers && (format.token_block == 0 || format.head_block != 1)) {
    reader.fail("attribute " + name + "_has_powers is 1, expected 0 but for blocks of a channel");
  }
  if (!may_be_made) return format;
  format.is_made = reader.flag(name + "_is_made");
  format.per_tensor = reader.flag(name + "_per_tensor");
  if (format.is_made && format.bits == 0) {
    reader.fail("attribute " + name + "_bits is 0, expected 4 or 8 where " + name +
                "_is_made is 1");
  }
  if (format.per_tensor && (format.token_block != 0 || format.head_block != 0)) {
    reader.fail("attribute " + name +
                "_per_tensor is 1, expected 0 where blocks are not whole axes");
  }
  return format;
}

// Codes of rows of `shape` [batch, tokens, heads, columns].
QuantizableOperand read_codes_of(BufferReader& reader, const std::string& name,
                                 const Format& format, const Shape& shape) {
  using Offset = Quantization::Offset;
  QuantizableOperand x;
  const bool packed = format.bits == 4;
  Shape stored = shape;
  if (packed) stored.back() /= 2;
  static_cast<Operand&>(x) =
      reader.operand_of(name, stored, {packed ? ffi::DataType::U8 : ffi::DataType::S8});
  Quantization& q = x.quantization;
  q = format.quantization(shape);
  const std::vector<ffi::DataType> floats = {ffi::DataType::F32, ffi::DataType::BF16,
                                             ffi::DataType::U16};
  const Shape blocked = {shape[0], blocks_of(shape[1], q.token_block), shape[2],
                         blocks_of(shape[3], q.head_block)};
  q.scale = reader.operand_of(name + "_scale", format.scales(blocked),
                              format.has_powers ? kBf16Bits : floats, true);
  if (q.offset_kind == Offset::kZeroPoint) {
    q.offset = reader.operand_of(name + "_zero_point", blocked, {ffi::DataType::S8}, true);
  } else if (q.offset_kind == Offset::kMinimum) {
    q.offset = reader.operand_of(name + "_minimum", blocked, floats, true);
  }
  if (format.has_center) {
    q.center = reader.operand_of(name + "_center", {shape[0], 1, shape[2], shape[3]},
                                 {ffi::DataType::F32});
  }
  // Kernels read a scale for each element of a row as a contiguous run.
  const bool is_short = q.scale.stride[2] == 0 || (q.offset && q.offset.stride[2] == 0);
  if (!reader.failed() && q.head_block != 0 && blocked[3] > 1 && is_short) {
    reader.fail("operand " + name + "_scale has one scale a row, expected " +
                std::to_string(blocked[3]));
  }
  return x;
}

// The results of the quantizer for rows of `shape`, whose call says all but them.
void read_codes(BufferReader& reader, const std::string& prefix, const Shape& shape,
                QuantizeCall& call) {
  if (call.H < 1 || (call.bits == 4 && call.H % 2 != 0)) {
    reader.fail(prefix + "x has shape " + to_string(shape) +
                ", expected a head dim of at least 1, even for 4 bits");
  }
  Shape stored = shape;
  if (call.bits == 4) stored.back() /= 2;
  call.data = reader.result(prefix + "data", stored,
                            {call.bits == 4 ? ffi::DataType::U8 : ffi::DataType::S8});
  const std::vector<ffi::DataType> floats = {ffi::DataType::F32, ffi::DataType::BF16};
  const Shape blocked = {shape[0], blocks_of(call.S, call.token_block),
                         call.per_tensor ? 1 : call.K, blocks_of(call.H, call.head_block)};
  Shape scale = blocked;
  if (call.has_powers) scale.back() += power_cells(call.token_block);
  call.scale = reader.result(prefix + "scale", scale, call.has_powers ? kBf16Bits : floats);
  if (call.float_minimum) {
    call.offset = reader.result(prefix + "minimum", blocked, floats);
  } else if (!call.symmetric) {
    call.offset = reader.result(prefix + "zero_point", blocked, {ffi::DataType::S8});
  }
  if (call.is_centered) {
    call.center =
        reader.result(prefix + "center", {shape[0], 1, call.K, call.H}, {ffi::DataType::F32});
  }
}

// Leaves of each of the call's operands the entries of the vmap axes that differ, in order, and
// says which of them each entry is. Offsets within an entry are the same steps in all.
void make_distinct_maps(QuantizeCall& call, int64_t batch) {
  if (batch == 0) return;
  const auto stride = static_cast<size_t>(batch);
  const std::vector<int64_t> x = std::move(call.x.batch_offset);
  const std::vector<int64_t> visible = std::move(call.visible_offset);
  call.x.batch_offset.clear();
  call.visible_offset.clear();
  std::map<std::pair<int64_t, int64_t>, int64_t> seen;
  for (size_t at = 0; at < x.size(); at += stride) {
    const std::pair<int64_t, int64_t> key = {x[at], visible.empty() ? 0 : visible[at]};
    const auto [found, is_first] = seen.emplace(key, static_cast<int64_t>(seen.size()));
    call.map_made.push_back(found->second);
    if (!is_first) continue;
    const auto append = [&](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
      if (from.empty()) return;
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(at);
      to.insert(to.end(), begin, begin + batch);
    };
    append(call.x.batch_offset, x);
    append(call.visible_offset, visible);
  }
  call.L = static_cast<int64_t>(seen.size());
  call.B = call.L * batch;
}

// A result of the quantizer as an operand of what runs after it, of rows of `shape`.
Operand as_operand(const Result& result, const QuantizeCall& made, const Shape& shape) {
  Operand x;
  x.data = result.data;
  x.dtype = result.dtype;
  int64_t step = 1;
  for (size_t d = 3; d > 0; --d) {
    x.stride[d - 1] = shape[d] == 1 ? 0 : step;
    step *= shape[d];
  }
  for (const int64_t map : made.map_made) {
    for (int64_t b = 0; b < shape[0]; ++b) x.batch_offset.push_back((map * shape[0] + b) * step);
  }
  return x;
}

// Which of the S tokens of each entry can be seen.
void read_visible(BufferReader& reader, const std::string& name, int64_t batch, int64_t S,
                  const uint8_t** visible, std::vector<int64_t>* offset) {
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  *visible = static_cast<const uint8_t*>(
      reader.operand(name, {batch, S}, false, {ffi::DataType::PRED}, &dtype, offset, &strides));
}

// What an attention call makes of one operand's floats: codes, which become the operand. `made`
// says whose they are, and which tokens can be seen. What vmap did not map is made once, and its
// codes are read by all entries.
void read_made_codes(BufferReader& reader, const std::string& name, const Format& format,
                     const Shape& shape, QuantizableOperand& x, QuantizeCall& made) {
  made.S = shape[1];
  made.K = shape[2];
  made.H = shape[3];
  made.x = x;
  made.bits = format.bits;
  made.symmetric = format.offset_kind() == Quantization::Offset::kNone;
  made.float_minimum = format.offset_kind() == Quantization::Offset::kMinimum;
  made.token_block = format.token_block;
  made.head_block = format.head_block;
  made.per_tensor = format.per_tensor;
  made.is_centered = format.has_center;
  made.has_powers = format.has_powers;
  read_codes(reader, name + "_", shape, made);
  if (reader.failed()) return;

  make_distinct_maps(made, shape[0]);
  Shape stored = shape, blocked = shape;
  if (made.bits == 4) stored.back() /= 2;
  blocked[1] = blocks_of(made.S, made.token_block);
  if (made.per_tensor) blocked[2] = 1;
  blocked[3] = blocks_of(made.H, made.head_block);
  static_cast<Operand&>(x) = as_operand(made.data, made, stored);
  Quantization& q = x.quantization;
  q = format.quantization(shape);
  q.scale = as_operand(made.scale, made, format.scales(blocked));
  if (made.offset) q.offset = as_operand(made.offset, made, blocked);
  if (made.center) q.center = as_operand(made.center, made, {shape[0], 1, made.K, made.H});
}

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
  if (has_d_log_sum_exp) *has_d_log_sum_exp = reader.flag("has_d_log_sum_exp");

  reader.set_leading(4);
  if (bias_shape && !has_bias) reader.fail("attribute has_bias is 0, expected 1");
  const size_t key_at = formats[0].operands(), value_at = key_at + formats[1].operands();
  // Codes have tokens before heads, whatever floats have.
  RowReader floats(reader, call.head_major), codes(reader, false);
  const auto elements = [&](const Format& format, size_t at, const char* name) {
    return format.elements((format.is_float() ? floats : codes).peek_shape(at, name, 4));
  };
  const Shape query = elements(formats[0], 0, "query");
  const Shape key = elements(formats[1], key_at, "key");
  const Shape value = elements(formats[2], value_at, "value");
  if (reader.failed()) return 0;
  const int64_t batch = query[0];
  call.B = reader.flat_batch(batch);
  call.T = query[1];
  call.N = query[2];
  call.H = query[3];
  call.S = key[1];
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
  const Shape key_shape = {batch, call.S, call.K, call.H};
  const Shape value_shape = {batch, call.S, call.K, call.V};
  const auto read_rows = [&](const char* name, const Format& format, const Shape& shape) {
    if (!format.is_float()) return read_codes_of(reader, name, format, shape);
    QuantizableOperand x;
    static_cast<Operand&>(x) = floats.float_operand(name, shape);
    return x;
  };
  call.query = read_rows("query", formats[0], query);
  call.key = read_rows("key", formats[1], key_shape);
  call.value = read_rows("value", formats[2], value_shape);
  const Shape logits = {batch, call.N, call.T, call.S};
  if (has_bias) call.bias = reader.float_operand("bias", logits, true, bias_shape);
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  if (has_mask) {
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
  if (call.dropout) read_tokens("dropout_seeds", 4, call.dropout.seeds);
  if (!reader.failed()) call.visible_keys = find_visible_keys(call);
  return batch;
}

// What a backward call reads besides: the forward call's results and the cotangents.
template <class Call>
void read_cotangents(BufferReader& reader, Call& call, int64_t batch, bool has_d_log_sum_exp) {
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
  RowReader floats(reader, call.head_major);
  call.out = floats.result("out", {batch, call.T, call.N, call.V}, kFloats);
  const Shape rows = {batch, call.T, call.N};
  call.row_maximum = floats.result("row_maximum", rows, {ffi::DataType::F32});
  call.log2_sum = floats.result("log2_sum", rows, {ffi::DataType::F32});
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

QuantizeCall read_quantize(BufferReader& reader) {
  QuantizeCall call;
  call.bits = reader.integer("bits", 4, 8);
  if (call.bits != 4 && call.bits != 8) {
    reader.fail("attribute bits is " + std::to_string(call.bits) + ", expected 4 or 8");
  }
  call.symmetric = reader.flag("symmetric");
  call.float_minimum = reader.flag("float_minimum");
  if (call.symmetric && call.float_minimum) {
    reader.fail("attribute float_minimum is 1, expected 0 where symmetric is 1");
  }
  call.token_block = reader.integer("token_block", 0, kMax);
  call.head_block = reader.integer("head_block", 0, kMax);
  call.per_tensor = reader.flag("per_tensor");
  if (call.per_tensor && (call.token_block != 0 || call.head_block != 0)) {
    reader.fail("attribute per_tensor is 1, expected 0 where blocks are not whole axes");
  }
  call.is_centered = reader.flag("center");
  call.has_powers = reader.flag("token_powers");
  if (call.has_powers && (call.token_block == 0 || call.head_block != 1 || !call.is_centered)) {
    reader.fail("attribute token_powers is 1, expected 0 but for centered blocks of a channel");
  }
  call.rotate = reader.flag("rotate");
  RowReader floats(reader, reader.flag("head_major"));
  const bool has_visible = reader.flag("has_visible");
  reader.set_leading(4);
  const Shape shape = floats.peek_shape(0, "x", 4);
  call.L = reader.leading_count();
  call.B = reader.flat_batch(shape[0]);
  call.S = shape[1];
  call.K = shape[2];
  call.H = shape[3];
  call.x = floats.float_operand("x", shape);
  if (has_visible) {
    read_visible(reader, "visible", shape[0], call.S, &call.visible, &call.visible_offset);
  }
  read_codes(reader, "", shape, call);
  return call;
}

}  // namespace jax_gluon
