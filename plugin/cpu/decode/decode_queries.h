// What attention of a few queries has in common, in floats and in codes: queries in the order in
// which keys are stored, scales of keys folded into them, and the sums of a chunk of keys.
#pragma once

#include <algorithm>

#include "cpu/decode/decode_chunks.h"
#include "cpu/rows/quantized_rows.h"
#include "cpu/simd/compiler.h"
#include "numerics.h"

namespace jax_gluon::cpu {
namespace {

// Rows are those of all kv heads, head_rows of each: row i is row i % head_rows of kv head i /
// head_rows. Key and Value, FloatProducts or CodeProducts, say how elements are stored.
template <class Isa>
class DecodeQueries {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;

 public:
  // Keys that share scales, at least, where these are folded into the queries for them.
  static constexpr int64_t kMinSharingKeys = 8;

  // `chunk`: keys of a task, at least. `step`: elements of a row that are unpacked at a time, at
  // most. `groups`: parts of a row of values that have sums of offsets.
  DecodeQueries(const AttentionForwardCall& call, Parallel& parallel, int64_t chunk, int64_t step,
                int64_t groups)
      : call_(call),
        chunks_(call, parallel, DecodeChunks<Isa>::keys_of(call, chunk)),
        head_rows(chunks_.rows()),
        all_rows(call.K * head_rows),
        padded_rows(round_up(all_rows, W)),
        head_width(round_up(call.H, step)),
        value_width(round_up(call.V, step)),
        groups(groups),
        heads(call.K),
        group_lanes(round_up(call.K * groups, W)) {
    row_head.allocate(padded_rows);
    for (int64_t i = 0; i < padded_rows; ++i) {
      const int64_t row = std::min(i, all_rows - 1);
      row_head[i] = static_cast<int32_t>(row / head_rows - i / W * W / head_rows);
    }
  }

  // Calls attend(b, chunk, visibility, keys) for every chunk with keys that some row may see.
  template <class Attend>
  void run(Attend attend) {
    chunks_.run(attend);
  }

  int64_t query_of(int64_t i) const { return chunks_.query_of(i % head_rows); }
  int64_t head_of(int64_t i) const { return chunks_.head_of(i / head_rows, i % head_rows); }

  struct Scratch {
    Buffer<float> query;              // [all rows][head width]
    Buffer<float> query_sum, center;  // [padded rows]: what offsets and centers of keys multiply
    Buffer<float> folded;             // [head rows][head width]
    Buffer<float> constant;           // [padded rows]: what folded offsets add to scores
    Buffer<float> scale, offset;      // [head width]: of the elements of a key
    Buffer<float> maximum, sum;       // [padded rows]
    Buffer<float> out;                // [all rows][value width], in the order of stored values
    Buffer<float> offsets;            // at groups_at: sums of probability * offset
    Buffer<float> row;                // of a query
  };

  // What a chunk starts from.
  void prepare(Scratch& s) const {
    for (Buffer<float>* each : {&s.query_sum, &s.center, &s.constant, &s.maximum, &s.sum}) {
      fill(*each, padded_rows, 0.0f);
    }
    fill(s.maximum, padded_rows, kHidden);
    fill(s.query, all_rows * head_width, 0.0f);
    fill(s.out, all_rows * value_width, 0.0f);
    fill(s.offsets, std::max(padded_rows, head_rows * group_lanes), 0.0f);
    s.folded.allocate(head_rows * head_width);
    for (Buffer<float>* each : {&s.scale, &s.offset, &s.row}) each->allocate(head_width);
  }

  // Where the groups of row i stand: [padded rows] if there is one, else [head rows][group lanes],
  // those of all heads side by side as their scales are stored.
  int64_t groups_at(int64_t i) const {
    return groups == 1 ? i : i % head_rows * group_lanes + i / head_rows * groups;
  }

  // Query i, scaled; returned in the order of its elements.
  template <class Key>
  float* load_query(int64_t b, int64_t i, Scratch& s) const {
    float* row = s.row.get();
    float* query = s.query.get() + i * head_width;
    QuantizedRow<Isa>::load_uncentered(call_.query, b, query_of(i), head_of(i), call_.H, row);
    scale_row<Isa>(row, call_.H, call_.scale * kLog2E);
    float total = 0.0f;
    for (int64_t h = 0; h < call_.H; ++h) {
      query[Key::query_position(h)] = row[h];
      total += row[h];
    }
    const float* center = stored_center(call_.key, b, i / head_rows);
    s.query_sum[i] = total;
    s.center[i] = center ? dot<Isa>(row, center, call_.H) : 0.0f;
    return row;
  }

  // Calls body(keys) for each run of keys that share scales.
  template <class Body>
  void each_run(Range keys, Body body) const {
    const int64_t size = call_.key.quantization.token_block;
    for (int64_t j = keys.begin; j < keys.end;) {
      const int64_t next = size == 0 ? keys.end : std::min(keys.end, (j / size + 1) * size);
      body(Range{j, next});
      j = next;
    }
  }

