// From S^T and dP^T of a unit of keys and a pair of tile columns: P, D and dS. A row is a key, a
// lane a query, so that the log-sum-exp, D and all sums are those of lanes.
#pragma once

#include <algorithm>

#include "cpu/transposed/transposed_backward_operands.h"
#include "cpu/transposed/transposed_rows.h"

namespace jax_gluon::cpu {
namespace {

// A pair of tile columns of one query head, from row `first` of its block on.
template <class Core>
struct BackwardPair {
  using Isa = typename Core::Isa;
  using Operands = TransposedBackwardOperands<Core>;
  using Rules = typename TransposedRows<Core>::Rules;

  const Visibility& visibility;
  const Rules& rules;
  const DropoutRow<Isa>& dropout;
  const typename Operands::Queries& queries;
  Range rows;
  int64_t first;
  bool is_whole;  // all rows are there, and see keys

  int64_t count() const { return rows.end - rows.begin; }
  Range visible(int64_t r) const {
    return queries.statistics[first + r].empty ? Range{} : visibility.of_row(rows.begin + r);
  }
};

// Products of a unit of keys, columns of a pair one after the other, and the scales of its keys.
struct BackwardUnit {
  float *scores, *d_probability;  // [2][kUnitKeys][kTileQueries]
  float *cap_slope, *kept;        // likewise; the last is 0 where dropped, else dropout's scale
  const float *scale, *value_scale, *gradient_scale;
};

// As left operands, P and dS: [kUnitKeys][16], a row has all queries. As a right one, dS:
// [2][16][16], a lane has two keys.
struct BackwardFactors {
  uint32_t *probabilities, *d_scores, *d_score_pairs;
};

template <class Core, bool kCodes>
class TransposedGradients {
  using Isa = typename Core::Isa;
  using F = typename Isa::F;
  using Rows = TransposedRows<Core>;
  using Pair = BackwardPair<Core>;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;
  static constexpr int W = kTileQueries, kColumn = kUnitKeys * W;

 public:
  explicit TransposedGradients(const AttentionCall& call) : call_(call) {}

  // Turns products into logits where the rows don't just see all keys; returns whether it did.
  bool edit(const Pair& pair, int64_t key0, const BackwardUnit& unit) const {
    const Range keys{key0, key0 + kUnitKeys};
    const bool has_rules = pair.rules.any(pair.rows, keys);
    if (!has_rules && !pair.dropout.any() && pair.is_whole &&
        pair.visibility.all_see(pair.rows, keys)) {
      return false;
    }
    for (int64_t c = 0; c < 2; ++c) {
      float* logits = unit.scores + c * kColumn;
      to_logits(pair, c, unit, logits);
      if (has_rules) {
        Rows::apply(pair, c * W, key0, logits,
                    call_.soft_cap != 0.0f ? unit.cap_slope + c * kColumn : nullptr);
      }
      // Rows that are not there see nothing.
      if (!has_rules || !pair.is_whole) Rows::hide(pair, c * W, key0, logits);
      if (pair.dropout.any()) find_kept(pair, c, key0, unit.kept + c * kColumn);
    }
    return true;
  }

  // Adds to sums of P dP and of P, two vectors each. After every two keys `slot(steps left)` runs.
  // With kKeeps, P and dP take the place of the products.
  template <bool kEdited, bool kKeeps, class Slot>
  void add_means(const Pair& pair, const BackwardUnit& unit, float* weighted, float* total,
                 const Slot& slot) const {
    const Lanes lanes(pair);
    F sum[2], mean[2];
    for (int c = 0; c < 2; ++c) {
      sum[c] = Isa::load(total + c * W);
      mean[c] = Isa::load(weighted + c * W);
    }
    for (int j = 0; j < kUnitKeys; ++j) {
      for (int c = 0; c < 2; ++c) {
        const F p = probability<kEdited>(unit, lanes, c, j);
        const F d_p = d_probability<kEdited>(unit, c, j);
        if constexpr (kKeeps) {
          Isa::store(unit.scores + c * kColumn + j * W, p);
          Isa::store(unit.d_probability + c * kColumn + j * W, d_p);
        }
        sum[c] = Isa::add(sum[c], p);
        // Hidden keys have P = 0 exactly; their dP may be NaN.
        mean[c] = kEdited ? Isa::add(mean[c], Isa::where_nonzero(p, Isa::mul(p, d_p)))
                          : Isa::fma(p, d_p, mean[c]);
      }
      if (j % 2 == 1) slot((kUnitKeys - j + 1) / 2);
    }
    for (int c = 0; c < 2; ++c) {
      Isa::store(total + c * W, sum[c]);
      Isa::store(weighted + c * W, mean[c]);
    }
  }

