// The online softmax of a group of rows over one subtile of keys: its logits stay in registers
// between the maximum and the exponentials, and what concerns a row alone is done for all rows of
// the group at once.
#pragma once

#include <algorithm>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/packed_key_values.h"
#include "cpu/rows/logit_rules.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class SubtileSoftmax {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  using F = typename Isa::F;
  static constexpr int W = Isa::kLanes, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  static constexpr int kKeys = ForwardBlocks<Core>::kSubtileColumns;
  static constexpr int kDegree = ForwardBlocks<Core>::kExp2Degree;
  static constexpr int kRows = round_up(kGroupRows, W);
  // INT8, base 2: by how much a row's maximum grows before its sums are rescaled. They have room
  // for 2^8 more.
  static constexpr float kMinGrowth = 8.0f;

 public:
  // One subtile of a group: a number per row, or a vector of sums that are still apart.
  struct Group {
    alignas(kAlignment) float largest[kRows] = {};
    alignas(kAlignment) float rescale[kRows] = {};  // of all that was accumulated before
    alignas(kAlignment) float factor[kRows] = {};   // INT8: of the sums of codes
    bool rescales = true;                           // INT8: whether any row's rescale is not 1
    alignas(kAlignment) float sums[kGroupRows * W] = {};
    alignas(kAlignment) float offset_sums[kGroupRows * W] = {};
  };

  // Rows of scores and probabilities, kKeys apart, and what their block keeps of each.
  struct Rows {
    float* scores;
    Lane* probabilities;
    const float *factor, *maximum;  // of products; before this subtile
    const int32_t* key_bias;

    Rows from(int64_t r) const {
      return {scores + r * kKeys, probabilities + r * (kKeys / G), factor + r, maximum + r,
              key_bias + r};
    }
  };

  // Float probabilities of row r of the group, the first of `rows`, relative to its largest logit
  // so far. With kScale, scores are products that the factor makes logits.
  template <bool kScale>
  static void run_row(const Rows& rows, int64_t columns, int64_t r, Group& group) {
    run_columns<kScale, kKeys>(rows, columns, r, group);
  }

  // Rows of codes that are taken at once: one row's steps wait for each other, several fill the
  // processor.
  static constexpr int kRowsAtOnce = Isa::kRegisters / 2 / (kSubtileKeys / W) >= 4 ? 4 : 1;

  // 8-bit probabilities of kRows rows, r and the next of the group, each against its own maximum of
  // the subtile; scores are logits, or products of codes. With kKeep, they become what
  // probabilities were made from: logit + log2(value scale).
  template <int kRows, bool kLogits, bool kKeep, bool kValueOffsets>
  static void run_rows_int8(const KeyScales& keys, const Rows& rows, int64_t r, Group& group) {
    constexpr int kVectors = kKeys / W;
    F x[kRows][kVectors], m[kRows][2];
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) m[i][0] = m[i][1] = Isa::set1(kEmptySubtileMaximum);
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F fold = Isa::load(keys.fold_log2 + v * W);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float* at = rows.scores + i * kKeys + v * W;
        if constexpr (kLogits) {
          x[i][v] = Isa::add(Isa::load(at), fold);
        } else {
          F score = Isa::to_float(Isa::load_i32(at));
          if constexpr (Core::kKeyBias != 0) {
            score = Isa::sub(score, Isa::set1(static_cast<float>(rows.key_bias[i])));
          }
          const F factor = Isa::mul(Isa::load(keys.scale + v * W), Isa::set1(rows.factor[i]));
          x[i][v] = Isa::fma(score, factor, fold);
        }
        if constexpr (kKeep) Isa::store(at, x[i][v]);
        m[i][v % 2] = Isa::max(m[i][v % 2], x[i][v]);
      }
    }
    F sum[kRows];
    [[maybe_unused]] F offsets[kRows];
    float largest[kRows];
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      largest[i] = Isa::reduce_max(Isa::max(m[i][0], m[i][1]));
      group.largest[r + i] = largest[i];
      group.rescales |= largest[i] > rows.maximum[i] + kMinGrowth;
      sum[i] = Isa::zero();
      if constexpr (kValueOffsets) offsets[i] = Isa::zero();
    }
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F inverse = Isa::load(keys.fold_inverse + v * W);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const F shift = Isa::set1(kLog2OfMaxProbability - largest[i]);
        x[i][v] = Isa::template exp2<kDegree>(Isa::add(x[i][v], shift));
        if constexpr (kValueOffsets) {
          const F unfolded = Isa::mul(x[i][v], inverse);
          offsets[i] = Isa::fma(unfolded, Isa::load(keys.value_offset + v * W), offsets[i]);
          sum[i] = Isa::add(sum[i], unfolded);
        } else {
          sum[i] = Isa::fma(x[i][v], inverse, sum[i]);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      char* row = reinterpret_cast<char*>(rows.probabilities + i * (kKeys / G));
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; v += Isa::kInt8Group)
        Isa::store_probabilities(row + v * W * kProbabilityBytes<Core>, x[i] + v);
      Isa::store(group.sums + (r + i) * W, sum[i]);
      if constexpr (kValueOffsets) Isa::store(group.offset_sums + (r + i) * W, offsets[i]);
    }
  }

  // After its rows: moves the maxima of the group, and adds to its sums, kept apart by lane.
  static void finish(float* maximum, float* sums, float* offset_sums, Group& group) {
    if (kInt8 && !group.rescales) {
      JAX_GLUON_UNROLL
      for (int r = 0; r < kRows; r += W) {
        alignas(kAlignment) float before[W] = {};
        std::copy(maximum + r, maximum + std::min(r + W, kGroupRows), before);
        const F largest = Isa::load(group.largest + r);
        const F factor =
            Isa::mul(power(largest, Isa::load(before)), Isa::set1(1.0f / kMaxProbability));
        Isa::store(group.factor + r,
                   Isa::where_less(Isa::set1(kEmptySubtileMaximum), largest, factor, Isa::zero()));
      }
      add<false>(group.sums, group, sums);
      if (offset_sums) add<false>(group.offset_sums, group, offset_sums);
      return;
    }
    alignas(kAlignment) float before[kRows] = {}, now[kRows];
    std::copy(maximum, maximum + kGroupRows, before);
    const F hidden = Isa::set1(kHidden), floor = Isa::set1(kEmptySubtileMaximum);
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; r += W) {
      const F largest = Isa::load(group.largest + r), old = Isa::load(before + r);
      F maximum_now = Isa::max(largest, old);
      if constexpr (kInt8) {
        // What was accumulated is rescaled only where the subtile's maximum is far above it.
        const F far = Isa::add(old, Isa::set1(kMinGrowth));
        maximum_now =
            Isa::where_less(floor, largest, Isa::where_less(far, largest, largest, old), old);
      }
      const F reference = Isa::where_less(hidden, maximum_now, maximum_now, Isa::zero());
      Isa::store(now + r, maximum_now);
      Isa::store(group.rescale + r, power(old, reference));
      if constexpr (kInt8) {
        const F factor = Isa::mul(power(largest, reference), Isa::set1(1.0f / kMaxProbability));
        Isa::store(group.factor + r, Isa::where_less(floor, largest, factor, Isa::zero()));
      }
    }
    std::copy(now, now + kGroupRows, maximum);
    add<true>(group.sums, group, sums);
    if (offset_sums) add<true>(group.offset_sums, group, offset_sums);
  }

 private:
  // exp2(x - reference); 1 where they are equal, which the polynomial is not: a factor beside 1
  // would build up from subtile to subtile.
  static F power(F x, F reference) {
    const F result = Isa::template exp2<5>(Isa::sub(x, reference));
    return Isa::where_less(x, reference, result,
                           Isa::where_less(reference, x, result, Isa::set1(1.0f)));
  }

  // Rows of fewer columns than a subtile: those at the end of what a group sees.
  template <bool kScale, int kColumns>
  static void run_columns(const Rows& rows, int64_t columns, int64_t r, Group& group) {
    if constexpr (kColumns > C) {
      if (columns < kColumns) {
        run_columns<kScale, kColumns - C>(rows, columns, r, group);
        return;
      }
    }
    const float before = *rows.maximum;
    float* out = reinterpret_cast<float*>(rows.probabilities);
    constexpr int kVectors = kColumns / W;
    F x[kVectors], m[2] = {Isa::set1(kHidden), Isa::set1(kHidden)};
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      x[v] = Isa::load(rows.scores + v * W);
      if constexpr (kScale) x[v] = Isa::mul(x[v], Isa::set1(*rows.factor));
      m[v % 2] = Isa::max(m[v % 2], x[v]);
    }
    const float largest = Isa::reduce_max(Isa::max(m[0], m[1]));
    const float now = largest > before ? largest : before;
    const F shift = Isa::set1(now == kHidden ? 0.0f : -now);
    F sum[2] = {Isa::zero(), Isa::zero()};
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      x[v] = Isa::template exp2<kDegree>(Isa::add(x[v], shift));
      sum[v % 2] = Isa::add(sum[v % 2], x[v]);
      if constexpr (!kBf16) Isa::store(out + v * W, x[v]);
    }
    if constexpr (kBf16 && C == W) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; ++v) Isa::store_bf16(rows.probabilities + v * W / G, x[v]);
    } else if constexpr (kBf16) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; v += 2) {
        Isa::store_bf16_pair(rows.probabilities + v * W / G, x[v], x[v + 1]);
      }
    }
    group.largest[r] = now;
    Isa::store(group.sums + r * W, Isa::add(sum[0], sum[1]));
  }

  template <bool kRescales>
  static void add(const float* subtile, const Group& group, float* sums) {
    JAX_GLUON_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      F sum = Isa::load(subtile + r * W), before = Isa::load(sums + r * W);
      if constexpr (kInt8) sum = Isa::mul(sum, Isa::set1(group.factor[r]));
      if constexpr (kRescales) {
        sum = Isa::fma(before, Isa::set1(group.rescale[r]), sum);
      } else {
        sum = Isa::add(before, sum);
      }
      Isa::store(sums + r * W, sum);
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
