// Reads rows of [batch, tokens, heads, columns], whose buffers may have heads before tokens:
// kernels see the difference in the strides alone.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include "attention_call.h"
#include "ffi/buffer_reader.h"

namespace jax_gluon {

class RowReader {
 public:
  RowReader(BufferReader& reader, bool head_major) : reader_(reader), head_major_(head_major) {}

  // As BufferReader's, of shapes with tokens before heads.
  Shape peek_shape(size_t index, std::string_view name, size_t rank) {
    return stored(reader_.peek_shape(index, name, rank));
  }
  Operand float_operand(std::string_view name, const Shape& shape) {
    return swapped(reader_.float_operand(name, stored(shape)));
  }
  Operand operand_of(std::string_view name, const Shape& shape,
                     const std::vector<xla::ffi::DataType>& dtypes) {
    return swapped(reader_.operand_of(name, stored(shape), dtypes));
  }
  Result result(std::string_view name, const Shape& shape,
                const std::vector<xla::ffi::DataType>& dtypes) {
    Result x = reader_.result(name, stored(shape), dtypes);
    if (head_major_) std::swap(x.stride[1], x.stride[2]);
    return x;
  }

 private:
  Shape stored(Shape shape) const {
    if (head_major_) std::swap(shape[1], shape[2]);
    return shape;
  }
  Operand swapped(Operand x) const {
    if (head_major_) std::swap(x.stride[0], x.stride[1]);
    return x;
  }

  BufferReader& reader_;
  const bool head_major_;
};

}  // namespace jax_gluon
