// The online softmax of S^T: a row is a key, a lane a query, so that maximum, sum and scales are
// those of lanes, and no step goes across them. Probabilities are bfloat16.
#pragma once

#include "cpu/rows/logit_rules.h"
#include "cpu/simd/compiler.h"
#include "cpu/transposed/tile_cores.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
struct TransposedSoftmax {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  static constexpr int W = kTileQueries;
  static_assert(Isa::kLanes == W);
  // Probabilities are relative to a reference, base 2, that is moved where a logit is larger by
  // more than this: sums have room for it.
  static constexpr float kMinGrowth = 8.0f;

  // The largest score of each query, NaN aside; products of codes become floats, in units of the
  // query's.
  static F largest_product(float* scores, const float* key_scale) {
    F m[2] = {Isa::set1(kHidden), Isa::set1(kHidden)};
    JAX_GLUON_UNROLL
    for (int j = 0; j < kUnitKeys; ++j) {
      F x;
      if constexpr (Core::kArithmetic == Arithmetic::kInt8) {
        x = Isa::mul(Isa::to_float(Isa::load_i32(scores + j * W)), Isa::set1(key_scale[j]));
        Isa::store(scores + j * W, x);
      } else {
        x = Isa::load(scores + j * W);
      }
      m[j % 2] = Isa::max(x, m[j % 2]);
    }
    return Isa::max(m[0], m[1]);
  }
  static F largest(const float* logits) {
    F m = Isa::set1(kHidden);
    for (int j = 0; j < kUnitKeys; ++j) m = Isa::max(Isa::load(logits + j * W), m);
    return m;
  }

  // Whether any query's largest logit is too far above its reference.
  static bool outgrows(F largest, F reference) {
    return Isa::any_less(Isa::add(reference, Isa::set1(kMinGrowth)), largest);
  }
  static F grown(F largest, F reference) {
    const F far = Isa::add(reference, Isa::set1(kMinGrowth));
    return Isa::where_less(far, largest, largest, reference);
  }

  // P of the unit's scores times `factor`, relative to `reference`; returns their sums before they
  // are rounded. After every two keys `slot(step)` runs.
  template <class Slot>
  JAX_GLUON_INLINE static F probabilities(const float* scores, F factor, F reference, uint32_t* out,
                                          const Slot& slot) {
    // Of a query that has seen no key nothing is subtracted.
    const F shift = Isa::where_less(Isa::set1(kHidden), reference, Isa::sub(Isa::zero(), reference),
                                    Isa::zero());
    const auto power = [&](int j) {
      return Isa::template exp2<3>(Isa::fma(Isa::load(scores + j * W), factor, shift));
    };
    F even = Isa::zero(), odd = Isa::zero();
    for (int g = 0; g < kUnitKeys / 2; ++g) {
      const F low = power(2 * g), high = power(2 * g + 1);
      even = Isa::add(even, low);
      odd = Isa::add(odd, high);
      Isa::store_i32(out + g * W, Isa::interleave_bf16(low, high));
      slot(g);
    }
    return Isa::add(even, odd);
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
