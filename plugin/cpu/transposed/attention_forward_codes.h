// Flash attention forward of INT8 codes on vectors, transposed: S^T = K Q^T, a softmax whose lanes
// are queries, O^T += V^T P^T. P has 8 bits, relative to the largest of its 64 keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/simd/compiler.h"
#include "cpu/transposed/transposed_codes.h"
#include "cpu/transposed/transposed_forward.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa_>
class CodesEngine {
 public:
  using Core = TransposedCodesCore<Isa_>;

 private:
  using Isa = Isa_;
  using F = typename Isa::F;
  using I = typename Isa::I;
  using Rows = TransposedRows<Core>;
  using Group = typename Rows::Group;
  static constexpr int W = kTileQueries, kKeys = kSubtileKeys, kGroup = Core::kGroup;
  static constexpr int64_t kColumn = kKeys * W;          // scores of 16 queries
  static constexpr int64_t kBytes = kKeys / kGroup * W;  // lanes of their P
  // Rows of the left operand whose sums are in registers at once, with 16 queries or 32.
  static constexpr int kTileRows = 8;
  // Of fewer queries most lanes would be empty.
  static constexpr int64_t kMinRows = 28;
  // References are moved where a maximum has grown by more than this, base 2: sums have room.
  static constexpr float kMinGrowth = 8.0f;

 public:
  static constexpr int64_t kStepKeys = kKeys;

  // Calls of enough queries.
  static bool takes(const AttentionCall& call) {
    return takes_with_any_queries(call) && call.T >= kMinRows;
  }
  // (A bias may be so large that log2(value scale) would vanish beside it.)
  static bool takes_with_any_queries(const AttentionCall& call) {
    return ForwardBlocks<Core>::takes(call) && !has_row_offsets(call) && !call.bias;
  }
  static KernelOffer offer(const AttentionForwardCall& call) {
    // Keys and values of a block stay in L2, beside sums of values.
    constexpr int64_t kL2Bytes = 256 * 1024;
    const int64_t bytes = 4 * row_lanes<Core>(call.H) + round_up(call.V, W) + 16;
    const int64_t keys =
        std::min(std::max<int64_t>(kL2Bytes / bytes / kKeys * kKeys, 4 * kKeys), kMaxBlockKeys);
    KernelOffer offer;
    offer.kernel = Kernel::kGluon;
    offer.arithmetic = name_of(Core::kArithmetic);
    offer.block_k = {keys, kKeys, kMaxBlockKeys, kKeys};
    return offer;
  }
  static int64_t block_keys(const AttentionForwardCall& call) {
    return round_up(call.cpu_kernel.block_k, int64_t{kKeys});
  }

  CodesEngine(const AttentionForwardCall& call, const KeyValueRows<Core>& key_values)
      : call_(call), key_values_(key_values), packed_(call, key_values) {}

  struct Scratch {
    Buffer<float> scores;            // [2][kKeys][W]
    Buffer<uint32_t> probabilities;  // [2][kKeys / 4][W]
  };

  int64_t lanes() const { return packed_.lanes(); }
  int64_t value_tiles() const { return packed_.columns() / W; }
  void pack_all(Parallel& parallel) { packed_.pack_all(parallel); }
  void prepare(Scratch& s) const {
    s.scores.allocate(2 * kColumn);
    s.probabilities.allocate(2 * kBytes);
  }
  void edit_query(uint32_t* query, int64_t lanes) const {
    for (int64_t i = 0; i < lanes; ++i) query[i] ^= 0x80808080u;
  }

  void attend(const TransposedRun<Core>& run, RowScratch<Core>& load, Scratch& s) const {
    if (run.group.count() > W) {
      attend_columns<2>(run, load, s);
    } else {
      attend_columns<1>(run, load, s);
    }
  }

 private:
  template <int kColumns>
  void attend_columns(const TransposedRun<Core>& run, RowScratch<Core>& load, Scratch& s) const {
    const Group& group = run.group;
    const int64_t last = ceil_div(run.keys.end, int64_t{kKeys});
    for (int64_t t = run.keys.begin / kKeys; t < last; ++t) {
      const CodesOfSubtile codes = packed_(run.head, t);
      const Range keys{t * kKeys, (t + 1) * kKeys};
      // Keys past the last one are hidden too.
      const bool has_rules = group.rules.any(group.rows, keys);
      const bool edits = has_rules || !group.visibility.all_see(group.rows, keys);
      F largest[kColumns], factor[kColumns];
      if (edits) {
        multiply_keys<kColumns, false>(run, codes, s.scores.get(), largest);
        for (int c = 0; c < kColumns; ++c) {
          largest[c] = edit(group, c, keys.begin, has_rules, codes, s.scores.get() + c * kColumn);
        }
      } else {
        multiply_keys<kColumns, true>(run, codes, s.scores.get(), largest);
      }
      grow<kColumns>(run, largest);
      for (int c = 0; c < kColumns; ++c) {
        const int64_t row = group.first + c * W;
        uint32_t* out = s.probabilities.get() + c * kBytes;
        const F total =
            probabilities(s.scores.get() + c * kColumn, largest[c], codes.fold_inverse, out);
        factor[c] = factor_of(largest[c], Isa::load(group.state.maximum + row));
        float* sum = group.state.sum + row;
        Isa::store(sum, Isa::fma(factor[c], total, Isa::load(sum)));
        if (group.dropout.any()) drop(group, c, keys.begin, s.scores.get() + c * kColumn, out);
      }
      multiply_values<kColumns>(codes, s.probabilities.get(), factor, run.out);
      if (std::memchr(codes.has_zeros, 1, kKeys)) add_unpacked_values(run, t, codes, load, s);
    }
  }

