// A pair of tile columns: 32 rows of one query head, and what edits their logits.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/forward/row_group.h"
#include "cpu/rows/logit_rules.h"
#include "cpu/transposed/transposed_pack.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class TransposedRows {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  static constexpr int W = kTileQueries;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;

 public:
  using Rules = LogitRules<Isa, kUnitKeys>;
  using Group = RowGroup<Isa, Rules>;

  // Products of one column of the pair, rows of the group from `first` on, to logits in place.
  static void to_logits(const AttentionForwardCall& call, const Group& group, int64_t first,
                        const float* key_scale, float* scores) {
    const int64_t row = group.first + first;
    const F factor = Isa::load(group.state.factor + row);
    const bool adds_center = kInt8 && needs_whole_logits(call);
    const F center = adds_center ? Isa::load(group.state.center + row) : Isa::zero();
    for (int j = 0; j < kUnitKeys; ++j) {
      float* at = scores + j * W;
      if constexpr (kInt8) {
        const F scale = Isa::mul(Isa::set1(key_scale[j]), factor);
        Isa::store(at, Isa::fma(Isa::to_float(Isa::load_i32(at)), scale, center));
      } else {
        Isa::store(at, Isa::mul(Isa::load(at), factor));
      }
    }
  }

  // Hides what the rows don't see of the keys from key0 on, by their ranges alone. `group` is one
  // of either pass.
  template <class AnyGroup>
  static void hide(const AnyGroup& group, int64_t first, int64_t key0, float* logits) {
    alignas(kAlignment) float begin[W] = {}, end[W] = {};
    for (int64_t r = 0; r < std::min<int64_t>(W, group.count() - first); ++r) {
      const Range visible = group.visible(first + r);
      const auto near = [&](int64_t j) {
        return static_cast<float>(std::min<int64_t>(std::max<int64_t>(j - key0, 0), kUnitKeys));
      };
      begin[r] = near(visible.begin);
      end[r] = near(visible.end);
    }
    const F from = Isa::load(begin), to = Isa::load(end), hidden = Isa::set1(kHidden);
    for (int j = 0; j < kUnitKeys; ++j) {
      const F key = Isa::set1(static_cast<float>(j));
      const F x = Isa::where_less(key, to, Isa::load(logits + j * W), hidden);
      Isa::store(logits + j * W, Isa::where_less(key, from, hidden, x));
    }
  }

  // All rules, row by row. `cap_slope` is that of `LogitRules`.
  template <class AnyGroup>
  static void apply(const AnyGroup& group, int64_t first, int64_t key0, float* logits,
                    float* cap_slope = nullptr) {
    alignas(kAlignment) float rows[W * kUnitKeys], slopes[W * kUnitKeys];
    turn_to_rows(logits, rows);
    if (cap_slope) std::fill(slopes, slopes + W * kUnitKeys, 0.0f);
    for (int64_t r = 0; r < std::min<int64_t>(W, group.count() - first); ++r) {
      group.rules.apply(rows + r * kUnitKeys, group.rows.begin + first + r, key0, 0, kUnitKeys,
                        group.visible(first + r), cap_slope ? slopes + r * kUnitKeys : nullptr);
    }
    turn_to_keys(rows, logits);
    if (cap_slope) turn_to_keys(slopes, cap_slope);
  }

  // Takes what is dropped out of P.
  static void drop(const Group& group, int64_t first, int64_t key0, uint32_t* pairs) {
    uint8_t scratch[DropoutRow<Isa>::bytes(kUnitKeys)];
    for (int64_t r = 0; r < std::min<int64_t>(W, group.count() - first); ++r) {
      const uint8_t* keep =
          group.dropout.find(group.rows.begin + first + r, key0, key0 + kUnitKeys, scratch);
      for (int64_t g = 0; g < kUnitKeys / 2; ++g) {
        const uint32_t low = keep[2 * g] ? 0xffffu : 0u, high = keep[2 * g + 1] ? 0xffff0000u : 0u;
        pairs[g * W + r] &= low | high;
      }
    }
  }

  // Logits of 16 queries: [keys][queries] to [queries][keys], and back.
  static void turn_to_rows(const float* logits, float* rows) {
    for (int half = 0; half < kUnitKeys / W; ++half) {
      TransposedPack<Isa>::turn(logits + half * W * W, W, rows + half * W, kUnitKeys);
    }
  }
  static void turn_to_keys(const float* rows, float* logits) {
    for (int half = 0; half < kUnitKeys / W; ++half) {
      TransposedPack<Isa>::turn(rows + half * W, kUnitKeys, logits + half * W * W, W);
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
