// The online softmax of a group of rows over one subtile of keys: its logits stay in registers
// between the maximum and the exponentials, and what concerns a row alone is done for all rows of
// the group at once.
#pragma once

#include <algorithm>

#include "forward_blocks.h"
#include "logits.h"
#include "microkernel.h"
#include "online_softmax.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class SubtileSoftmax {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  using F = typename Isa::F;
  static constexpr int W = Isa::kLanes, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = ForwardBlocks<Core>::kGroupRows;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  static constexpr int kKeys = ForwardBlocks<Core>::kSubtileColumns;
  static constexpr int kDegree = kInt8 || kBf16 ? 3 : 5;
  static constexpr int kRows = round_up(kGroupRows, W);
  // As in OnlineSoftmax: what a subtile with nothing visible has for a maximum.
  static constexpr float kFloor = -1e30f;

 public:
  // One subtile of a group: a number per row, or a vector of sums that are still apart.
  struct Group {
    alignas(kAlignment) float largest[kRows] = {};
    alignas(kAlignment) float rescale[kRows] = {};  // of all that was accumulated before
    alignas(kAlignment) float factor[kRows] = {};   // INT8: of the sums of codes
    alignas(kAlignment) float sums[kGroupRows * W] = {};
    alignas(kAlignment) float offset_sums[kGroupRows * W] = {};
  };

  // Float probabilities of a row, `columns` of them, relative to the largest logit so far. With
  // kScale, `scores` are products that `factor` makes logits.
  template <bool kScale>
  static void run_row(const float* scores, int64_t columns, int64_t r, float factor, float before,
                      Lane* out, Group& group) {
    run_columns<kScale, kKeys>(scores, columns, r, factor, before, out, group);
  }

  // What `scores` of codes are: products, whose logits are rounded together with log2(value scale)
  // or by themselves, or logits.
  enum class Scores { kProducts, kRoundedProducts, kLogits };

  // 8-bit probabilities of a row, against the subtile's own maximum. With kKeep, scores become what
  // they were made from: logit + log2(value scale).
  template <Scores kScores, bool kKeep, bool kValueOffsets>
  static void run_row_int8(const KeyScales& keys, float* scores, int64_t r, float row_factor,
                           float key_bias, Lane* out, Group& group) {
    constexpr float kLog2Of255 = 7.99435344f;
    constexpr int kVectors = kKeys / W;
    F x[kVectors], m[2] = {Isa::set1(kFloor), Isa::set1(kFloor)};
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const F fold = Isa::load(keys.fold_log2 + v * W);
      if constexpr (kScores == Scores::kLogits) {
        x[v] = Isa::add(Isa::load(scores + v * W), fold);
      } else {
        F score = Isa::to_float(Isa::load_i32(scores + v * W));
        if constexpr (Core::kKeyBias != 0) score = Isa::sub(score, Isa::set1(key_bias));
        const F factor = Isa::mul(Isa::load(keys.scale + v * W), Isa::set1(row_factor));
        // Not mul: the compiler may fuse that with the sum.
        x[v] = kScores == Scores::kProducts ? Isa::fma(score, factor, fold)
                                            : Isa::add(Isa::fma(score, factor, Isa::zero()), fold);
      }
      if constexpr (kKeep) Isa::store(scores + v * W, x[v]);
      m[v % 2] = Isa::max(m[v % 2], x[v]);
    }
    const float largest = Isa::reduce_max(Isa::max(m[0], m[1]));
    const F shift = Isa::set1(kLog2Of255 - largest);
    F sum = Isa::zero();
    [[maybe_unused]] F offsets = Isa::zero();
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      x[v] = Isa::template exp2<kDegree>(Isa::add(x[v], shift));
      const F inverse = Isa::load(keys.fold_inverse + v * W);
      if constexpr (kValueOffsets) {
        const F unfolded = Isa::mul(x[v], inverse);
        offsets = Isa::fma(unfolded, Isa::load(keys.value_offset + v * W), offsets);
        sum = Isa::add(sum, unfolded);
      } else {
        sum = Isa::fma(x[v], inverse, sum);
      }
    }
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; v += G) {
      Isa::store_probabilities(reinterpret_cast<char*>(out) + v * W * (4 / G), x + v);
    }
    group.largest[r] = largest;
    Isa::store(group.sums + r * W, sum);
    if constexpr (kValueOffsets) Isa::store(group.offset_sums + r * W, offsets);
  }

  // After its rows: moves the maxima of the group, and adds to its sums, kept apart by lane.
  static void finish(float* maximum, float* sums, float* offset_sums, Group& group) {
    alignas(kAlignment) float before[kRows] = {}, now[kRows];
    std::copy(maximum, maximum + kGroupRows, before);
    const F hidden = Isa::set1(kHidden), floor = Isa::set1(kFloor);
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; r += W) {
      const F largest = Isa::load(group.largest + r), old = Isa::load(before + r);
      F most = Isa::max(largest, old);
      if constexpr (kInt8) most = Isa::where_less(floor, largest, most, old);
      const F reference = Isa::where_less(hidden, most, most, Isa::zero());
      Isa::store(now + r, most);
      Isa::store(group.rescale + r, power(old, reference));
      if constexpr (kInt8) {
        const F factor = Isa::mul(power(largest, reference), Isa::set1(1.0f / 255.0f));
        Isa::store(group.factor + r, Isa::where_less(floor, largest, factor, Isa::zero()));
      }
    }
    std::copy(now, now + kGroupRows, maximum);
    add(group.sums, group, sums);
    if (offset_sums) add(group.offset_sums, group, offset_sums);
  }

 private:
  // exp2(x - reference) of an x that is not larger; 1 where they are equal, which the polynomial is
  // not: a factor beside 1 would build up from subtile to subtile.
  static F power(F x, F reference) {
    return Isa::where_less(x, reference, Isa::template exp2<5>(Isa::sub(x, reference)),
                           Isa::set1(1.0f));
  }

  // Rows of fewer columns than a subtile: those at the end of what a group sees.
  template <bool kScale, int kColumns>
  static void run_columns(const float* scores, int64_t columns, int64_t r, float factor,
                          float before, Lane* out, Group& group) {
    if constexpr (kColumns > C) {
      if (columns < kColumns) {
        run_columns<kScale, kColumns - C>(scores, columns, r, factor, before, out, group);
        return;
      }
    }
    constexpr int kVectors = kColumns / W;
    F x[kVectors], m[2] = {Isa::set1(kHidden), Isa::set1(kHidden)};
    JAX_GLUON_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      x[v] = Isa::load(scores + v * W);
      if constexpr (kScale) x[v] = Isa::mul(x[v], Isa::set1(factor));
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
      if constexpr (!kBf16) Isa::store(reinterpret_cast<float*>(out) + v * W, x[v]);
    }
    if constexpr (kBf16) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kVectors; v += 2) Isa::store_bf16_pair(out + v * W / 2, x[v], x[v + 1]);
    }
    group.largest[r] = now;
    Isa::store(group.sums + r * W, Isa::add(sum[0], sum[1]));
  }

  static void add(const float* subtile, const Group& group, float* sums) {
    JAX_GLUON_UNROLL
    for (int r = 0; r < kGroupRows; ++r) {
      F sum = Isa::load(subtile + r * W);
      if constexpr (kInt8) sum = Isa::mul(sum, Isa::set1(group.factor[r]));
      const F rescale = Isa::set1(group.rescale[r]);
      Isa::store(sums + r * W, Isa::fma(Isa::load(sums + r * W), rescale, sum));
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