  // What a subtile's sums are multiplied by. (Times a NaN, 0 is none: it reaches the output.)
  static F factor_of(F largest, F maximum) {
    const F factor = Isa::mul(Isa::template exp2<5>(Isa::sub(largest, maximum)),
                              Isa::set1(1.0f / kMaxProbability));
    return Isa::where_less(Isa::set1(kEmptySubtileMaximum), largest, factor, Isa::zero());
  }

  // acc[r][c] += left row r . right column c, over `lanes` lanes.
  template <int kColumns>
  JAX_GLUON_INLINE static void multiply(const uint32_t* left, int64_t stride, const uint32_t* right,
                                        int64_t next_column, int64_t lanes, I (*acc)[kColumns]) {
    for (int64_t d = 0; d < lanes; ++d) {
      I x[kColumns];
      JAX_GLUON_UNROLL
      for (int c = 0; c < kColumns; ++c) x[c] = Isa::load_i32(right + c * next_column + d * W);
      JAX_GLUON_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const I y = Isa::set1_i32(static_cast<int32_t>(left[r * stride + d]));
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) acc[r][c] = Isa::dot(acc[r][c], x[c], y);
      }
    }
  }

  // Scores of a subtile, and the largest of each query. With kFolds, they are logits + log2(value
  // scale), else integers.
  template <int kColumns, bool kFolds>
  void multiply_keys(const TransposedRun<Core>& run, const CodesOfSubtile& codes, float* scores,
                     F* largest) const {
    const int64_t lanes = packed_.lanes();
    F factor[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      factor[c] = Isa::load(run.group.state.factor + run.group.first + c * W);
      largest[c] = Isa::set1(kEmptySubtileMaximum);
    }
    for (int64_t j = 0; j < kKeys; j += kTileRows) {
      I acc[kTileRows][kColumns];
      JAX_GLUON_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) acc[r][c] = Isa::set1_i32(codes.start[j + r]);
      }
      multiply<kColumns>(codes.keys + j * lanes, lanes, run.query, lanes * W, lanes, acc);
      JAX_GLUON_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          float* at = scores + c * kColumn + (j + r) * W;
          if constexpr (kFolds) {
            const F product = Isa::mul(Isa::to_float(acc[r][c]), Isa::set1(codes.scale[j + r]));
            const F x = Isa::fma(product, factor[c], Isa::set1(codes.fold_log2[j + r]));
            largest[c] = Isa::max(x, largest[c]);
            Isa::store(at, x);
          } else {
            Isa::store_i32(at, acc[r][c]);
          }
        }
      }
    }
  }

  // The same from integers where rows don't just see all keys.
  F edit(const Group& group, int64_t column, int64_t key0, bool has_rules,
         const CodesOfSubtile& codes, float* scores) const {
    const int64_t first = column * W;
    for (int64_t j = 0; j < kKeys; j += kUnitKeys) {
      Rows::to_logits(call_, group, first, codes.scale + j, scores + j * W);
      if (has_rules) {
        Rows::apply(group, first, key0 + j, scores + j * W);
      } else {
        Rows::hide(group, first, key0 + j, scores + j * W);
      }
    }
    F largest = Isa::set1(kEmptySubtileMaximum);
    for (int64_t j = 0; j < kKeys; ++j) {
      const F x = Isa::add(Isa::load(scores + j * W), Isa::set1(codes.fold_log2[j]));
      Isa::store(scores + j * W, x);
      largest = Isa::max(x, largest);
    }
    return largest;
  }

  // Moves references where a maximum is far above; all that is relative to them follows.
  template <int kColumns>
  void grow(const TransposedRun<Core>& run, const F* largest) const {
    const Group& group = run.group;
    for (int c = 0; c < kColumns; ++c) {
      float* maximum = group.state.maximum + group.first + c * W;
      float* sum = group.state.sum + group.first + c * W;
      const F before = Isa::load(maximum), limit = Isa::add(before, Isa::set1(kMinGrowth));
      if (!Isa::any_less(limit, largest[c])) continue;
      // Of a subtile with nothing visible there is nothing to be relative to.
      const F seen =
          Isa::where_less(Isa::set1(kEmptySubtileMaximum), largest[c], largest[c], before);
      const F now = Isa::where_less(limit, seen, seen, before);
      const F change = Isa::template exp2<5>(Isa::sub(before, now));
      const F factor = Isa::where_less(before, now, change, Isa::set1(1.0f));
      float* out = run.out + c * packed_.columns() * W;
      for (int64_t v = 0; v < call_.V; ++v) {
        Isa::store(out + v * W, Isa::mul(Isa::load(out + v * W), factor));
      }
      Isa::store(sum, Isa::mul(Isa::load(sum), factor));
      Isa::store(maximum, now);
    }
  }

  // P of 64 keys and 16 queries, 255 for the largest; returns what their unrounded sum is without
  // what was folded.
  static F probabilities(const float* scores, F largest, const float* fold_inverse, uint32_t* out) {
    const F shift = Isa::sub(Isa::set1(kLog2OfMaxProbability), largest);
    F sums[2] = {Isa::zero(), Isa::zero()};
    for (int g = 0; g < kKeys / kGroup; ++g) {
      I bytes[kGroup];
      JAX_GLUON_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        const int j = kGroup * g + i;
        const F p = Isa::exp2_below(Isa::add(Isa::load(scores + j * W), shift));
        sums[i % 2] = Isa::fma(p, Isa::set1(fold_inverse[j]), sums[i % 2]);
        bytes[i] = Isa::to_int(p);
      }
      Isa::store_i32(out + g * W, Isa::pack_bytes(bytes[0], bytes[1], bytes[2], bytes[3]));
    }
    return Isa::add(sums[0], sums[1]);
  }

  template <int kColumns>
  void multiply_values(const CodesOfSubtile& codes, const uint32_t* probabilities, const F* factor,
                       float* out) const {
    const int64_t columns = packed_.columns();
    for (int64_t v = 0; v < call_.V; v += kTileRows) {
      I acc[kTileRows][kColumns];
      JAX_GLUON_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) acc[r][c] = Isa::set1_i32(0);
      }
      multiply<kColumns>(codes.values + v * W, W, probabilities, kBytes, W, acc);
      JAX_GLUON_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        JAX_GLUON_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          float* at = out + (c * columns + v + r) * W;
          Isa::store(at, Isa::fma(Isa::to_float(acc[r][c]), factor[c], Isa::load(at)));
        }
      }
    }
  }

  // Takes what is dropped out of P, and out of the scores that unpacked values are weighted by.
  static void drop(const Group& group, int64_t column, int64_t key0, float* scores, uint32_t* out) {
    uint8_t scratch[DropoutRow<Isa>::bytes(kKeys)];
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    const int64_t first = column * W;
    for (int64_t r = 0; r < std::min<int64_t>(W, group.count() - first); ++r) {
      const uint8_t* keep =
          group.dropout.find(group.rows.begin + first + r, key0, key0 + kKeys, scratch);
      for (int64_t j = 0; j < kKeys; ++j) {
        if (keep[j]) continue;
        bytes[(j / kGroup * W + r) * kGroup + j % kGroup] = 0;
        scores[j * W + r] = kHidden;
      }
    }
  }

  // Adds P times values that are packed as zeros.
  void add_unpacked_values(const TransposedRun<Core>& run, int64_t subtile,
                           const CodesOfSubtile& codes, RowScratch<Core>& load,
                           const Scratch& s) const {
    const Group& group = run.group;
    const float per_unit = 1.0f / key_values_.value_unit(run.head);
    for (int64_t j = 0; j < kKeys; ++j) {
      if (!codes.has_zeros[j]) continue;
      float* value = load.row.get();
      key_values_.values().load(run.head / call_.K, subtile * kKeys + j, run.head % call_.K, value);
      for (int64_t r = 0; r < group.count(); ++r) {
        const float x = s.scores[r / W * kColumn + j * W + r % W];
        if (x == kHidden) continue;
        const float p = std::exp2(x - codes.fold_log2[j] - group.state.maximum[group.first + r]);
        if (p == 0.0f) continue;
        float* out = run.out + r / W * packed_.columns() * W + r % W;
        for (int64_t v = 0; v < call_.V; ++v) out[v * W] += p * (value[v] * per_unit);
      }
    }
  }

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& key_values_;
  TransposedCodes<Core> packed_;
};

template <class Isa>
using AttentionForwardCodes = TransposedForward<CodesEngine<Isa>>;

}  // namespace
}  // namespace jax_gluon::cpu