  // P and dS = P (dP - D); adds to sums of dS, two vectors. `slot` as above. With kKept, P and dP
  // are what add_means kept.
  template <bool kEdited, bool kKept, class Slot>
  void find(const Pair& pair, const BackwardUnit& unit, const BackwardFactors& out, float* sums,
            const Slot& slot) const {
    const Lanes lanes(pair);
    F delta[2], factor[2], scale[2], sum[2];
    for (int c = 0; c < 2; ++c) {
      delta[c] = Isa::load(pair.queries.delta.get() + pair.first + c * W);
      factor[c] = Isa::load(pair.queries.probability_factor.get() + pair.first + c * W);
      scale[c] = Isa::load(pair.queries.gradient_scale.get() + pair.first + c * W);
      sum[c] = Isa::load(sums + c * W);
    }
    for (int g = 0; g < kUnitKeys / 2; ++g) {
      F p[2][2], d_s[2][2];  // [key][column]
      JAX_GLUON_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int j = 2 * g + k;
        JAX_GLUON_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int at = c * kColumn + j * W;
          F x, d_p;
          if constexpr (kKept) {
            x = Isa::load(unit.scores + at);
            d_p = Isa::load(unit.d_probability + at);
          } else {
            x = probability<kEdited>(unit, lanes, c, j);
            d_p = d_probability<kEdited>(unit, c, j);
          }
          x = Isa::mul(x, factor[c]);
          F y = Isa::mul(x, Isa::sub(d_p, delta[c]));
          p[k][c] = x;
          if constexpr (kEdited) {
            if (call_.soft_cap != 0.0f) y = Isa::mul(y, Isa::load(unit.cap_slope + at));
            // Where P = 0 neither dP nor the slope need be there.
            y = Isa::where_nonzero(x, y);
            if (pair.dropout.any()) p[k][c] = Isa::mul(x, Isa::load(unit.kept + at));
          }
          d_s[k][c] = y;
          sum[c] = Isa::add(sum[c], y);
        }
        Isa::store_bf16_pair(out.probabilities + j * W, p[k][0], p[k][1]);
        Isa::store_bf16_pair(out.d_scores + j * W, scaled(d_s[k][0], scale[0]),
                             scaled(d_s[k][1], scale[1]));
      }
      const F low = Isa::set1(unit.gradient_scale[2 * g]);
      const F high = Isa::set1(unit.gradient_scale[2 * g + 1]);
      JAX_GLUON_UNROLL
      for (int c = 0; c < 2; ++c) {
        const auto pairs = Isa::interleave_bf16(scaled(d_s[0][c], low), scaled(d_s[1][c], high));
        Isa::store_i32(out.d_score_pairs + (c * W + g) * W, pairs);
      }
      slot(kUnitKeys / 2 - g);
    }
    for (int c = 0; c < 2; ++c) Isa::store(sums + c * W, sum[c]);
  }

 private:
  // What a pair's logits are made of.
  struct Lanes {
    explicit Lanes(const Pair& pair) {
      for (int c = 0; c < 2; ++c) {
        const int64_t at = pair.first + c * W;
        factor[c] = Isa::load(pair.queries.factor.get() + at);
        minus_maximum[c] = Isa::sub(Isa::zero(), Isa::load(pair.queries.maximum.get() + at));
        log2_sum[c] = Isa::load(pair.queries.log2_sum.get() + at);
      }
    }
    F factor[2], minus_maximum[2], log2_sum[2];
  };

  static F scaled(F x, F scale) { return kCodes ? Isa::mul(x, scale) : x; }

  static F product(const float* at, float scale) {
    F x;
    if constexpr (kInt8) {
      x = Isa::to_float(Isa::load_i32(at));
    } else {
      x = Isa::load(at);
    }
    return kCodes ? Isa::mul(x, Isa::set1(scale)) : x;
  }

  template <bool kEdited>
  static F probability(const BackwardUnit& unit, const Lanes& lanes, int c, int j) {
    const float* at = unit.scores + c * kColumn + j * W;
    const F below =
        kEdited ? Isa::add(Isa::load(at), lanes.minus_maximum[c])
                : Isa::fma(product(at, unit.scale[j]), lanes.factor[c], lanes.minus_maximum[c]);
    // In this order: log2_sum would vanish in a large maximum.
    return Isa::template exp2<3>(Isa::sub(below, lanes.log2_sum[c]));
  }

  template <bool kEdited>
  F d_probability(const BackwardUnit& unit, int c, int j) const {
    const int at = c * kColumn + j * W;
    F x = scaled(Isa::load(unit.d_probability + at), Isa::set1(unit.value_scale[j]));
    if (kEdited && call_.dropout) {
      const F kept = Isa::load(unit.kept + at);
      x = Isa::where_nonzero(kept, Isa::mul(x, kept));
    }
    return x;
  }

  void to_logits(const Pair& pair, int64_t c, const BackwardUnit& unit, float* scores) const {
    const int64_t row = pair.first + c * W;
    const F factor = Isa::load(pair.queries.factor.get() + row);
    const F center = Isa::load(pair.queries.center.get() + row);
    for (int j = 0; j < kUnitKeys; ++j) {
      float* at = scores + j * W;
      Isa::store(at, Isa::fma(product(at, unit.scale[j]), factor, center));
    }
  }

  static void find_kept(const Pair& pair, int64_t c, int64_t key0, float* out) {
    alignas(kAlignment) float rows[W * kUnitKeys];
    uint8_t scratch[DropoutRow<Isa>::bytes(kUnitKeys)];
    std::fill(rows, rows + W * kUnitKeys, 0.0f);
    for (int64_t r = 0; r < std::min<int64_t>(W, pair.count() - c * W); ++r) {
      const uint8_t* keep =
          pair.dropout.find(pair.rows.begin + c * W + r, key0, key0 + kUnitKeys, scratch);
      for (int64_t j = 0; j < kUnitKeys; ++j) {
        rows[r * kUnitKeys + j] = keep[j] ? pair.dropout.scale() : 0.0f;
      }
    }
    Rows::turn_to_keys(rows, out);
  }

  const AttentionCall& call_;
};

}  // namespace
}  // namespace jax_gluon::cpu
