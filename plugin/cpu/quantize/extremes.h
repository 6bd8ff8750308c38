// The smallest and largest elements of what shares a scale.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace jax_gluon::cpu {
namespace {

// Of each column of rows, in `memory` for 3 * width floats; the probe is NaN where one is not
// finite. `width` is a multiple of the lanes.
template <class Isa>
struct ColumnExtremes {
  using F = typename Isa::F;

  float* memory;
  int64_t width;

  float* min() const { return memory; }
  float* max() const { return memory + width; }
  float* probe() const { return memory + 2 * width; }

  void clear() const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    std::fill(min(), min() + width, kInfinity);
    std::fill(max(), max() + width, -kInfinity);
    std::fill(probe(), probe() + width, 0.0f);
  }

  void add(const float* row) const {
    const F zero = Isa::zero();
    for (int64_t h = 0; h < width; h += Isa::kLanes) {
      const F x = Isa::load(row + h), least = Isa::load(min() + h);
      Isa::store(min() + h, Isa::where_less(x, least, x, least));
      Isa::store(max() + h, Isa::max(Isa::load(max() + h), x));
      Isa::store(probe() + h, Isa::fma(x, zero, Isa::load(probe() + h)));
    }
  }

  void merge(const ColumnExtremes& from) const {
    for (int64_t h = 0; h < width; ++h) {
      min()[h] = std::min(min()[h], from.min()[h]);
      max()[h] = std::max(max()[h], from.max()[h]);
      probe()[h] += from.probe()[h];
    }
  }
};

// Of n elements; NaN where one is not finite.
template <class Isa>
void find_extremes(const float* row, int64_t n, float* low, float* high) {
  using F = typename Isa::F;
  constexpr int64_t W = Isa::kLanes;
  const F zero = Isa::zero();
  F max = Isa::set1(row[0]), minus_min = Isa::set1(-row[0]), probe = zero;
  int64_t h = 0;
  for (; h + W <= n; h += W) {
    const F x = Isa::load(row + h);
    max = Isa::max(max, x);
    minus_min = Isa::max(minus_min, Isa::sub(zero, x));
    probe = Isa::fma(x, zero, probe);
  }
  *high = Isa::reduce_max(max);
  *low = -Isa::reduce_max(minus_min);
  float finite = Isa::reduce_add(probe);
  for (; h < n; ++h) {
    *low = std::min(*low, row[h]);
    *high = std::max(*high, row[h]);
    finite += 0.0f * row[h];
  }
  if (finite != 0.0f) *low = *high = finite;  // NaN
}

}  // namespace
}  // namespace jax_gluon::cpu
