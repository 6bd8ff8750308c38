// How operands are stored, as attributes say it.
#pragma once

#include <string>

#include "attention_call.h"
#include "ffi/buffer_reader.h"
#include "numerics.h"

namespace jax_gluon {

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
Format read_format(BufferReader& reader, const std::string& name, bool may_be_made);

// Codes of rows of `shape` [batch, tokens, heads, columns]. Of tokens in pages, which stand in
// place of the batch, `batch` has centers.
QuantizableOperand read_codes_of_rows(BufferReader& reader, const std::string& name,
                                      const Format& format, const Shape& shape, int64_t batch);

// Which of the S tokens of each entry can be seen.
void read_visible(BufferReader& reader, const std::string& name, int64_t batch, int64_t S,
                  const uint8_t** visible, std::vector<int64_t>* offset);

// What an attention call makes of one operand's floats: codes, which become the operand. `made`
// says whose they are, and which tokens can be seen. What vmap did not map is made once, and its
// codes are read by all entries.
void read_made_codes(BufferReader& reader, const std::string& name, const Format& format,
                     const Shape& shape, QuantizableOperand& x, QuantizeCall& made);

QuantizeCall read_quantize(BufferReader& reader);

}  // namespace jax_gluon
