// The center of rows: what centering takes away from each channel of a head.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/rows/rows.h"

namespace jax_gluon::cpu {
namespace {

// The lower median of the finite values of each column of `rows`, `count` of them `stride` apart;
// `width` is a multiple of the lanes. Sorts the columns in place; a column without finite values
// gives 0, and so does a median over kLargestCenter.
template <class Isa>
void median_of_rows(float* rows, int64_t count, int64_t stride, int64_t width, float* out) {
  using F = typename Isa::F;
  constexpr int64_t W = Isa::kLanes;
  const F infinity = Isa::set1(std::numeric_limits<float>::infinity());
  for (int64_t h = 0; h < width; h += W) {
    F finite = Isa::zero();
    for (int64_t i = 0; i < count; ++i) {
      float* at = rows + i * stride + h;
      const F x = Isa::load(at), size = Isa::abs(x);
      Isa::store(at, Isa::where_less(size, infinity, x, infinity));
      finite = Isa::add(finite, Isa::where_less(size, infinity, Isa::set1(1.0f), Isa::zero()));
    }
    // Odd-even transposition: what is not finite goes to the end.
    for (int64_t pass = 0; pass < count; ++pass) {
      for (int64_t i = pass % 2; i + 1 < count; i += 2) {
        float* at = rows + i * stride + h;
        const F a = Isa::load(at), b = Isa::load(at + stride);
        Isa::store(at, Isa::where_less(a, b, a, b));
        Isa::store(at + stride, Isa::where_less(a, b, b, a));
      }
    }
    alignas(kAlignment) float counted[W];
    Isa::store(counted, finite);
    for (int64_t x = 0; x < W; ++x) {
      const auto n = static_cast<int64_t>(counted[x]);
      const float median = n > 0 ? rows[(n - 1) / 2 * stride + h + x] : 0.0f;
      out[h + x] = std::fabs(median) <= kLargestCenter ? median : 0.0f;
    }
  }
}

}  // namespace
}  // namespace jax_gluon::cpu
