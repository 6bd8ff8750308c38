// The rows of one head, read and written together: of rows this short a call and a look at the type
// for each would cost as much as its elements.
#pragma once

#include "cpu/rows/rows.h"
#include "cpu/rows/visibility.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa, DType dtype>
bool load_head_as(const Operand& x, const char* row, int64_t count, int64_t n, float* out,
                  int64_t stride) {
  constexpr auto kBytes = static_cast<int64_t>(size_of(dtype));
  constexpr int64_t W = Isa::kLanes;
  auto probe = Isa::zero(), other = probe;  // 0 * x is NaN where x is not finite
  float tail_probe = 0.0f;
  for (int64_t i = 0; i < count; ++i, row += x.stride[0] * kBytes, out += stride) {
    int64_t h = 0;
    const auto load = [&](int64_t at, auto sum) {
      const auto v = load_vector<Isa, dtype>(row + at * kBytes);
      Isa::store(out + at, v);
      return Isa::fma(v, Isa::zero(), sum);
    };
    for (; h + 2 * W <= n; h += 2 * W) {
      probe = load(h, probe);
      other = load(h + W, other);
    }
    for (; h + W <= n; h += W) probe = load(h, probe);
    for (; h < n; ++h) {
      out[h] = float_at(row, dtype, h);
      tail_probe += 0.0f * out[h];
    }
  }
  return Isa::reduce_add(Isa::add(probe, other)) + tail_probe == 0.0f;
}

// Some rows of head n of batch entry b.
struct HeadRows {
  int64_t b, n;
  Range rows;

  int64_t count() const { return rows.end - rows.begin; }
};

// Rows of a float operand, `stride` apart. Returns whether all are finite.
template <class Isa>
bool load_head(const Operand& x, const HeadRows& head, int64_t width, float* out, int64_t stride) {
  const char* row = static_cast<const char*>(row_of(x, head.b, head.rows.begin, head.n));
  const int64_t count = head.count();
  switch (x.dtype) {
    case DType::kF32:
      return load_head_as<Isa, DType::kF32>(x, row, count, width, out, stride);
    case DType::kBF16:
      return load_head_as<Isa, DType::kBF16>(x, row, count, width, out, stride);
    default:
      return load_head_as<Isa, DType::kF16>(x, row, count, width, out, stride);
  }
}

struct FloatRows {
  const float* data;
  int64_t stride, width;
};

// Rows of a result; row i of them is multiplied by factor(i).
template <class Isa, class Factor>
void store_head(const Result& out, const HeadRows& head, FloatRows rows, Factor factor) {
  constexpr int64_t W = Isa::kLanes;
  const int64_t step = out.stride[1], count = head.count();
  int64_t index = out.at(head.b, head.rows.begin, head.n);
  const float* x = rows.data;
  if (out.dtype != DType::kF32) {
    for (int64_t i = 0; i < count; ++i, x += rows.stride, index += step) {
      store_row<Isa>(out, index, x, rows.width, factor(i));
    }
    return;
  }
  float* p = static_cast<float*>(out.data) + index;
  for (int64_t i = 0; i < count; ++i, x += rows.stride, p += step) {
    const float scalar = factor(i);
    const auto f = Isa::set1(scalar);
    int64_t h = 0;
    for (; h + W <= rows.width; h += W) Isa::store(p + h, Isa::mul(Isa::load(x + h), f));
    for (; h < rows.width; ++h) p[h] = x[h] * scalar;
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
