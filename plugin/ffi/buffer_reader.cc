#include "ffi/buffer_reader.h"

#include <algorithm>
#include <cmath>

#include "poison.h"

namespace jax_gluon {
namespace ffi = xla::ffi;

namespace {

// More entries than any machine holds; keeps every later product within 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 48;

// What an empty buffer points at: XLA may pass null, which means "absent" here.
alignas(64) char empty_buffer[64];

std::string_view name_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::PRED:
      return "bool";
    default:
      return "another type";
  }
}

std::string names_of(const std::vector<ffi::DataType>& dtypes) {
  std::string names;
  for (const ffi::DataType dtype : dtypes) {
    if (!names.empty()) names += " or ";
    names += name_of(dtype);
  }
  return names;
}

DType dtype_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
    case ffi::DataType::U16:  // its bits
      return DType::kBF16;
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::S8:
      return DType::kS8;
    case ffi::DataType::U8:
      return DType::kU4x2;
    default:
      return DType::kF32;
  }
}

Shape shape_of(const ffi::AnyBuffer& buffer) {
  const auto dimensions = buffer.dimensions();
  return Shape(dimensions.begin(), dimensions.end());
}

bool sizes_fit(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t n : shape) {
    if (n < 0) return false;
    if (n > 0 && count > kMaxElements / n) return false;
    count *= std::max<int64_t>(n, 1);
  }
  return true;
}

}  // namespace

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

int64_t BufferReader::integer(std::string_view name, int64_t least, int64_t most) {
  const auto value = attributes_.get<int64_t>(name);
  if (!value.has_value()) {
    fail("attribute " + std::string(name) + " is missing or not int64");
    return least;
  }
  if (*value < least || *value > most) {
    fail("attribute " + std::string(name) + " is " + std::to_string(*value) + ", expected " +
         std::to_string(least) + " to " + std::to_string(most));
    return least;
  }
  return *value;
}

std::string BufferReader::text(std::string_view name) {
  const auto value = attributes_.get<std::string_view>(name);
  if (!value.has_value()) {
    fail("attribute " + std::string(name) + " is missing or not a string");
    return {};
  }
  return std::string(*value);
}

float BufferReader::finite(std::string_view name) {
  const auto value = attributes_.get<float>(name);
  if (!value.has_value()) {
    fail("attribute " + std::string(name) + " is missing or not float32");
    return 0.0f;
  }
  if (!std::isfinite(*value)) {
    fail("attribute " + std::string(name) + " is " + std::to_string(*value) +
         ", expected a finite number");
    return 0.0f;
  }
  return *value;
}

void BufferReader::set_leading(size_t rank) {
  auto buffer = results_.get<ffi::AnyBuffer>(0);
  if (!buffer.has_value()) {
    fail("it has no result");
    return;
  }
  const Shape shape = shape_of(**buffer);
  if (shape.size() < rank) {
    fail("result 0 has shape " + to_string(shape) + ", expected at least rank " +
         std::to_string(rank));
    return;
  }
  if (!sizes_fit(shape)) {
    fail("result 0 has shape " + to_string(shape) + ", which is too large");
    return;
  }
  leading_.assign(shape.begin(), shape.end() - static_cast<std::ptrdiff_t>(rank));
  for (const int64_t n : leading_) leading_count_ *= n;
}

int64_t BufferReader::flat_batch(int64_t batch) {
  constexpr int64_t kMaxBatches = int64_t{1} << 31;
  if (batch > 0 && leading_count_ > kMaxBatches / batch) {
    fail("leading axes " + to_string(leading_) + " times batch " + std::to_string(batch) +
         " are more than 2^31");
    return 0;
  }
  return leading_count_ * batch;
}

Shape BufferReader::peek_shape(size_t index, std::string_view name, size_t rank) {
  const auto buffer = args_.get<ffi::AnyBuffer>(next_argument_ + index);
  if (!buffer.has_value()) {
    fail("operand " + std::string(name) + " is missing");
    return Shape(rank, 0);
  }
  const Shape shape = shape_of(*buffer);
  if (shape.size() != leading_.size() + rank) {
    fail("operand " + std::string(name) + " has shape " + to_string(shape) + ", expected rank " +
         std::to_string(leading_.size() + rank));
    return Shape(rank, 0);
  }
  if (!sizes_fit(shape)) {
    fail("operand " + std::string(name) + " has shape " + to_string(shape) +
         ", which is too large");
    return Shape(rank, 0);
  }
  return Shape(shape.end() - static_cast<std::ptrdiff_t>(rank), shape.end());
}

