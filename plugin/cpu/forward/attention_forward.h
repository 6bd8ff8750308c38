// Flash attention forward: for each block of queries, one pass over the blocks of keys that any of
// its rows sees, with an online softmax (Milakov and Gimelshein 2018; Dao 2023).
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/forward/forward_blocks.h"
#include "cpu/forward/forward_rows.h"
#include "cpu/forward/online_softmax.h"
#include "cpu/forward/packed_key_values.h"
#include "cpu/tiles/microkernel.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class AttentionForward {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  static constexpr int R = Core::kTileRows, C = Core::kTileColumns, G = Core::kGroup;
  static constexpr int kGroupRows = Core::kGroupRows;
  static constexpr int kStep = ForwardBlocks<Core>::kStep;
  static constexpr bool kInt8 = ForwardBlocks<Core>::kInt8, kBf16 = ForwardBlocks<Core>::kBf16;
  using Rules = LogitRules<Isa, kBlockKeys>;
  using Softmax = OnlineSoftmax<Core>;

 public:
  AttentionForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        lanes_(ceil_div(call.H, G)),
        value_panels_(ceil_div(call.V, C)),
        value_columns_(value_panels_ * C),
        block_keys_(ForwardBlocks<Core>::block_keys(call)),
        key_values_(call),
        packed_(call, key_values_),
        rows_(call, key_values_),
        softmax_(call),
        scratch_(parallel.threads()) {}

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    key_values_.prepare(parallel_);
    packed_.pack_all(parallel_);
    const int64_t row_blocks = ceil_div(call_.T, kBlockRows);
    parallel_.run(call_.B * call_.N * row_blocks, [this, row_blocks](int64_t task) {
      // Last rows first: with causal masking they are the longest.
      attend(task / row_blocks, row_blocks - 1 - task % row_blocks);
    });
  }

 private:
  struct Scratch {
    RowScratch<Core> load;
    Buffer<char> memory;
    Lane* query = nullptr;          // row tiles
    float* out = nullptr;           // [kBlockRows][value_columns]
    float* scores = nullptr;        // [kGroupRows][kBlockKeys]; int32 before they are scaled
    Lane* probabilities = nullptr;  // [kGroupRows][kBlockKeys / G]; the scores where G == 1
  };

  void prepare(Scratch& s) const {
    if (s.query) return;
    s.load.prepare(call_);
    int64_t bytes = 0;
    const auto reserve = [&](int64_t count) {
      const int64_t at = bytes;
      bytes += round_up(count * 4, kAlignment);
      return at;
    };
    const int64_t query = reserve(kBlockRows * lanes_);
    const int64_t out = reserve(kBlockRows * value_columns_);
    const int64_t scores = reserve(kGroupRows * kBlockKeys);
    const int64_t probabilities = G == 1 ? scores : reserve(kGroupRows * kBlockKeys / G);
    s.memory.allocate(bytes);
    char* base = s.memory.get();
    s.query = reinterpret_cast<Lane*>(base + query);
    s.out = reinterpret_cast<float*>(base + out);
    s.scores = reinterpret_cast<float*>(base + scores);
    s.probabilities = reinterpret_cast<Lane*>(base + probabilities);
  }

  void attend(int64_t bn, int64_t row_block) {
    const int64_t b = bn / call_.N, n = bn % call_.N, k = n / (call_.N / call_.K);
    const int64_t head = b * call_.K + k;
    const Visibility visibility(call_, b);
    const Rules rules(call_, b, n);
    const Range rows{row_block * kBlockRows, std::min(call_.T, (row_block + 1) * kBlockRows)};
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);

    RowState state;
    rows_.load(b, n, rows, s.load, s.query, state);
    std::fill(s.out, s.out + kBlockRows * value_columns_, 0.0f);
    const Range keys = visibility.of_rows(rows);
    for (int64_t key0 = keys.begin / block_keys_ * block_keys_; key0 < keys.end;
         key0 += block_keys_) {
      for (int64_t g = 0; g < rows.end - rows.begin; g += kGroupRows) {
        const Range group{rows.begin + g, std::min(rows.begin + g + kGroupRows, rows.end)};
        const Range seen = intersect(visibility.of_rows(group), {key0, key0 + block_keys_});
        if (seen.empty() || !rules.any_visible(group, seen)) continue;
        attend_group(visibility, rules, b, k, head, group, g, key0, seen, s, state);
      }
    }
    for (int64_t r = 0; r < rows.end - rows.begin; ++r) {
      rows_.store(b, n, rows.begin + r, r, s.out + r * value_columns_, state);
    }
  }

  void attend_group(const Visibility& visibility, const Rules& rules, int64_t b, int64_t k,
                    int64_t head, Range group, int64_t g, int64_t key0, Range seen, Scratch& s,
                    RowState& state) {
    const int64_t begin = (seen.begin - key0) / kStep * kStep;
    const int64_t end = round_up(seen.end - key0, kStep);
    for (int64_t j = begin; j < end; j += C) {
      for (int t = 0; t < kGroupRows; t += R) {
        score_tile<Core>(s.query + (g + t) * lanes_, packed_.key_panels(head, key0 + j), lanes_,
                         s.scores + t * kBlockKeys + j, kBlockKeys);
      }
    }
    alignas(kAlignment) float rescale[kGroupRows];
    alignas(kAlignment) typename Softmax::SubtileFactors subtile_factor;
    const int64_t rows = group.end - group.begin;
    KeyScales key_scales;
    if constexpr (kInt8) key_scales = packed_.key_scales(head, key0);
    for (int64_t r = rows; r < kGroupRows; ++r) {
      rescale[r] = 1.0f;
      for (auto& factor : subtile_factor) factor[r] = 0.0f;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = g + r;
      float* scores = s.scores + r * kBlockKeys;
      const Range visible = visibility.of_row(group.begin + r);
      const bool edit_all = rules.any() || key_values_.has_offsets();
      // Columns that all of the row sees, and whose products need nothing else.
      const Range products = edit_all ? Range{} : Range{visible.begin - key0, visible.end - key0};
      const bool edit = !contains(products, {begin, end});
      // Where probabilities have 8 bits the last bit of a logit can decide, so it is made in the
      // same way whatever the block is: subtile by subtile.
      const int64_t step = kInt8 ? kSubtileKeys : end - begin;
      for (int64_t j = begin; edit && j < end; j += step) {
        if (contains(products, {j, j + step})) continue;
        softmax_.edit(rules, key_scales, key_values_.has_offsets(), group.begin + r, key0, j,
                      j + step, visible, scores, row, state);
      }
      Lane* probabilities = s.probabilities + r * (kBlockKeys / G);
      if constexpr (kInt8) {
        const auto run = key_values_.has_value_offsets() ? &Softmax::template run_int8<true>
                                                         : &Softmax::template run_int8<false>;
        (softmax_.*run)(key_scales, begin, end, products, scores, row, r, probabilities, state,
                        rescale[r], subtile_factor);
      } else if (kBf16 && !edit) {
        softmax_.template run<true>(scores, begin, end, row, probabilities, state, rescale[r]);
      } else {
        softmax_.template run<false>(scores, begin, end, row, probabilities, state, rescale[r]);
      }
    }
    float* out = s.out + g * value_columns_;
    if constexpr (kInt8) {
      for (int64_t r = 0; r < rows; ++r) {
        if (rescale[r] != 1.0f)
          scale_row<Isa>(out + r * value_columns_, value_columns_, rescale[r]);
      }
      for (int64_t p = 0; p < value_panels_; ++p) {
        for (int64_t j = begin; j < end; j += kSubtileKeys) {
          const Lane* values =
              packed_.value_lines(head, key0 + j) + p * packed_.value_panel_stride();
          for (int t = 0; t < kGroupRows; t += R) {
            value_tile<Core, kBlockKeys / G>(s.probabilities + (t * kBlockKeys + j) / G, values,
                                             kSubtileKeys / G, out + t * value_columns_ + p * C,
                                             value_columns_, subtile_factor[j / kSubtileKeys] + t);
          }
        }
      }
    } else {
      for (int64_t p = 0; p < value_panels_; ++p) {
        const Lane* values =
            packed_.value_lines(head, key0 + begin) + p * packed_.value_panel_stride();
        for (int t = 0; t < kGroupRows; t += R) {
          value_tile<Core, kBlockKeys / G>(s.probabilities + (t * kBlockKeys + begin) / G, values,
                                           (end - begin) / G, out + t * value_columns_ + p * C,
                                           value_columns_, rescale + t);
        }
      }
    }
    rows_.add_marked_values(
        b, k, key0, {seen.begin - key0, seen.end - key0}, packed_.dirty(head) + key0, rows, s.load,
        out, value_columns_,
        [&](int64_t r, int64_t c) { return probability(head, key0, r, c, g + r, s, state); });
  }

  // The probability that row r of the group, whose scores and probabilities stand there, gives to
  // key key0 + c.
  float probability(int64_t head, int64_t key0, int64_t r, int64_t c, int64_t row, const Scratch& s,
                    const RowState& state) const {
    if constexpr (kInt8) {
      const float logit = s.scores[r * kBlockKeys + c];
      // A row that has seen nothing has no maximum to subtract.
      return logit == kHidden ? 0.0f
                              : std::exp2(logit - packed_.key_scales(head, key0 + c).fold_log2[0] -
                                          state.maximum[row]);
    } else if constexpr (kBf16) {
      const auto* bits = reinterpret_cast<const uint16_t*>(s.probabilities);
      return float_from_bf16(bits[r * kBlockKeys + c]);
    } else {
      return s.scores[r * kBlockKeys + c];
    }
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t lanes_, value_panels_, value_columns_, block_keys_;
  KeyValueRows<Core> key_values_;
  PackedKeyValues<Core> packed_;
  const ForwardRows<Core> rows_;
  const Softmax softmax_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
