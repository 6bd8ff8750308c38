// Flash attention forward: for each block of queries, one pass over the blocks of keys that any of
// its rows sees, with an online softmax (Milakov and Gimelshein 2018; Dao 2023).
#pragma once

#include <array>
#include <atomic>
#include <cmath>

#include "centred_rows.h"
#include "microkernel.h"
#include "pack.h"

namespace jax_gluon::cpu {
namespace {

// Keys per block: the scores of a row group (12 x 256 x 4 bytes) stay in L1, and a block of K and V
// (64 KiB each at H = 64 float32) in L2 while every row group of a query block reads it.
constexpr int kBlockKeys = 256;
// Query rows per task: a multiple of every row group; what K and V are read from L2 for.
constexpr int kBlockRows = 96;
// Keys that share one maximum where probabilities have 8 bits (facts: 64 is the knee between the
// error of a coarser maximum and the cost of rescaling).
constexpr int kSubtileKeys = 64;

template <class Core>
class AttentionForward {
  using Isa = typename Core::Isa;
  using Lane = typename Core::Lane;
  using F = typename Isa::F;
  static constexpr int W = Isa::kLanes, R = Core::kTileRows, C = Core::kTileColumns,
                       G = Core::kGroup;
  // Rows whose scores are alive at once: enough that a panel read from L2 is used twice.
  static constexpr int kGroupRows = R >= 12 ? R : 2 * R;
  static constexpr bool kInt8 = Core::kFormat == Format::kInt8;
  static constexpr bool kBf16 = Core::kFormat == Format::kBf16;
  static constexpr int kDegree = kInt8 || kBf16 ? 3 : 5;
  // Key ranges are rounded to this many keys.
  static constexpr int kStep = kInt8 ? (kSubtileKeys > C ? kSubtileKeys : C) : C;
  static_assert(kBlockKeys % kStep == 0 && kStep % C == 0 && kBlockRows % kGroupRows == 0);
  using Rules = LogitRules<Isa, kBlockKeys>;