  // The queries of kv head k times the scales that key j shares with others, in `folded`, and their
  // products with the offsets, in `constant`.
  template <class Key>
  void fold_scales(int64_t b, int64_t j, int64_t k, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    if (q.head_block == 1 && call_.H % W == 0 && has_bf16_rows(q.scale) &&
        q.offset_kind == Quantization::Offset::kMinimum && has_bf16_rows(q.offset)) {
      const uint16_t* scales =
          static_cast<const uint16_t*>(q.scale.data) + scale_offset(q.scale, q, b, j, k);
      const uint16_t* minima =
          static_cast<const uint16_t*>(q.offset.data) + scale_offset(q.offset, q, b, j, k);
      const F below_minimum = Isa::set1(-least_code(q));
      fold<Key>(
          k, [&](int64_t h) { return h < call_.H ? Isa::load_bf16(scales + h) : Isa::zero(); },
          [&](int64_t h, F scale) {
            if (h >= call_.H) return Isa::zero();
            return Isa::fma(scale, below_minimum, Isa::load_bf16(minima + h));
          },
          s);
      return;
    }
    float *scale = s.scale.get(), *offset = s.offset.get();
    std::fill(scale, scale + head_width, 0.0f);
    std::fill(offset, offset + head_width, 0.0f);
    const int64_t size = q.head_block;
    QuantizedRow<Isa>::load_scales(call_.key, b, j, k, ceil_div(call_.H, size), scale, offset);
    for (int64_t h = call_.H; size > 1 && h-- > 0;) {
      scale[h] = scale[h / size];
      offset[h] = offset[h / size];
    }
    fold<Key>(
        k, [&](int64_t h) { return Isa::load(scale + h); },
        [&](int64_t h, F) { return Isa::load(offset + h); }, s);
  }

  // Multiplies the products of the rows of kv head k with `keys`, a run that shares scales, by what
  // the keys were divided by: that of row r and key j is at scores[r * row_step + j * key_step].
  void apply_powers(int64_t b, Range keys, int64_t k, float* scores, int64_t row_step,
                    int64_t key_step) const {
    if (!has_large_tokens(call_.key, b, keys.begin, k, call_.H)) return;
    for (int64_t j = keys.begin; j < keys.end; ++j, scores += key_step) {
      const float power = power_of_row(call_.key, b, j, k, call_.H);
      if (power == 1.0f) continue;
      for (int64_t r = 0; r < head_rows; ++r) scores[r * row_step] *= power;
    }
  }

  // Of row i, whose maximum grew.
  void rescale(int64_t i, float factor, Scratch& s) const {
    scale_row<Isa>(s.out.get() + i * value_width, value_width, factor);
    scale_row<Isa>(s.offsets.get() + groups_at(i), groups, factor);
  }

  // The sums of all rows as partial results, values in the order of their elements.
  template <class Value>
  void store(int64_t b, int64_t chunk, const Scratch& s) const {
    const int64_t size = groups == 1 ? call_.V : call_.value.quantization.head_block;
    for (int64_t i = 0; i < all_rows; ++i) {
      const auto to = chunks_.partial(b, i / head_rows, chunk, i % head_rows);
      const float* out = s.out.get() + i * value_width;
      const float* offsets = s.offsets.get() + groups_at(i);
      for (int64_t c = 0; c < call_.V; ++c) {
        to.values[c] = out[Value::value_position(c)] + offsets[c / size];
      }
      *to.maximum = s.maximum[i];
      *to.sum = s.sum[i];
      if (s.sum[i] != 0.0f && !needs_whole_logits(call_) && s.maximum[i] != kHidden) {
        *to.maximum += s.center[i];
      }
    }
  }

 private:
  static void fill(Buffer<float>& buffer, int64_t count, float x) {
    buffer.allocate(count);
    std::fill(buffer.get(), buffer.get() + count, x);
  }

  // scale_of(h) and offset_of(h, scale) are those of W elements, in their natural order.
  template <class Key, class ScaleOf, class OffsetOf>
  void fold(int64_t k, ScaleOf scale_of, OffsetOf offset_of, Scratch& s) const {
    for (int64_t r = 0; r < head_rows; ++r) {
      const float* query = s.query.get() + (k * head_rows + r) * head_width;
      float* folded = s.folded.get() + r * head_width;
      F constant = Isa::zero();
      for (int64_t h = 0; h < round_up(call_.H, Key::kStep); h += Key::kStep) {
        F scale[Key::kVectors], offset[Key::kVectors];
        JAX_GLUON_UNROLL
        for (int v = 0; v < Key::kVectors; ++v) {
          scale[v] = scale_of(h + v * W);
          offset[v] = offset_of(h + v * W, scale[v]);
        }
        Key::put_in_order(scale);
        Key::put_in_order(offset);
        JAX_GLUON_UNROLL
        for (int v = 0; v < Key::kVectors; ++v) {
          const F x = Isa::load(query + h + v * W);
          Isa::store(folded + h + v * W, Isa::mul(x, scale[v]));
          constant = Isa::fma(x, offset[v], constant);
        }
      }
      s.constant[k * head_rows + r] = Isa::reduce_add(constant);
    }
  }

  const AttentionForwardCall& call_;
  DecodeChunks<Isa> chunks_;

 public:
  const int64_t head_rows, all_rows, padded_rows;  // of a kv head, of all, of all in whole vectors
  const int64_t head_width, value_width;           // of a row, in whole steps
  const int64_t groups;                            // of a row of values
  const int64_t heads, group_lanes;  // of keys; groups of all of them in whole vectors
  Buffer<int32_t> row_head;  // [padded rows]: kv heads from that of the vector's first row on
};

}  // namespace
}  // namespace jax_gluon::cpu
