// The online softmax of a block of rows (Milakov and Gimelshein 2018): products to logits, logits
// to probabilities.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/row_group.h"
#include "cpu/rows/logit_rules.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class OnlineSoftmax {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  using F = typename Isa::F;
  static constexpr int W = Isa::kLanes, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  static constexpr int kDegree = ForwardBlocks<Core>::kExp2Degree;

 public:
  // Per subtile and row of a group: what turns integer sums into the running scale.
  using SubtileFactors = float[kBlockKeys / kSubtileKeys][kGroupRows];

  explicit OnlineSoftmax(const AttentionForwardCall& call) : call_(call) {}

  // The products of row r of a group with the keys of `columns`, of `keys`, to logits, hidden where
  // the row does not see them.
  template <class Rules>
  void edit(const RowGroup<Isa, Rules>& group, int64_t r, const KeyBlock<Core>& keys, Range columns,
            float* scores) const {
    const RowState& state = group.state;
    const int64_t row = group.first + r;
    if constexpr (kInt8) {
      to_logits(keys.scales(), columns, scores, row, state);
    } else if constexpr (kBf16) {
      scale_row<Isa>(scores + columns.begin, columns.end - columns.begin, state.factor[row]);
    } else {
      add_center(columns, scores, state.center[row]);
    }
    group.rules.apply(scores, group.rows.begin + r, keys.first, columns.begin, columns.end,
                      group.visible(r));
  }

  // Scores of a group, rows of kBlockKeys; those of its probabilities; and what becomes of sums:
  // the factor of all that was accumulated before, and INT8 of each subtile's.
  struct Scores {
    alignas(kAlignment) float rescale[kGroupRows];
    float* scores;
    Lane* probabilities;
    alignas(kAlignment) SubtileFactors subtile_factor;
  };

  // Logits to probabilities relative to the running maximum, which may grow. With kScale, the
  // scores are products that the row's factor makes logits.
  template <bool kScale>
  void run(int64_t r, int64_t row, Range columns, RowState& state, Scores& out) const {
    const int64_t begin = columns.begin, end = columns.end;
    const float* scores = out.scores + r * kBlockKeys;
    Lane* probabilities = out.probabilities + r * (kBlockKeys / G);
    float& rescale = out.rescale[r];
    const F factor = Isa::set1(state.factor[row]);
    const auto logit = [&](int64_t j) {
      const F x = Isa::load(scores + j);
      return kScale ? Isa::mul(x, factor) : x;
    };
    F m0 = Isa::set1(kHidden), m1 = m0;
    static_assert(C % (2 * W) == 0 || C == W);
    constexpr int kUnroll = C == W ? 1 : 2;
    for (int64_t j = begin; j < end; j += kUnroll * W) {
      m0 = Isa::max(m0, logit(j));
      if constexpr (kUnroll == 2) m1 = Isa::max(m1, logit(j + W));
    }
    const float before = state.maximum[row];
    const float now = std::max(before, Isa::reduce_max(Isa::max(m0, m1)));
    if (now == kHidden) {
      // Nothing visible yet. (A NaN is not hidden: it must reach the output.)
      rescale = 1.0f;
      bool nan = false;
      for (int64_t j = begin; j < end; ++j) nan |= scores[j] != scores[j];
      if (!nan) {
        std::fill(probabilities + begin / G, probabilities + end / G, Lane(0));
        return;
      }
    }
    const F minus_max = Isa::set1(now == kHidden ? 0.0f : -now);
    F l0 = Isa::zero(), l1 = l0;
    for (int64_t j = begin; j < end; j += kUnroll * W) {
      const F p0 = Isa::template exp2<kDegree>(Isa::add(logit(j), minus_max));
      l0 = Isa::add(l0, p0);
      F p1 = Isa::zero();
      if constexpr (kUnroll == 2) {
        p1 = Isa::template exp2<kDegree>(Isa::add(logit(j + W), minus_max));
        l1 = Isa::add(l1, p1);
      }
      if constexpr (kBf16 && kUnroll == 2) {
        Isa::store_bf16_pair(probabilities + j / G, p0, p1);
      } else if constexpr (kBf16) {
        Isa::store_bf16(probabilities + j / G, p0);
      } else {
        Isa::store(reinterpret_cast<float*>(probabilities) + j, p0);
        if constexpr (kUnroll == 2) Isa::store(reinterpret_cast<float*>(probabilities) + j + W, p1);
      }
    }
    rescale = before == kHidden ? (state.sum[row] == 0.0f ? 0.0f : 1.0f) : std::exp2(before - now);
    state.maximum[row] = now;
    state.sum[row] = state.sum[row] * rescale + Isa::reduce_add(Isa::add(l0, l1));
  }

  // 8-bit probabilities: integer scores, or logits in subtiles that have a bit in `edited`, become
  // logit + log2(value scale) in place; each subtile of keys is rounded against its own maximum of
  // them; the normaliser, and the sum of value offsets, take the unrounded probabilities.
  template <bool kValueOffsets>
  void run_int8(int64_t r, int64_t row, const KeyScales& keys, Range columns, uint32_t edited,
                RowState& state, Scores& out) const {
    const int64_t begin = columns.begin, end = columns.end;
    float* scores = out.scores + r * kBlockKeys;
    const float* fold = keys.fold_log2;
    const float* inverse = keys.fold_inverse;
    const float* key_scale = keys.scale;
    [[maybe_unused]] const float* value_offset = keys.value_offset;
    const F row_factor = Isa::set1(state.factor[row]);
    // Of each subtile: the largest of its numbers, and what they are relative to.
    float subtile_max[kBlockKeys / kSubtileKeys], origin[kBlockKeys / kSubtileKeys];
    const float first_origin = state.origin[row];
    float before = state.maximum[row], now = before;
    for (int64_t j0 = begin; j0 < end; j0 += kSubtileKeys) {
      if (call_.bias) move_origin(j0, j0 + kSubtileKeys, scores, row, state, now);
      origin[j0 / kSubtileKeys] = state.origin[row];
      const bool are_logits = edited >> (j0 / kSubtileKeys) & 1;
      F m = Isa::set1(kEmptySubtileMaximum);
      for (int64_t j = j0; j < j0 + kSubtileKeys; j += W) {
        const F x = are_logits ? Isa::add(Isa::load(scores + j), Isa::load(fold + j))
                               : Isa::fma(unbiased(scores + j, row, state),
                                          Isa::mul(Isa::load(key_scale + j), row_factor),
                                          Isa::load(fold + j));
        Isa::store(scores + j, x);
        m = Isa::max(m, x);
      }
      const float largest = Isa::reduce_max(m);
      subtile_max[j0 / kSubtileKeys] = largest;
      if (largest > kEmptySubtileMaximum) now = std::max(now, largest);
    }
    const float last_origin = state.origin[row];
    if (before != kHidden) before += first_origin - last_origin;
    const float reference = now == kHidden ? 0.0f : now;
    const float rescale = before == kHidden ? 0.0f : std::exp2(before - reference);
    out.rescale[r] = rescale;
    float sum = state.sum[row] * rescale, offset_sum = state.value_offset[row] * rescale;
    // Vectors that are stored together.
    constexpr int kStored = Isa::kInt8Group;
    char* bytes = reinterpret_cast<char*>(out.probabilities + r * (kBlockKeys / G));
    for (int64_t j0 = begin; j0 < end; j0 += kSubtileKeys) {
      const float largest = subtile_max[j0 / kSubtileKeys];
      const F shift = Isa::set1(kLog2OfMaxProbability - largest);
      F l = Isa::zero(), offsets = Isa::zero();
      for (int64_t j = j0; j < j0 + kSubtileKeys; j += kStored * W) {
        F p[kStored];
        for (int i = 0; i < kStored; ++i) {
          p[i] = Isa::template exp2<kDegree>(Isa::add(Isa::load(scores + j + i * W), shift));
          if constexpr (kValueOffsets) {
            const F unfolded = Isa::mul(p[i], Isa::load(inverse + j + i * W));
            offsets = Isa::fma(unfolded, Isa::load(value_offset + j + i * W), offsets);
            l = Isa::add(l, unfolded);
          } else {
            l = Isa::fma(p[i], Isa::load(inverse + j + i * W), l);
          }
        }
        Isa::store_probabilities(bytes + j * kProbabilityBytes<Core>, p);
      }
      const float move = origin[j0 / kSubtileKeys] - last_origin;
      const float factor = largest > kEmptySubtileMaximum
                               ? std::exp2(largest + move - reference) * (1.0f / kMaxProbability)
                               : 0.0f;
      if (largest > kEmptySubtileMaximum && move != 0.0f) {
        for (int64_t j = j0; j < j0 + kSubtileKeys; ++j) scores[j] += move;
      }
      out.subtile_factor[j0 / kSubtileKeys][r] = factor;
      const float total = Isa::reduce_add(l);
      // Not total * 0 for an empty subtile: a NaN logit must reach the output.
      sum += total != total ? total : factor * total;
      if constexpr (kValueOffsets) {
        if (factor != 0.0f) offset_sum += factor * Isa::reduce_add(offsets);
      }
    }
    if constexpr (kValueOffsets) state.value_offset[row] = offset_sum;
    state.maximum[row] = now;
    state.sum[row] = sum;
  }

  // Makes logits relative to the largest so far: log2(value scale) would vanish in a logit of -1e9.
  void move_origin(int64_t begin, int64_t end, float* scores, int64_t row, RowState& state,
                   float& maximum) const {
    F m = Isa::set1(kHidden);
    for (int64_t j = begin; j < end; j += W) m = Isa::max(m, Isa::load(scores + j));
    const float before = state.origin[row], now = std::max(before, Isa::reduce_max(m));
    if (now == kHidden) return;
    state.origin[row] = now;
    if (maximum != kHidden) maximum += before - now;
    const F origin = Isa::set1(now);
    for (int64_t j = begin; j < end; j += W) {
      Isa::store(scores + j, Isa::sub(Isa::load(scores + j), origin));
    }
  }

 private:
  static F unbiased(const float* scores, int64_t row, const RowState& state) {
    const F score = Isa::to_float(Isa::load_i32(scores));
    if constexpr (Core::kKeyBias == 0) return score;
    return Isa::sub(score, Isa::set1(static_cast<float>(state.key_bias[row])));
  }

  // What centering took from the logits of a row, if bias or soft cap need it.
  void add_center(Range columns, float* scores, float center) const {
    if (!needs_whole_logits(call_) || center == 0.0f) return;
    for (int64_t j = columns.begin; j < columns.end; j += W) {
      Isa::store(scores + j, Isa::add(Isa::load(scores + j), Isa::set1(center)));
    }
  }

  // Integer scores to logits, in place: (score - bias) * key scale * row factor, plus what offsets
  // add, and what centering took away if bias or soft cap need it.
  void to_logits(const KeyScales& keys, Range columns, float* scores, int64_t row,
                 const RowState& state) const {
    const int64_t begin = columns.begin, end = columns.end;
    const float* key_scale = keys.scale;
    const F center = Isa::set1(needs_whole_logits(call_) ? state.center[row] : 0.0f);
    for (int64_t j = begin; j < end; j += W) {
      const F factor = Isa::mul(Isa::load(key_scale + j), Isa::set1(state.factor[row]));
      Isa::store(scores + j, Isa::fma(unbiased(scores + j, row, state), factor, center));
    }
    if (!keys.offset) return;
    const float* offset = keys.offset;
    const float* code_sum = keys.code_sum;
    const F query_sum = Isa::set1(state.query_sum[row]);
    const F query_offset = Isa::set1(state.query_offset[row]);
    for (int64_t j = begin; j < end; j += W) {
      const F logit = Isa::fma(Isa::load(offset + j), query_sum, Isa::load(scores + j));
      Isa::store(scores + j, Isa::fma(Isa::load(code_sum + j), query_offset, logit));
    }
  }

  const AttentionForwardCall& call_;
};

}  // namespace
}  // namespace jax_gluon::cpu