 public:
  AttentionForward(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        parallel_(parallel),
        lanes_(ceil_div(call.H, G)),
        key_blocks_(ceil_div(call.S, kBlockKeys)),
        value_panels_(ceil_div(call.V, C)),
        value_columns_(value_panels_ * C),
        keys_(call, call.key, call.H),
        values_(call, call.value, call.V),
        has_offsets_(kInt8 && (has_offset(call.query) || has_offset(call.key))),
        has_value_offsets_(kInt8 && has_offset(call.value)),
        scratch_(parallel.threads()) {}

  // Whether this core computes the call: INT8 where all operands are codes whose scales don't vary
  // along a row (4-bit rows are rounded to INT8 rows otherwise), float32 takes everything.
  static bool takes(const AttentionForwardCall& call) {
    const QuantizableOperand* operands[] = {&call.query, &call.key, &call.value};
    for (const QuantizableOperand* x : operands) {
      const Quantization& q = x->quantization;
      if (kInt8 && (!q || (q.bits == 8 && q.head_block != 0))) return false;
      if (kBf16 && (q || x->dtype != DType::kBF16)) return false;
    }
    return !kInt8 || !call.query.quantization.mean;
  }

  void run() {
    if (call_.B * call_.T * call_.N == 0) return;
    const int64_t heads = call_.B * call_.K, keys = key_blocks_ * kBlockKeys;
    packed_keys_.allocate(heads * keys * lanes_);
    packed_values_.allocate(heads * keys / G * value_columns_);
    value_dirty_.allocate(heads * keys);
    if constexpr (kInt8) {
      // Rows that are rounded again are rounded without their mean.
      if (call_.key.quantization.head_block != 0) keys_.find_means(parallel_);
      if (call_.value.quantization.head_block != 0) values_.find_means(parallel_);
      row_scales_.allocate(heads * keys * 3);
      if (has_offsets_) key_offsets_.allocate(heads * keys * 2);
      if (has_value_offsets_) value_offsets_.allocate(heads * keys);
      value_unit_.allocate(heads);
      parallel_.run(heads, [this](int64_t head) { find_value_unit(head); });
    }
    parallel_.run(heads * key_blocks_, [this](int64_t task) { pack(task); });
    const int64_t row_blocks = ceil_div(call_.T, kBlockRows);
    parallel_.run(call_.B * call_.N * row_blocks, [this, row_blocks](int64_t task) {
      // Last rows first: with causal masking they are the longest.
      attend(task / row_blocks, row_blocks - 1 - task % row_blocks);
    });
  }

 private:
  struct Scratch {
    Buffer<char> memory;
    Lane* query = nullptr;          // row tiles
    float* out = nullptr;           // [kBlockRows][value_columns]
    float* scores = nullptr;        // [kGroupRows][kBlockKeys]; int32 before they are scaled
    Lane* probabilities = nullptr;  // [kGroupRows][kBlockKeys / G]; the scores where G == 1
    Lane* rows = nullptr;           // rows as lanes, while packing
    float* row = nullptr;           // kGroup float rows
    int8_t* codes = nullptr;        // kGroup rows of codes
  };

  void prepare(Scratch& s) const {
    if (s.query) return;
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
    const int64_t rows = reserve(std::max(C, R) * lanes_);
    const int64_t row = reserve(std::max(call_.H, value_columns_) + W);
    const int64_t codes = kInt8 ? reserve(G * code_stride() / 4 + W) : row;
    s.memory.allocate(bytes);
    char* base = s.memory.get();
    s.query = reinterpret_cast<Lane*>(base + query);
    s.out = reinterpret_cast<float*>(base + out);
    s.scores = reinterpret_cast<float*>(base + scores);
    s.probabilities = reinterpret_cast<Lane*>(base + probabilities);
    s.rows = reinterpret_cast<Lane*>(base + rows);
    s.row = reinterpret_cast<float*>(base + row);
    s.codes = reinterpret_cast<int8_t*>(base + codes);
  }
  int64_t code_stride() const { return round_up(std::max(call_.H, call_.V), kAlignment); }
  static bool has_offset(const QuantizableOperand& x) {
    return x.quantization.offset && x.quantization.head_block == 0;
  }

  Lane* key_panels(int64_t head, int64_t key) const {
    return packed_keys_.get() + (head * key_blocks_ * kBlockKeys + key) * lanes_;
  }
  // Line of value panel 0 that holds `key`; panels are value_panel_stride() apart.
  Lane* value_lines(int64_t head, int64_t key) const {
    return packed_values_.get() + head * value_panel_stride() * value_panels_ + key / G * C;
  }
  int64_t value_panel_stride() const { return key_blocks_ * kBlockKeys / G * C; }
  // Of each key: its scale, log2 of the value scale that its probability folds in (in units of
  // value_unit_), and that value scale's reciprocal.
  float* key_scales(int64_t head) const {
    return row_scales_.get() + head * key_blocks_ * kBlockKeys * 3;
  }
  float* fold_log2(int64_t head) const { return key_scales(head) + key_blocks_ * kBlockKeys; }
  float* fold_inverse(int64_t head) const { return fold_log2(head) + key_blocks_ * kBlockKeys; }

  // Of each key: its offset, and its scale times the sum of its codes.
  float* key_offsets(int64_t head) const {
    return key_offsets_.get() + head * key_blocks_ * kBlockKeys * 2;
  }
  float* key_code_sums(int64_t head) const { return key_offsets(head) + key_blocks_ * kBlockKeys; }
  float* value_offsets(int64_t head) const {
    return value_offsets_.get() + head * key_blocks_ * kBlockKeys;
  }

  // The scale that value row (b, j, k) has as INT8 codes.
  float value_scale(int64_t b, int64_t j, int64_t k, Scratch& s) const {
    ScaleAndOffset scale;
    if (call_.value.quantization.head_block == 0) {
      scale = scale_at(call_.value, b, j, k);
    } else {
      values_.codes_of(b, j, k, s.row, s.codes, &scale);
    }
    return scale.scale;
  }

  // A power of two near the head's largest value scale: folded in units of it, no scale, reciprocal
  // or sum of reciprocals leaves float32's range.
  void find_value_unit(int64_t head) {
    const int64_t b = head / call_.K, k = head % call_.K, keys = Visibility(call_, b).keys();
    auto scratch = scratch_.acquire();
    prepare(*scratch);
    float largest = 0.0f;
    for (int64_t j = 0; j < keys; ++j) {
      const float scale = value_scale(b, j, k, *scratch);
      if (scale <= std::numeric_limits<float>::max()) largest = std::max(largest, scale);
    }
    value_unit_[head] = largest > 0.0f ? std::exp2(std::round(std::log2(largest))) : 1.0f;
  }

  // Packs one block of keys and values of one kv head. Rows of V that are not finite are packed as
  // zeros and marked: where a row does see such a key they are added exactly, and where it does not
  // they can't leak (0 * NaN).
  void pack(int64_t task) {
    const int64_t head = task / key_blocks_, block = task % key_blocks_;
    const int64_t b = head / call_.K, k = head % call_.K;
    const int64_t begin = block * kBlockKeys;
    const int64_t end = std::min(Visibility(call_, b).keys(), begin + kBlockKeys);
    if (begin >= end) return;
    auto scratch = scratch_.acquire();
    prepare(*scratch);
    pack_score_panels<Core>(begin, end, call_.H, scratch->rows, key_panels(head, begin),
                            [&](int64_t j, Lane* out) { load_key(head, b, j, k, *scratch, out); });
    // Panels beyond the last key are read only up to the rounded end of the block's visible range.
    const int64_t packed = begin + round_up(end - begin, C),
                  last = begin + round_up(end - begin, kStep);
    std::fill(key_panels(head, packed), key_panels(head, last), Lane(0));

    uint8_t* dirty = value_dirty_.get() + head * key_blocks_ * kBlockKeys;
    std::fill(dirty + begin, dirty + last, uint8_t(0));
    if constexpr (kInt8) pack_value_scales(head, b, k, begin, end, last, *scratch, dirty);
    for (int64_t j = begin; j < last; j += G) {
      pack_values(b, k, j, end, *scratch, dirty, value_lines(head, j));
    }
  }

  // A key row as lanes; for INT8 also its scale, and what its offset adds to logits.
  void load_key(int64_t head, int64_t b, int64_t j, int64_t k, Scratch& s, Lane* out) {
    if constexpr (kInt8) {
      constexpr int32_t kBias = G == 4 ? 128 : 0;
      ScaleAndOffset scale;
      const int8_t* codes = keys_.codes_of(b, j, k, s.row, s.codes, &scale);
      row_to_lanes<Core>(codes, DType::kS8, call_.H, kBias, out);
      key_scales(head)[j] = scale.scale;
      if (has_offsets_) {
        key_offsets(head)[j] = scale.offset;
        key_code_sums(head)[j] = scale.scale * static_cast<float>(sum_of(codes, call_.H));
      }
    } else if constexpr (kBf16) {
      row_to_lanes<Core>(row_of(call_.key, b, j, k), call_.key.dtype, call_.H, 0, out);
    } else {
      keys_.load(b, j, k, out);
    }
  }

  static int32_t sum_of(const int8_t* codes, int64_t n) {
    int32_t total = 0;
    for (int64_t h = 0; h < n; ++h) total += codes[h];
    return total;
  }

  void pack_values(int64_t b, int64_t k, int64_t j, int64_t end, Scratch& s, uint8_t* dirty,
                   Lane* line) {
    if constexpr (kInt8) {
      const int8_t* rows[G];
      for (int g = 0; g < G; ++g) {
        rows[g] = nullptr;
        // A row without a scale is its offset alone.
        if (j + g >= end || dirty[j + g]) continue;
        ScaleAndOffset scale;
        rows[g] = values_.codes_of(b, j + g, k, s.row, s.codes + g * code_stride(), &scale);
        if (scale.scale == 0.0f) rows[g] = nullptr;
      }
      pack_value_line<Core, int8_t>(rows, call_.V, line, value_panel_stride());
    } else if constexpr (kBf16) {
      const uint16_t* rows[G];
      for (int g = 0; g < G; ++g) {
        rows[g] = nullptr;
        if (j + g >= end) continue;
        const void* source = row_of(call_.value, b, j + g, k);
        load_row<Isa>(source, call_.value.dtype, call_.V, s.row);
        dirty[j + g] = !all_finite<Isa>(s.row, call_.V);
        if (!dirty[j + g]) rows[g] = static_cast<const uint16_t*>(source);
      }
      pack_value_line<Core, uint16_t>(rows, call_.V, line, value_panel_stride());
    } else {
      const float* rows[1] = {nullptr};
      if (j < end) {
        values_.load(b, j, k, s.row);
        dirty[j] = !all_finite<Isa>(s.row, call_.V);
        if (!dirty[j]) rows[0] = s.row;
      }
      pack_value_line<Core, float>(rows, call_.V, line, value_panel_stride());
    }
  }

  // A value row's scale is folded into its probability before that is rounded to 8 bits. Scales of
  // zero, or so small beside their subtile's largest that the row can't show, fold as a small
  // number instead: their codes are 0 or vanish, and the reciprocal, which takes the factor out of
  // the normaliser again, stays finite.
  void pack_value_scales(int64_t head, int64_t b, int64_t k, int64_t begin, int64_t end,
                         int64_t last, Scratch& s, uint8_t* dirty) {
    float* key_scale = key_scales(head);
    float* log2_scale = fold_log2(head);
    float* inverse = fold_inverse(head);
    const float unit = 1.0f / value_unit_[head];
    for (int64_t j0 = begin; j0 < last; j0 += kSubtileKeys) {
      const int64_t j1 = j0 + kSubtileKeys;
      float scale[kSubtileKeys], largest = 0.0f;
      for (int64_t j = j0; j < j1; ++j) {
        float x = 0.0f;
        if (j >= end) {
          key_scale[j] = 0.0f;
          if (has_offsets_) key_offsets(head)[j] = key_code_sums(head)[j] = 0.0f;
        } else {
          x = value_scale(b, j, k, s);
          dirty[j] = !(x >= 0.0f && x <= std::numeric_limits<float>::max());
          x = dirty[j] ? 0.0f : x * unit;
        }
        if (has_value_offsets_) {
          const float offset = j < end ? scale_at(call_.value, b, j, k).offset : 0.0f;
          if (j < end) dirty[j] |= !(std::fabs(offset) <= std::numeric_limits<float>::max());
          value_offsets(head)[j] = j < end && !dirty[j] ? offset : 0.0f;
        }
        scale[j - j0] = x;
        largest = std::max(largest, x);
      }
      const float least = largest > 0.0f ? std::max(std::ldexp(largest, -60), 0x1p-90f) : 1.0f;
      for (int64_t j = j0; j < j1; ++j) {
        const float x = std::max(scale[j - j0], least);
        log2_scale[j] = std::log2(x);
        inverse[j] = 1.0f / x;
      }
    }
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
    load_queries(b, n, k, rows, s, state);
    std::fill(s.out, s.out + kBlockRows * value_columns_, 0.0f);
    const Range keys = visibility.of_rows(rows);
    for (int64_t key0 = keys.begin / kBlockKeys * kBlockKeys; key0 < keys.end; key0 += kBlockKeys) {
      for (int64_t g = 0; g < rows.end - rows.begin; g += kGroupRows) {
        const Range group{rows.begin + g, std::min(rows.begin + g + kGroupRows, rows.end)};
        const Range seen = intersect(visibility.of_rows(group), {key0, key0 + kBlockKeys});
        if (seen.empty() || !rules.any_visible(group, seen)) continue;
        attend_group(visibility, rules, b, k, head, group, g, key0, seen, s, state);
      }
    }
    for (int64_t r = 0; r < rows.end - rows.begin; ++r)
      finish_row(b, n, rows.begin + r, r, s, state);
  }

  // Per row of a block, base 2: the largest logit so far, the sum of probabilities relative to it,
  // the factor of its integer or unscaled products, and what key centring takes from each logit.
  // INT8 under a bias: the maximum is relative to `origin`, the largest logit so far.
  struct RowState {
    alignas(kAlignment) float origin[kBlockRows + 16];
    alignas(kAlignment) float maximum[kBlockRows + 16];
    alignas(kAlignment) float sum[kBlockRows + 16];
    alignas(kAlignment) float factor[kBlockRows + 16];
    alignas(kAlignment) float centre[kBlockRows + 16];
    alignas(kAlignment) int32_t key_bias[kBlockRows + 16];
    // The query's part of what offsets add to a logit, scaled: its sum times the key's offset, and
    // its offset times the key's code sum. The value offsets' part of the sum of values.
    alignas(kAlignment) float query_sum[kBlockRows + 16];
    alignas(kAlignment) float query_offset[kBlockRows + 16];
    alignas(kAlignment) float value_offset[kBlockRows + 16];
  };

  void load_queries(int64_t b, int64_t n, int64_t k, Range rows, Scratch& s,
                    RowState& state) const {
    const float scale = call_.scale * kLog2E;
    for (int r = 0; r < kBlockRows; ++r) {
      state.origin[r] = call_.bias ? kHidden : 0.0f;
      state.maximum[r] = kHidden;
      state.sum[r] = 0.0f;
      state.factor[r] = scale;
      state.centre[r] = 0.0f;
      state.key_bias[r] = 0;
      state.query_sum[r] = 0.0f;
      state.query_offset[r] = 0.0f;
      state.value_offset[r] = 0.0f;
    }
    const int64_t count = rows.end - rows.begin;
    for (int64_t t = 0; t < round_up(count, kGroupRows); t += R) {
      for (int r = 0; r < R; ++r) {
        Lane* out = s.rows + r * lanes_;
        if (t + r >= count) {
          std::fill(out, out + lanes_, Lane(0));
          continue;
        }
        const int64_t i = rows.begin + t + r;
        load_query(b, i, n, k, t + r, scale, s, out, state);
      }
      interleave<R>(s.rows, lanes_, lanes_, s.query + t * lanes_);
    }
  }

  void load_query(int64_t b, int64_t i, int64_t n, int64_t k, int64_t row, float scale, Scratch& s,
                  Lane* out, RowState& state) const {
    const float* mean = keys_.mean(b, k);
    if constexpr (kInt8) {
      ScaleAndOffset own;
      const int8_t* codes =
          QuantizedRow<Isa>::codes_of(call_.query, b, i, n, call_.H, s.row, s.codes, &own);
      row_to_lanes<Core>(codes, DType::kS8, call_.H, 0, out);
      const int32_t total = sum_of(codes, call_.H);
      state.factor[row] = own.scale * scale;
      state.key_bias[row] = Core::kKeyBias * total;
      if (has_offsets_) {
        const float sum = own.scale * static_cast<float>(total);
        state.query_sum[row] = scale * (sum + static_cast<float>(call_.H) * own.offset);
        state.query_offset[row] = scale * own.offset;
      }
      if (mean) {
        // The row itself, not the codes that it was rounded to once more.
        QuantizedRow<Isa>::load(call_.query, b, i, n, call_.H, s.row);
        state.centre[row] = scale * dot<Isa>(s.row, mean, call_.H);
      }
    } else if constexpr (kBf16) {
      row_to_lanes<Core>(row_of(call_.query, b, i, n), call_.query.dtype, call_.H, 0, out);
    } else {
      QuantizedRow<Isa>::load_uncentred(call_.query, b, i, n, call_.H, out);
      scale_row<Isa>(out, call_.H, scale);
      if (mean) state.centre[row] = dot<Isa>(out, mean, call_.H);
    }
  }

  void attend_group(const Visibility& visibility, const Rules& rules, int64_t b, int64_t k,
                    int64_t head, Range group, int64_t g, int64_t key0, Range seen, Scratch& s,
                    RowState& state) {
    const int64_t begin = (seen.begin - key0) / kStep * kStep;
    const int64_t end = round_up(seen.end - key0, kStep);
    for (int64_t j = begin; j < end; j += C) {
      for (int t = 0; t < kGroupRows; t += R) {
        score_tile<Core>(s.query + (g + t) * lanes_, key_panels(head, key0 + j), lanes_,
                         s.scores + t * kBlockKeys + j, kBlockKeys);
      }
    }
    alignas(kAlignment) float rescale[kGroupRows];
    // Per subtile and row: what turns integer sums into the running scale.
    alignas(kAlignment) float subtile_factor[kBlockKeys / kSubtileKeys][kGroupRows];
    const int64_t rows = group.end - group.begin;
    for (int64_t r = rows; r < kGroupRows; ++r) {
      rescale[r] = 1.0f;
      for (auto& factor : subtile_factor) factor[r] = 0.0f;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = g + r;
      float* scores = s.scores + r * kBlockKeys;
      const Range visible = visibility.of_row(group.begin + r);
      const bool edit =
          rules.any() || has_offsets_ || visible.begin > key0 + begin || visible.end < key0 + end;
      if (edit) {
        if constexpr (kInt8) to_logits(head, key0, begin, end, scores, row, state);
        if constexpr (!kInt8 && !kBf16) add_centre(begin, end, scores, state.centre[row]);
        if constexpr (kBf16) scale_row<Isa>(scores + begin, end - begin, state.factor[row]);
        rules.apply(scores, group.begin + r, key0, begin, end, visible);
      }
      if constexpr (kInt8) {
        const auto softmax = has_value_offsets_ ? &AttentionForward::softmax_row_int8<true>
                                                : &AttentionForward::softmax_row_int8<false>;
        (this->*softmax)(head, key0, begin, end, edit, scores, row, r, s, state, rescale[r],
                         subtile_factor);
      } else if (kBf16 && !edit) {
        softmax_row<true>(scores, begin, end, row, r, s, state, rescale[r]);
      } else {
        softmax_row<false>(scores, begin, end, row, r, s, state, rescale[r]);
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
          const Lane* values = value_lines(head, key0 + j) + p * value_panel_stride();
          for (int t = 0; t < kGroupRows; t += R) {
            value_tile<Core, kBlockKeys / G>(s.probabilities + (t * kBlockKeys + j) / G, values,
                                             kSubtileKeys / G, out + t * value_columns_ + p * C,
                                             value_columns_, subtile_factor[j / kSubtileKeys] + t);
          }
        }
      }
    } else {
      for (int64_t p = 0; p < value_panels_; ++p) {
        const Lane* values = value_lines(head, key0 + begin) + p * value_panel_stride();
        for (int t = 0; t < kGroupRows; t += R) {
          value_tile<Core, kBlockKeys / G>(s.probabilities + (t * kBlockKeys + begin) / G, values,
                                           (end - begin) / G, out + t * value_columns_ + p * C,
                                           value_columns_, rescale + t);
        }
      }
    }
    add_nonfinite_values(b, k, head, key0, seen, rows, s, out, state, g);
  }

