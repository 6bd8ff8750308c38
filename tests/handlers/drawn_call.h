// A custom call as bytes say it: attributes, operands and results, without their contents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace jax_gluon::handlers {

// Decisions, made of bytes; of none that are left: 0.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t next() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  // Below `count`.
  size_t below(size_t count) { return next() % count; }
  bool is_in(int of_256) { return next() >= 256 - of_256; }
  template <class T, size_t kCount>
  T pick(const T (&values)[kCount]) {
    return values[below(kCount)];
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

struct Attribute {
  enum class Kind : uint8_t { kInteger, kFloat, kText, kDouble };
  std::string name;
  Kind kind = Kind::kInteger;
  int64_t integer = 0;
  float number = 0.0f;
  std::string text;
};

// What a buffer is filled with.
enum class Fill : uint8_t { kSmall, kBits, kZero, kWide };

struct DrawnBuffer {
  XLA_FFI_DataType dtype = XLA_FFI_DataType_F32;
  std::vector<int64_t> extents;
  Fill fill = Fill::kSmall;
  int64_t numbers = 0;  // not 0: a buffer of numbers below it, but where bits may be any
  bool at_end = true;   // of what is around it, the page that nobody may touch
};

enum class Handler : uint8_t { kForward, kBackward, kBackwardBias, kTangent, kQuantize };

struct DrawnCall {
  Handler handler = Handler::kForward;
  std::vector<Attribute> attributes;  // sorted by name
  std::vector<DrawnBuffer> operands, results;
  int64_t threads = 1;
  size_t variant = 0;    // of the instruction sets that there are
  uint32_t seed = 0;     // of contents
  bool is_sound = true;  // nothing was changed of what the attributes say
};

// Bytes of an element; 0 of a type that none of the calls has.
size_t size_of(XLA_FFI_DataType dtype);

DrawnCall draw(Bytes bytes);

// Whether XLA could make it, with buffers of at most `largest` bytes: arrays with more elements
// than a machine holds are for the handler to refuse.
bool fits(const DrawnCall& call, size_t largest);

}  // namespace jax_gluon::handlers
