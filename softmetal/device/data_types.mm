// Metal's data types by the names that shaders use.
#include <iterator>

#include "softmetal/device/device.h"

namespace softmetal {
namespace {

struct Scalar {
  const char* name;
  MTLDataType type;  // vectors of 2, 3 and 4 follow
  size_t size;
};

constexpr Scalar kScalars[] = {
    {"bool", MTLDataTypeBool, 1},     {"char", MTLDataTypeChar, 1},
    {"uchar", MTLDataTypeUChar, 1},   {"short", MTLDataTypeShort, 2},
    {"ushort", MTLDataTypeUShort, 2}, {"int", MTLDataTypeInt, 4},
    {"uint", MTLDataTypeUInt, 4},     {"long", MTLDataTypeLong, 8},
    {"ulong", MTLDataTypeULong, 8},   {"half", MTLDataTypeHalf, 2},
    {"float", MTLDataTypeFloat, 4},   {"bfloat", MTLDataTypeBFloat, 2},
};

constexpr struct {
  const char* name;
  MTLDataType type;
} kAliases[] = {
    {"int8_t", MTLDataTypeChar},    {"uint8_t", MTLDataTypeUChar},
    {"int16_t", MTLDataTypeShort},  {"uint16_t", MTLDataTypeUShort},
    {"int32_t", MTLDataTypeInt},    {"uint32_t", MTLDataTypeUInt},
    {"int64_t", MTLDataTypeLong},   {"uint64_t", MTLDataTypeULong},
    {"size_t", MTLDataTypeULong},   {"bfloat16_t", MTLDataTypeBFloat},
    {"float16_t", MTLDataTypeHalf},
};

}  // namespace

MTLDataType data_type(const std::string& type_name) {
  for (const auto& alias : kAliases) {
    if (type_name == alias.name) return alias.type;
  }
  std::string scalar = type_name;
  NSUInteger width = 1;
  if (!scalar.empty() && scalar.back() >= '2' && scalar.back() <= '4') {
    width = static_cast<NSUInteger>(scalar.back() - '0');
    scalar.pop_back();
  }
  for (const Scalar& each : kScalars) {
    if (scalar == each.name) return static_cast<MTLDataType>(each.type + width - 1);
  }
  return MTLDataTypeNone;
}

size_t size_of(MTLDataType type) {
  for (const Scalar& each : kScalars) {
    if (type < each.type || type > each.type + 3) continue;
    const size_t width = type - each.type + 1;
    return each.size * (width == 3 ? 4 : width);
  }
  return 0;
}

}  // namespace softmetal