  // What centring took from the logits of a row, if bias or soft cap need it.
  void add_centre(int64_t begin, int64_t end, float* scores, float centre) const {
    if (!needs_whole_logits(call_) || centre == 0.0f) return;
    for (int64_t j = begin; j < end; j += W) {
      Isa::store(scores + j, Isa::add(Isa::load(scores + j), Isa::set1(centre)));
    }
  }

  // Integer scores to logits, in place: (score - bias) * key scale * row factor, plus what offsets
  // add, and what centring took away if bias or soft cap need it.
  void to_logits(int64_t head, int64_t key0, int64_t begin, int64_t end, float* scores, int64_t row,
                 const RowState& state) const {
    const float* key_scale = key_scales(head) + key0;
    const F centre = Isa::set1(needs_whole_logits(call_) ? state.centre[row] : 0.0f);
    for (int64_t j = begin; j < end; j += W) {
      const F factor = Isa::mul(Isa::load(key_scale + j), Isa::set1(state.factor[row]));
      Isa::store(scores + j, Isa::fma(unbiased(scores + j, row, state), factor, centre));
    }
    if (!has_offsets_) return;
    const float* offset = key_offsets(head) + key0;
    const float* code_sum = key_code_sums(head) + key0;
    const F query_sum = Isa::set1(state.query_sum[row]);
    const F query_offset = Isa::set1(state.query_offset[row]);
    for (int64_t j = begin; j < end; j += W) {
      const F logit = Isa::fma(Isa::load(offset + j), query_sum, Isa::load(scores + j));
      Isa::store(scores + j, Isa::fma(Isa::load(code_sum + j), query_offset, logit));
    }
  }

