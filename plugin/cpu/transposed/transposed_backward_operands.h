// Operands of a backward pass, packed for its products: the keys of a part, the rows of a block.
// All are bfloat16, exact where codes have one scale a row, which stands beside them.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/backward/backward_parts.h"
#include "cpu/backward/backward_rows.h"
#include "cpu/memory/buffer.h"
#include "cpu/transposed/transposed_pack.h"

namespace jax_gluon::cpu {
namespace {

// Of the keys of a part, in units from its first one. Columns are those of `TransposedBlocks`.
struct BackwardKeys {
  Buffer<uint32_t> keys;         // [keys][row lanes]: left operand of S^T
  Buffer<uint32_t> values;       // [keys][value columns / 2]: left operand of dP^T
  Buffer<uint32_t> key_columns;  // [units][head columns / 16][16][16]: left operand of dQ^T
  Buffer<float> scale;           // of each key, in S
  Buffer<float> value_scale;     // in dP
  Buffer<float> gradient_scale;  // in dQ: 0 where the key is not finite
};

// Of the rows of a block.
template <class Rows>
struct BackwardQueries {
  Buffer<uint32_t> query, d_out;              // [rows / 16][lanes][16]: right operands
  Buffer<uint32_t> query_pairs, d_out_pairs;  // [rows / 32][columns / 16][16][16]: for dK, dV
  // Of each row: what its products are multiplied by, what is taken from its logits, D, and what P
  // is multiplied by.
  Buffer<float> factor, maximum, log2_sum, delta, center, probability_factor;
  Buffer<float> gradient_scale;  // in dK: 0 where the row is not finite
  Buffer<typename Rows::Statistics> statistics;
};

template <class Core>
class TransposedBackwardOperands {
  using Isa = typename Core::Isa;
  using Pack = TransposedPack<Isa>;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;

 public:
  using Rows = BackwardRows<Isa, AttentionBackwardCall>;
  using Queries = BackwardQueries<Rows>;

  struct Scratch {
    Buffer<float> rows, row, d_out;  // [32][columns]; a row; [32][value columns]
    Buffer<uint32_t> lanes;          // [16][lanes]
    Buffer<int8_t> codes;
  };

  explicit TransposedBackwardOperands(const AttentionBackwardCall& call)
      : call_(call),
        lanes_(row_lanes<Core>(call.H)),
        head_columns_(round_up(call.H, kUnitKeys)),
        value_columns_(round_up(call.V, kUnitKeys)),
        rows_(call) {}

  // Keys that are rounded are rounded without their center.
  void find_centers(Parallel& parallel) {
    if (call_.key.quantization.head_block != 0) rows_.find_centers(parallel);
  }

  const Rows& rows() const { return rows_; }
  int64_t lanes() const { return lanes_; }

  void prepare(int64_t keys, int64_t block_rows, Scratch& s, BackwardKeys& k, Queries& q) const {
    const int64_t columns = std::max(head_columns_, value_columns_);
    s.rows.allocate(kUnitKeys * columns);
    s.d_out.allocate(kUnitKeys * value_columns_);
    s.row.allocate(columns + kTileQueries);
    s.lanes.allocate(kTileQueries * std::max(lanes_, columns / 2));
    s.codes.allocate(round_up(columns, 64) + 64);
    k.keys.allocate(keys * lanes_);
    k.values.allocate(keys * value_columns_ / 2);
    k.key_columns.allocate(keys * head_columns_ / 2);
    for (Buffer<float>* x : {&k.scale, &k.value_scale, &k.gradient_scale}) x->allocate(keys);
    q.query.allocate(block_rows * lanes_);
    q.d_out.allocate(block_rows * value_columns_ / 2);
    q.query_pairs.allocate(block_rows * head_columns_ / 2);
    q.d_out_pairs.allocate(block_rows * value_columns_ / 2);
    for (Buffer<float>* x : {&q.factor, &q.maximum, &q.log2_sum, &q.delta, &q.center,
                             &q.probability_factor, &q.gradient_scale}) {
      x->allocate(block_rows);
    }
    q.statistics.allocate(block_rows);
  }

  // Whole units from `part.first_key` on; keys that no row sees are zeros.
  void load_keys(const BackwardPart& part, Scratch& s, BackwardKeys& out) const {
    touch_rows(call_.key, part.b, part.keys.begin, part.keys.end, part.k, call_.H);
    touch_rows(call_.value, part.b, part.keys.begin, part.keys.end, part.k, call_.V);
    for (int64_t first = part.first_key; first < part.keys.end; first += kUnitKeys) {
      const int64_t at = first - part.first_key;
      for (int64_t r = 0; r < kUnitKeys; ++r) load_key(part, first + r, at + r, s, out);
      Pack::pack_columns(s.rows.get(), head_columns_,
                         out.key_columns.get() + at * head_columns_ / 2);
    }
  }

