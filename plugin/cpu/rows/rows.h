// Rows of operands as float32, and float32 rows as results of any float type.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/memory/buffer.h"
#include "cpu/simd/convert.h"

namespace jax_gluon::cpu {
namespace {

// The element at which token i of entry b starts; of operands with a place for each `block` tokens,
// their block.
inline int64_t token_offset(const Operand& x, int64_t b, int64_t i, int64_t block = 1) {
  if (x.pages == 0) return x.batch_offset[static_cast<size_t>(b)] + i / block * x.stride[0];
  const int64_t page = i >> x.page_shift;
  return x.batch_offset[static_cast<size_t>(b * x.pages + page)] +
         (i - (page << x.page_shift)) / block * x.stride[0];
}

// The end of what lies in one piece from token `begin` on, `end` at most.
inline int64_t end_of_piece(const Operand& x, int64_t begin, int64_t end) {
  if (x.pages == 0) return end;
  return std::min(end, ((begin >> x.page_shift) + 1) << x.page_shift);
}

// Points at row (b, i, n) of an operand [B, rows, heads, columns] whose columns are contiguous.
inline const void* row_of(const Operand& x, int64_t b, int64_t i, int64_t n) {
  const int64_t offset = token_offset(x, b, i) + n * x.stride[1];
  return static_cast<const char*>(x.data) + offset * static_cast<int64_t>(size_of(x.dtype));
}

// Bytes of a row of `width` elements.
inline int64_t row_bytes(const Operand& x, int64_t width) {
  return width * static_cast<int64_t>(size_of(x.dtype)) / (x.dtype == DType::kU4x2 ? 2 : 1);
}

// Rows of one head as they are stored, `stride` bytes apart.
struct StoredRows {
  const char* data;
  int64_t stride, count;

  StoredRows part(int64_t begin, int64_t end) const {
    return {data + begin * stride, stride, end - begin};
  }
};

inline void touch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    static_cast<void>(*(static_cast<const volatile char*>(from) + byte));
  }
}

// Asks for the rows of token i, of all heads, where they lie side by side: they are read soon. The
// first line of a page is loaded: processors drop prefetches of pages that are not in the TLB.
inline void ask_for_heads(const Operand& x, int64_t b, int64_t i, int64_t heads, int64_t width) {
#if defined(__GNUC__)
  constexpr int64_t kPage = 4096, kLine = 64;
  const int64_t size = static_cast<int64_t>(size_of(x.dtype)), bytes = row_bytes(x, width);
  if (x.stride[1] * size != bytes) return;
  const char* token = static_cast<const char*>(row_of(x, b, i, 0));
  // Else the token before has ended on the page, and loaded a line of it.
  const bool is_apart = x.stride[0] * size != heads * bytes;
  for (int64_t byte = 0; byte < heads * bytes; byte += kLine) {
    const char* line = token + byte;
    if ((byte == 0 && is_apart) || reinterpret_cast<uintptr_t>(line) % kPage < kLine) {
      touch(line, 1);
    } else {
      __builtin_prefetch(line, 0, 2);
    }
  }
#else
  static_cast<void>(x), static_cast<void>(b), static_cast<void>(i);
  static_cast<void>(heads), static_cast<void>(width);
#endif
}

// Brings rows [begin, end) of all heads into the cache, in the order in which they lie in memory:
// read head by head, rows are pages apart, which no prefetcher follows. Loads, since processors
// drop software prefetches of pages that are not in the TLB: 10.5 ms became 6.4 ms where keys and
// values take 33 MB.
inline void stream_heads(const Operand& x, int64_t b, int64_t begin, int64_t end, int64_t heads,
                         int64_t width) {
  const int64_t bytes = row_bytes(x, width);
  if (heads == 1 || x.stride[1] * static_cast<int64_t>(size_of(x.dtype)) != bytes) return;
  for (int64_t i = begin; i < end; ++i) {
    touch(row_of(x, b, i, 0), heads * bytes);
  }
}

// Brings rows of one head into the cache, all at once.
inline void touch_rows(const Operand& x, int64_t b, int64_t begin, int64_t end, int64_t n,
                       int64_t width) {
  const int64_t bytes = row_bytes(x, width);
  for (int64_t i = begin; i < end; ++i) {
    touch(row_of(x, b, i, n), bytes);
  }
}

inline float scalar_of(const Operand& x, int64_t b, int64_t i, int64_t n) {
  const int64_t offset = x.batch_offset[static_cast<size_t>(b)] + i * x.stride[0] + n * x.stride[1];
  return float_at(x.data, x.dtype, offset);
}

// A vector of float32 from stored elements: floats or INT8 codes.
template <class Isa, DType dtype>
typename Isa::F load_vector(const void* elements) {
  if constexpr (dtype == DType::kF32) {
    return Isa::load(static_cast<const float*>(elements));
  } else if constexpr (dtype == DType::kBF16) {
    return Isa::load_bf16(static_cast<const uint16_t*>(elements));
  } else if constexpr (dtype == DType::kF16) {
    return Isa::load_f16(static_cast<const uint16_t*>(elements));
  } else {
    static_assert(dtype == DType::kS8);
    return Isa::load_s8(static_cast<const int8_t*>(elements));
  }
}