const void* BufferReader::operand(std::string_view name, const Shape& shape, bool broadcast,
                                  const std::vector<ffi::DataType>& dtypes, ffi::DataType* dtype,
                                  std::vector<int64_t>* batch_offset, std::vector<int64_t>* strides,
                                  Shape* found) {
  strides->assign(3, 0);
  if (failed()) return empty_buffer;
  const Shape own = peek_shape(0, name, shape.size());
  if (failed()) return empty_buffer;
  const ffi::AnyBuffer buffer = *args_.get<ffi::AnyBuffer>(next_argument_++);
  const Shape full = shape_of(buffer);
  Shape expected = leading_;
  expected.insert(expected.end(), shape.begin(), shape.end());
  for (size_t i = 0; i < full.size(); ++i) {
    const bool may_be_one = i < leading_.size() || broadcast;
    if (full[i] != expected[i] && !(may_be_one && full[i] == 1)) {
      fail("operand " + std::string(name) + " has shape " + to_string(full) + ", expected " +
           to_string(expected) + (broadcast ? " or 1 on any axis" : ""));
      return empty_buffer;
    }
  }
  if (std::find(dtypes.begin(), dtypes.end(), buffer.element_type()) == dtypes.end()) {
    fail("operand " + std::string(name) + " is " + std::string(name_of(buffer.element_type())) +
         ", expected " + names_of(dtypes));
    return empty_buffer;
  }
  *dtype = buffer.element_type();
  if (found) *found = own;

  // Dense row-major strides, 0 where an axis of extent 1 stands for a longer one.
  std::vector<int64_t> stride(full.size());
  int64_t step = 1;
  for (size_t i = full.size(); i-- > 0;) {
    stride[i] = full[i] == 1 ? 0 : step;
    step *= std::max<int64_t>(full[i], 1);
  }
  const size_t batch_axes = leading_.size() + 1;
  for (size_t i = batch_axes; i < full.size(); ++i) {
    // The innermost axis of a row is read as contiguous, whatever its extent.
    strides->at(i - batch_axes) = stride[i];
  }
  const int64_t count = flat_batch(shape[0]);
  batch_offset->resize(static_cast<size_t>(count));
  std::vector<int64_t> index(batch_axes, 0);
  int64_t offset = 0;
  for (int64_t b = 0; b < count; ++b) {
    (*batch_offset)[static_cast<size_t>(b)] = offset;
    for (size_t axis = batch_axes; axis-- > 0;) {
      offset += stride[axis];
      if (++index[axis] < expected[axis]) break;
      offset -= stride[axis] * expected[axis];
      index[axis] = 0;
    }
  }
  const void* data = buffer.untyped_data();
  return data ? data : empty_buffer;
}

Operand BufferReader::make(std::string_view name, const Shape& shape, bool broadcast,
                           const std::vector<ffi::DataType>& dtypes, Shape* found) {
  Operand x;
  ffi::DataType dtype = dtypes.front();
  std::vector<int64_t> strides;
  x.data = operand(name, shape, broadcast, dtypes, &dtype, &x.batch_offset, &strides, found);
  x.dtype = dtype_of(dtype);
  std::copy(strides.begin(), strides.begin() + 3, x.stride);
  return x;
}

Operand BufferReader::float_operand(std::string_view name, const Shape& shape, bool broadcast,
                                    Shape* found) {
  return make(name, shape, broadcast, {ffi::DataType::F32, ffi::DataType::BF16, ffi::DataType::F16},
              found);
}

Operand BufferReader::operand_of(std::string_view name, const Shape& shape,
                                 const std::vector<ffi::DataType>& dtypes, bool broadcast) {
  return make(name, shape, broadcast, dtypes, nullptr);
}

Result BufferReader::result(std::string_view name, const Shape& shape,
                            const std::vector<ffi::DataType>& dtypes) {
  if (failed()) return {};
  auto buffer = results_.get<ffi::AnyBuffer>(next_result_++);
  if (!buffer.has_value()) {
    fail("result " + std::string(name) + " is missing");
    return {};
  }
  Shape expected = leading_;
  expected.insert(expected.end(), shape.begin(), shape.end());
  const Shape full = shape_of(**buffer);
  if (full != expected) {
    fail("result " + std::string(name) + " has shape " + to_string(full) + ", expected " +
         to_string(expected));
    return {};
  }
  const ffi::DataType dtype = (*buffer)->element_type();
  if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
    fail("result " + std::string(name) + " is " + std::string(name_of(dtype)) + ", expected " +
         names_of(dtypes));
    return {};
  }
  void* data = (*buffer)->untyped_data();
  if (data) poison(data, (*buffer)->size_bytes());
  Result x{data ? data : empty_buffer, dtype_of(dtype)};
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (i < 3) x.stride[i] = step;
    step *= shape[i];
  }
  return x;
}

void BufferReader::finish() {
  if (failed()) return;
  if (next_argument_ != args_.size()) {
    fail("it has " + std::to_string(args_.size()) + " operands, expected " +
         std::to_string(next_argument_));
  }
  if (next_result_ != results_.size()) {
    fail("it has " + std::to_string(results_.size()) + " results, expected " +
         std::to_string(next_result_));
  }
}

}  // namespace jax_gluon