  // Rows of query head n, padded with empty ones to whole pairs of tile columns. Rows that see no
  // key are zeros, and what is not finite is kept out of the products that make dK: there it would
  // meet the zeros of hidden keys. (A row that sees any has NaN in dS already.)
  void load_queries(int64_t b, int64_t n, Range rows, Scratch& s, Queries& out) const {
    const int64_t count = rows.end - rows.begin;
    touch_rows(call_.query, b, rows.begin, rows.end, n, call_.H);
    touch_rows(call_.d_out, b, rows.begin, rows.end, n, call_.V);
    for (int64_t first = 0; first < count; first += kPairQueries) {
      for (int64_t half = first; half < first + kPairQueries; half += kTileQueries) {
        for (int64_t r = half; r < half + kTileQueries; ++r) {
          const int64_t i = r < count ? rows.begin + r : -1;
          load_query(b, i, n, r, s, out);
        }
        Pack::pack_right(s.lanes.get(), lanes_, out.query.get() + half * lanes_);
        for (int64_t r = 0; r < kTileQueries; ++r) {
          Pack::pack_row(s.d_out.get() + (half - first + r) * value_columns_, value_columns_,
                         s.lanes.get() + r * value_columns_ / 2);
        }
        Pack::pack_right(s.lanes.get(), value_columns_ / 2,
                         out.d_out.get() + half * value_columns_ / 2);
      }
      Pack::pack_pairs(s.rows.get(), head_columns_,
                       out.query_pairs.get() + first * head_columns_ / 2);
      Pack::pack_pairs(s.d_out.get(), value_columns_,
                       out.d_out_pairs.get() + first * value_columns_ / 2);
    }
  }

 private:
  static float finite_or_zero(float x) { return x - x == 0.0f ? x : 0.0f; }

  // Row (b, i, n) of codes with one scale a row as they are: `out` times the result is the row. Of
  // all others, what load(out) gives.
  template <class Load>
  float load_scaled(const QuantizableOperand& x, int64_t b, int64_t i, int64_t n, int8_t* codes,
                    const Load& load, float* out) const {
    if (!x.quantization || x.quantization.head_block != 0) {
      load(out);
      return 1.0f;
    }
    const int64_t width = &x == &call_.value ? call_.V : call_.H;
    const ScaledCodes row = QuantizedRow<Isa>::codes_of(x, b, i, n, width, nullptr, codes);
    load_row<Isa>(row.codes, DType::kS8, width, out);
    return row.scale.scale;
  }

  void pack_scores(const float* row, uint32_t* out, Scratch& s) const {
    if constexpr (kInt8) {
      for (int64_t h = 0; h < call_.H; ++h) s.codes[h] = static_cast<int8_t>(row[h]);
      row_to_lanes<Core>(s.codes.get(), DType::kS8, call_.H, 0, out);
    } else {
      Pack::pack_row(row, head_columns_, out);
    }
  }

  void load_key(const BackwardPart& part, int64_t j, int64_t at, Scratch& s,
                BackwardKeys& out) const {
    const int64_t b = part.b, k = part.k;
    float* row = s.row.get();
    float* key = s.rows.get() + at % kUnitKeys * head_columns_;
    uint32_t* lanes = out.keys.get() + at * lanes_;
    uint32_t* values = out.values.get() + at * value_columns_ / 2;
    std::fill(key, key + head_columns_, 0.0f);
    if (j < part.keys.begin || j >= part.keys.end) {
      std::fill(lanes, lanes + lanes_, uint32_t{0});
      std::fill(values, values + value_columns_ / 2, uint32_t{0});
      out.scale[at] = out.value_scale[at] = out.gradient_scale[at] = 0.0f;
      return;
    }
    std::fill(row, row + std::max(head_columns_, value_columns_), 0.0f);
    out.value_scale[at] = load_scaled(
        call_.value, b, j, k, s.codes.get(), [&](float* x) { rows_.value(b, j, k, x); }, row);
    Pack::pack_row(row, value_columns_, values);
    out.scale[at] = load_scaled(
        call_.key, b, j, k, s.codes.get(), [&](float* x) { rows_.key(b, j, k, x); }, key);
    pack_scores(key, lanes, s);
    out.gradient_scale[at] = finite_or_zero(out.scale[at]);
    if (!all_finite<Isa>(key, call_.H)) replace_nonfinite(key, call_.H);
  }

  // An empty row where i < 0.
  void load_query(int64_t b, int64_t i, int64_t n, int64_t r, Scratch& s, Queries& out) const {
    float* query = s.rows.get() + r % kPairQueries * head_columns_;
    float* d_out = s.d_out.get() + r % kPairQueries * value_columns_;
    uint32_t* lanes = s.lanes.get() + r % kTileQueries * lanes_;
    std::fill(query, query + head_columns_, 0.0f);
    std::fill(d_out, d_out + value_columns_, 0.0f);
    auto& statistics = out.statistics[r];
    statistics = {};
    float scale = 0.0f;
    if (i >= 0) {
      rows_.query(b, i, n, s.row.get());
      rows_.d_out(b, i, n, d_out);
      statistics = rows_.statistics(b, i, n, s.row.get(), d_out);
    }
    if (statistics.empty) {
      std::fill(d_out, d_out + value_columns_, 0.0f);
    } else {
      scale = load_scaled(
          call_.query, b, i, n, s.codes.get(), [&](float* x) { rows_.query(b, i, n, x); }, query);
    }
    pack_scores(query, lanes, s);
    out.factor[r] = scale * call_.scale * kLog2E;
    out.maximum[r] = statistics.empty ? 0.0f : statistics.maximum;
    out.log2_sum[r] = statistics.empty ? 0.0f : statistics.log2_sum;
    out.center[r] = statistics.center;
    out.gradient_scale[r] = finite_or_zero(scale);
    if (!all_finite<Isa>(query, call_.H)) replace_nonfinite(query, call_.H);
  }

  const AttentionBackwardCall& call_;
  const int64_t lanes_, head_columns_, value_columns_;
  Rows rows_;
};

}  // namespace
}  // namespace jax_gluon::cpu
