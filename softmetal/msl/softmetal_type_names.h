// Names of scalar and vector types, global and in metal, where vec and packed_vec are declared. To
// be included by metal_types and by the strict check's types alone.
#pragma once

#define SOFTMETAL_NAMES_OF(T, name, Vector) \
  using name##2 = metal::Vector<T, 2>;      \
  using name##3 = metal::Vector<T, 3>;      \
  using name##4 = metal::Vector<T, 4>;      \
  namespace metal {                         \
  using ::name##2;                          \
  using ::name##3;                          \
  using ::name##4;                          \
  }
#define SOFTMETAL_NAMES(T)      \
  SOFTMETAL_NAMES_OF(T, T, vec) \
  SOFTMETAL_NAMES_OF(T, packed_##T, packed_vec)
SOFTMETAL_NAMES(bool)
SOFTMETAL_NAMES(char)
SOFTMETAL_NAMES(uchar)
SOFTMETAL_NAMES(short)
SOFTMETAL_NAMES(ushort)
SOFTMETAL_NAMES(int)
SOFTMETAL_NAMES(uint)
SOFTMETAL_NAMES(long)
SOFTMETAL_NAMES(ulong)
SOFTMETAL_NAMES(half)
SOFTMETAL_NAMES(float)
SOFTMETAL_NAMES(bfloat)
#undef SOFTMETAL_NAMES
#undef SOFTMETAL_NAMES_OF

namespace metal {

using ::bfloat;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;

}  // namespace metal
