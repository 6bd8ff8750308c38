#include "ffi/codes_reader.h"

#include <limits>
#include <map>
#include <utility>

#include "ffi/row_reader.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

// uint16: bits of bfloat16, as the cache stores them.
const std::vector<ffi::DataType> kBf16Bits = {ffi::DataType::BF16, ffi::DataType::U16};
constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 4;

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

}  // namespace

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
  if (format.is_made && format.has_powers && !format.has_center) {
    reader.fail("attribute " + name + "_has_powers is 1, expected 0 but for centered codes where " +
                name + "_is_made is 1");
  }
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

QuantizableOperand read_codes_of_rows(BufferReader& reader, const std::string& name,
                                      const Format& format, const Shape& shape, int64_t batch) {
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
    q.center =
        reader.operand_of(name + "_center", {batch, 1, shape[2], shape[3]}, {ffi::DataType::F32});
  }
  // Kernels read a scale for each element of a row, and what follows them, as a contiguous run.
  const auto check_row = [&](const char* part, const Operand& numbers, int64_t count) {
    if (numbers && count > 1 && numbers.stride[2] == 0 && q.head_block != 0) {
      reader.fail("operand " + name + part + " has one number a row, expected " +
                  std::to_string(count));
    }
  };
  check_row("_scale", q.scale, format.scales(blocked)[3]);
  check_row(q.offset_kind == Offset::kZeroPoint ? "_zero_point" : "_minimum", q.offset, blocked[3]);
  return x;
}

void read_visible(BufferReader& reader, const std::string& name, int64_t batch, int64_t S,
                  const uint8_t** visible, std::vector<int64_t>* offset) {
  ffi::DataType dtype;
  std::vector<int64_t> strides;
  *visible = static_cast<const uint8_t*>(
      reader.operand(name, {batch, S}, false, {ffi::DataType::PRED}, &dtype, offset, &strides));
}

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