  static F unbiased(const float* scores, int64_t row, const RowState& state) {
    const F score = Isa::to_float(Isa::load_i32(scores));
    if constexpr (Core::kKeyBias == 0) return score;
    return Isa::sub(score, Isa::set1(static_cast<float>(state.key_bias[row])));
  }

  // Logits to probabilities relative to the running maximum, which may grow: `rescale` is what that
  // does to everything accumulated before.
  // With kScale, `scores` are products that the row's factor makes logits.
  template <bool kScale>
  void softmax_row(const float* scores, int64_t begin, int64_t end, int64_t row, int64_t r,
                   Scratch& s, RowState& state, float& rescale) const {
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
    Lane* out = s.probabilities + r * (kBlockKeys / G);
    if (now == kHidden) {
      // Nothing visible yet. (A NaN is not hidden: it must reach the output.)
      rescale = 1.0f;
      bool nan = false;
      for (int64_t j = begin; j < end; ++j) nan |= scores[j] != scores[j];
      if (!nan) {
        std::fill(out + begin / G, out + end / G, Lane(0));
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
      if constexpr (kBf16) {
        Isa::store_bf16_pair(out + j / G, p0, p1);
      } else {
        Isa::store(reinterpret_cast<float*>(out) + j, p0);
        if constexpr (kUnroll == 2) Isa::store(reinterpret_cast<float*>(out) + j + W, p1);
      }
    }
    rescale = before == kHidden ? (state.sum[row] == 0.0f ? 0.0f : 1.0f) : std::exp2(before - now);
    state.maximum[row] = now;
    state.sum[row] = state.sum[row] * rescale + Isa::reduce_add(Isa::add(l0, l1));
  }

  // 8-bit probabilities: logits, or integer scores, become logit + log2(value scale) in place; each
  // subtile of keys is rounded against its own maximum of them; the normaliser, and the sum of
  // value offsets, take the unrounded probabilities.
  template <bool kValueOffsets>
  void softmax_row_int8(int64_t head, int64_t key0, int64_t begin, int64_t end, bool are_logits,
                        float* scores, int64_t row, int64_t r, Scratch& s, RowState& state,
                        float& rescale,
                        float (&subtile_factor)[kBlockKeys / kSubtileKeys][kGroupRows]) const {
    constexpr float kLog2Of255 = 7.99435344f;
    // A subtile with nothing visible keeps a finite maximum: -inf - -inf would be NaN.
    constexpr float kFloor = -1e30f;
    const float* fold = fold_log2(head) + key0;
    const float* inverse = fold_inverse(head) + key0;
    const float* key_scale = key_scales(head) + key0;
    const F row_factor = Isa::set1(state.factor[row]);
    float subtile_max[kBlockKeys / kSubtileKeys];
    float before = state.maximum[row];
    if (call_.bias) move_origin(begin, end, scores, row, state, before);
    float now = before;
    for (int64_t j0 = begin; j0 < end; j0 += kSubtileKeys) {
      F m = Isa::set1(kFloor);
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
      if (largest > kFloor) now = std::max(now, largest);
    }
    const float reference = now == kHidden ? 0.0f : now;
    rescale = before == kHidden ? 0.0f : std::exp2(before - reference);
    float sum = state.sum[row] * rescale, offset_sum = state.value_offset[row] * rescale;
    char* out = reinterpret_cast<char*>(s.probabilities + r * (kBlockKeys / G));
    for (int64_t j0 = begin; j0 < end; j0 += kSubtileKeys) {
      const float largest = subtile_max[j0 / kSubtileKeys];
      const F shift = Isa::set1(kLog2Of255 - largest);
      F l = Isa::zero(), offsets = Isa::zero();
      for (int64_t j = j0; j < j0 + kSubtileKeys; j += G * W) {
        F p[G];
        for (int i = 0; i < G; ++i) {
          p[i] = Isa::template exp2<kDegree>(Isa::add(Isa::load(scores + j + i * W), shift));
          if constexpr (kValueOffsets) {
            const F unfolded = Isa::mul(p[i], Isa::load(inverse + j + i * W));
            const float* offset = value_offsets(head) + key0;
            offsets = Isa::fma(unfolded, Isa::load(offset + j + i * W), offsets);
            l = Isa::add(l, unfolded);
          } else {
            l = Isa::fma(p[i], Isa::load(inverse + j + i * W), l);
          }
        }
        Isa::store_probabilities(out + j * (4 / G), p);
      }
      const float factor =
          largest > kFloor ? std::exp2(largest - reference) * (1.0f / 255.0f) : 0.0f;
      subtile_factor[j0 / kSubtileKeys][r] = factor;
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

  // Adds probability * value for the marked keys that a row sees.
  void add_nonfinite_values(int64_t b, int64_t k, int64_t head, int64_t key0, Range seen,
                            int64_t rows, Scratch& s, float* out, const RowState& state,
                            int64_t g) const {
    const uint8_t* dirty = value_dirty_.get() + head * key_blocks_ * kBlockKeys;
    bool any = false;
    for (int64_t j = seen.begin; j < seen.end; ++j) any |= dirty[j] != 0;
    if (!any) return;
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      if (!dirty[j]) continue;
      values_.load(b, j, k, s.row);
      const float per_unit = kInt8 ? 1.0f / value_unit_[head] : 1.0f;
      for (int64_t r = 0; r < rows; ++r) {
        float p;
        if constexpr (kInt8) {
          const float logit = s.scores[r * kBlockKeys + j - key0];
          // A row that has seen nothing has no maximum to subtract.
          p = logit == kHidden ? 0.0f
                               : std::exp2(logit - fold_log2(head)[j] - state.maximum[g + r]);
        } else if constexpr (kBf16) {
          const auto* bits = reinterpret_cast<const uint16_t*>(s.probabilities);
          p = float_from_bf16(bits[r * kBlockKeys + j - key0]);
        } else {
          p = s.scores[r * kBlockKeys + j - key0];
        }
        if (p == 0.0f) continue;
        float* o = out + r * value_columns_;
        for (int64_t c = 0; c < call_.V; ++c) o[c] += p * (s.row[c] * per_unit);
      }
    }
  }

  void finish_row(int64_t b, int64_t n, int64_t i, int64_t r, Scratch& s,
                  const RowState& state) const {
    const int64_t index = (b * call_.T + i) * call_.N + n;
    const float sum = state.sum[r];
    const bool empty = sum == 0.0f;
    const int64_t k = n / (call_.N / call_.K);
    const float unit = kInt8 ? value_unit_[b * call_.K + k] : 1.0f;
    float* out = s.out + r * value_columns_;
    float factor = empty ? 0.0f : unit / sum;
    const float* mean = values_.mean(b, k);
    if (!empty && (mean || has_value_offsets_)) {
      const float offset = has_value_offsets_ ? state.value_offset[r] / sum : 0.0f;
      for (int64_t c = 0; c < call_.V; ++c) {
        out[c] = out[c] * factor + offset + (mean ? mean[c] : 0.0f);
      }
      factor = 1.0f;
    }
    store_row<Isa>(call_.out, index * call_.V, out, call_.V, factor);
    float maximum = 0.0f, log2_sum = kEmptyRowLog2Sum;
    if (!empty) {
      log2_sum = std::log2(sum);
      if (state.maximum[r] != kHidden) maximum = state.maximum[r];
      if (kInt8 && call_.bias) {
        log2_sum += maximum;
        maximum = state.origin[r] == kHidden ? 0.0f : state.origin[r];
      }
      if (!kBf16 && !needs_whole_logits(call_)) maximum += state.centre[r];
    }
    static_cast<float*>(call_.row_maximum.data)[index] = maximum;
    static_cast<float*>(call_.log2_sum.data)[index] = log2_sum;
  }

  const AttentionForwardCall& call_;
  Parallel& parallel_;
  const int64_t lanes_, key_blocks_, value_panels_, value_columns_;
  CentredRows<Isa> keys_, values_;
  const bool has_offsets_, has_value_offsets_;
  Buffer<Lane> packed_keys_, packed_values_;
  Buffer<float> row_scales_, value_unit_, key_offsets_, value_offsets_;
  Buffer<uint8_t> value_dirty_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
