// Buffers and attributes of a custom call, checked one by one. Nothing that XLA passes is trusted.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gluon {

using Shape = std::vector<int64_t>;

std::string to_string(const Shape& shape);

// Reads operands and results in order. The first thing that is wrong is kept, what is read after it
// is meaningless but safe; `error()` says whether anything was.
class BufferReader {
 public:
  BufferReader(std::string target, xla::ffi::RemainingArgs args, xla::ffi::RemainingRets results,
               xla::ffi::Dictionary attributes)
      : target_(std::move(target)), args_(args), results_(results), attributes_(attributes) {}

  void fail(const std::string& what) {
    if (!error_) error_ = target_ + ": " + what;
  }
  bool failed() const { return error_.has_value(); }
  const std::string& error() const { return *error_; }

  int64_t integer(std::string_view name, int64_t least, int64_t most);
  std::string text(std::string_view name);
  bool flag(std::string_view name) { return integer(name, 0, 1) != 0; }
  float finite(std::string_view name);

  // Fixes the leading (vmap) axes: those of the first result, whose other axes number `rank`.
  void set_leading(size_t rank);
  const Shape& leading() const { return leading_; }
  // Flat number of (leading, batch) entries; `batch` is the batch axis. Fails past 2^31, which only
  // empty arrays can have.
  int64_t flat_batch(int64_t batch);
  int64_t leading_count() const { return leading_count_; }

  // The shape, leading axes dropped, of the operand `index` places on.
  Shape peek_shape(size_t index, std::string_view name, size_t rank);

  // The next operand: [leading, shape[0] = batch, shape[1..]]. An axis named in `broadcast` may
  // have extent 1 instead; every leading axis may. `strides` takes the strides of the axes behind
  // the batch.
  const void* operand(std::string_view name, const Shape& shape, bool broadcast,
                      const std::vector<xla::ffi::DataType>& dtypes, xla::ffi::DataType* dtype,
                      std::vector<int64_t>* batch_offset, std::vector<int64_t>* strides,
                      Shape* found = nullptr);
  Operand float_operand(std::string_view name, const Shape& shape, bool broadcast = false,
                        Shape* found = nullptr);
  Operand operand_of(std::string_view name, const Shape& shape,
                     const std::vector<xla::ffi::DataType>& dtypes, bool broadcast = false);

  // The next result, of exactly [leading, shape].
  Result result(std::string_view name, const Shape& shape,
                const std::vector<xla::ffi::DataType>& dtypes);

  // Fails if operands or results are left over.
  void finish();

 private:
  Operand make(std::string_view name, const Shape& shape, bool broadcast,
               const std::vector<xla::ffi::DataType>& dtypes, Shape* found);

  std::string target_;
  xla::ffi::RemainingArgs args_;
  xla::ffi::RemainingRets results_;
  xla::ffi::Dictionary attributes_;
  std::optional<std::string> error_;
  Shape leading_;
  int64_t leading_count_ = 1;
  size_t next_argument_ = 0, next_result_ = 0;
};

}  // namespace jax_gluon