// Whole vectors of a row; returns how many elements that is. Rows are short: a call of memcpy would
// take as long.
template <class Isa, DType dtype>
int64_t load_vectors(const void* row, int64_t n, float* out) {
  constexpr int64_t W = Isa::kLanes;
  const char* p = static_cast<const char*>(row);
  int64_t i = 0;
  for (; i + W <= n; i += W, p += W * static_cast<int64_t>(size_of(dtype))) {
    Isa::store(out + i, load_vector<Isa, dtype>(p));
  }
  return i;
}

template <class Isa>
void load_row(const void* row, DType dtype, int64_t n, float* out) {
  int64_t i = 0;
  switch (dtype) {
    case DType::kF32:
      i = load_vectors<Isa, DType::kF32>(row, n, out);
      break;
    case DType::kBF16:
      i = load_vectors<Isa, DType::kBF16>(row, n, out);
      break;
    case DType::kF16:
      i = load_vectors<Isa, DType::kF16>(row, n, out);
      break;
    case DType::kS8:
      i = load_vectors<Isa, DType::kS8>(row, n, out);
      break;
    case DType::kU4x2:  // nibbles are unpacked first: quantized_rows.h
      break;
  }
  for (; i < n; ++i) out[i] = float_at(row, dtype, i);
}

// Row (b, i, n) of `width` elements as whole vectors of float32: in place where it is that as it
// stands, else in `scratch`, whose padding stays as it is.
template <class Isa>
const float* float_row(const Operand& x, int64_t b, int64_t i, int64_t n, int64_t width,
                       float* scratch) {
  const void* row = row_of(x, b, i, n);
  if (x.dtype == DType::kF32 && width % Isa::kLanes == 0) return static_cast<const float*>(row);
  load_row<Isa>(row, x.dtype, width, scratch);
  return scratch;
}

// Writes n floats at element `index` of a result, each multiplied by `factor`.
template <class Isa>
void store_row(const Result& out, int64_t index, const float* x, int64_t n, float factor) {
  constexpr int64_t W = Isa::kLanes;
  const auto f = Isa::set1(factor);
  int64_t i = 0;
  switch (out.dtype) {
    case DType::kF32: {
      float* p = static_cast<float*>(out.data) + index;
      for (; i + W <= n; i += W) Isa::store(p + i, Isa::mul(Isa::load(x + i), f));
      for (; i < n; ++i) p[i] = x[i] * factor;
      return;
    }
    case DType::kBF16: {
      uint16_t* p = static_cast<uint16_t*>(out.data) + index;
      for (; i < n; ++i) p[i] = bf16_from_float(x[i] * factor);
      return;
    }
    default: {
      uint16_t* p = static_cast<uint16_t*>(out.data) + index;
      for (; i + W <= n; i += W) Isa::store_f16(p + i, Isa::mul(Isa::load(x + i), f));
      for (; i < n; ++i) p[i] = f16_from_float(x[i] * factor);
      return;
    }
  }
}

template <class Isa>
float dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t W = Isa::kLanes;
  auto sum = Isa::zero(), other = Isa::zero();
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum = Isa::fma(Isa::load(a + i), Isa::load(b + i), sum);
    other = Isa::fma(Isa::load(a + i + W), Isa::load(b + i + W), other);
  }
  for (; i + W <= n; i += W) sum = Isa::fma(Isa::load(a + i), Isa::load(b + i), sum);
  float total = Isa::reduce_add(Isa::add(sum, other));
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

template <class Isa>
void scale_row(float* x, int64_t n, float factor) {
  constexpr int64_t W = Isa::kLanes;
  const auto f = Isa::set1(factor);
  int64_t i = 0;
  for (; i + W <= n; i += W) Isa::store(x + i, Isa::mul(Isa::load(x + i), f));
  for (; i < n; ++i) x[i] *= factor;
}

template <class Isa>
bool all_finite(const float* x, int64_t n) {
  constexpr int64_t W = Isa::kLanes;
  auto sum = Isa::zero(), other = sum;  // 0 * x is NaN where x is not finite
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum = Isa::fma(Isa::load(x + i), Isa::zero(), sum);
    other = Isa::fma(Isa::load(x + i + W), Isa::zero(), other);
  }
  for (; i + W <= n; i += W) sum = Isa::fma(Isa::load(x + i), Isa::zero(), sum);
  float total = Isa::reduce_add(Isa::add(sum, other));
  for (; i < n; ++i) total += 0.0f * x[i];
  return total == 0.0f;
}

inline void replace_nonfinite(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if ((bits_of(x[i]) & 0x7f800000u) == 0x7f800000u) x[i] = 0.0f;
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
