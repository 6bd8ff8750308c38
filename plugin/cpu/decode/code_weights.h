// Probabilities times the scales of their values, as integers: what rows of codes are multiplied
// with in attention of a few queries.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/decode/code_products.h"
#include "cpu/decode/decode_queries.h"

namespace jax_gluon::cpu {
namespace {

// The scale, and perhaps the offset, of each of `keys`, where rows of all heads are the lanes of
// vectors: [keys][padded rows]. False where there are no offsets.
template <class Isa>
bool load_scales_of_rows(const DecodeQueries<Isa>& queries, const QuantizableOperand& x, int64_t b,
                         Range keys, float* scale, float* offset) {
  constexpr int64_t W = Isa::kLanes;
  const Quantization& q = x.quantization;
  const int64_t rows = queries.all_rows, padded = queries.padded_rows;
  const auto load = [&](const Operand& from, int64_t j, float* to) {
    const int64_t at = scale_offset(from, q, b, j, 0), step = from.stride[1];
    if (step == 1 && from.dtype == DType::kF32) {
      const float* heads = static_cast<const float*>(from.data) + at;
      for (int64_t i = 0; i < padded; i += W) {
        // Those of the heads that the rows of the vector belong to.
        const int64_t first = i / queries.head_rows;
        const int count = static_cast<int>(std::min(W, queries.heads - first) * 4);
        const auto row_head = Isa::load_i32(queries.row_head.get() + i);
        Isa::store_i32(to + i, Isa::permute(Isa::load_bytes(heads + first, count), row_head));
      }
    } else {
      for (int64_t i = 0; i < rows; i += queries.head_rows) {
        const float x = float_at(from.data, from.dtype, at + i / queries.head_rows * step);
        std::fill(to + i, to + i + queries.head_rows, x);
      }
    }
    std::fill(to + rows, to + padded, 0.0f);
  };
  for (int64_t j = keys.begin; j < keys.end; ++j, scale += padded, offset += padded) {
    load(q.scale, j, scale);
    if (!q.offset) continue;
    load(q.offset, j, offset);
    for (int64_t i = 0; i < rows; ++i) offset[i] = code_offset(q, scale[i], offset[i]);
  }
  return static_cast<bool>(q.offset);
}

// A row of values may have several scales: the groups of its elements then have weights of their
// own. Weights are bytes, those of four keys side by side.
template <class Isa>
class CodeWeights {
  using F = typename Isa::F;
  using I = typename Isa::I;
  static constexpr int64_t W = Isa::kLanes;
  // Bytes of a group of values: the lanes of a vector, 16 bytes apart, then belong to at most W.
  static constexpr int64_t kMinGroupBytes = 8;

 public:
  // Keys that are weighed at once, at most.
  static constexpr int64_t kMaxKeys = 32;

  static int64_t groups_of(const AttentionForwardCall& call) {
    const int64_t size = call.value.quantization.head_block;
    return std::max<int64_t>(1, blocks_of(call.V, size));
  }
  static bool takes(const AttentionForwardCall& call) {
    const Quantization& q = call.value.quantization;
    const int64_t codes = codes_of_byte(q);
    return groups_of(call) == 1 ||
           (q.head_block % codes == 0 && q.head_block / codes >= kMinGroupBytes);
  }

  CodeWeights(const AttentionForwardCall& call, const DecodeQueries<Isa>& queries)
      : call_(call), queries_(queries), groups_(queries.groups), lanes_(queries.group_lanes) {
    if (groups_ > 1) find_groups();
  }

  struct Scratch {
    Buffer<uint32_t> weights;     // [keys / 4][padded rows], or [keys / 4][head rows][group lanes]
    Buffer<float> unit;           // [padded rows], or [head rows][group lanes]: of a weight of 1
    Buffer<float> scale, offset;  // [keys][padded rows], or [keys][group lanes]
    Buffer<float> by_head;        // [keys][head rows][heads] and a vector more: probabilities
    Buffer<uint16_t> scale_rows, minimum_rows;  // [keys][group lanes]: of several pages
  };

  void prepare(Scratch& s) const {
    const int64_t widest = std::max(queries_.padded_rows, lanes_);
    // Groups are read in whole vectors from any of them on.
    const int64_t count = std::max(queries_.padded_rows, queries_.head_rows * lanes_ + W);
    s.weights.allocate(kMaxKeys / 4 * count);
    s.unit.allocate(count);
    for (Buffer<float>* each : {&s.scale, &s.offset}) each->allocate(kMaxKeys * widest);
    s.by_head.allocate(kMaxKeys * queries_.all_rows + W);
    if (call_.page_tokens != 0) {
      s.scale_rows.allocate(kMaxKeys * lanes_);
      s.minimum_rows.allocate(kMaxKeys * lanes_);
    }
  }

  // What is weighed: probabilities, [keys][padded rows] and a vector more, and the sums of
  // probability * offset that grow meanwhile, in the order of the groups.
  struct Rows {
    float *probabilities, *offsets;
  };

  // Weights against the largest of each row. A hidden key weighs exactly nothing, whatever its
  // scale.
  template <class Value>
  void weigh(int64_t b, Range keys, const Rows& rows, Scratch& s) const {
    groups_ == 1 ? weigh_rows<Value>(b, keys, rows, s) : weigh_groups<Value>(b, keys, rows, s);
  }

  // Those of kv head k.
  CodeWeightsOfHead of_head(int64_t k, const Scratch& s) const {
    const int64_t i = k * queries_.head_rows;
    if (groups_ == 1) {
      return {s.weights.get() + i, queries_.padded_rows, s.unit.get() + i, 1, nullptr, nullptr};
    }
    const int64_t first = k * groups_;
    return {s.weights.get() + first, queries_.head_rows * lanes_, s.unit.get() + first, lanes_,
            lane_group_.get(),       first_group_.get()};
  }

 private:
  static int64_t codes_of_byte(const Quantization& q) { return q.bits == 4 ? 2 : 1; }

  void find_groups() {
    const int64_t codes = codes_of_byte(call_.value.quantization);
    const int64_t group = call_.value.quantization.head_block / codes;
    const int64_t vectors = round_up(queries_.value_width / codes, W) / W;
    lane_group_.allocate(vectors * W);
    first_group_.allocate(vectors);
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const auto group_of = [&](int64_t lane) {
        const int64_t byte = vector / 4 * 4 * W + lane / 4 * 16 + vector % 4 * 4 + lane % 4;
        return std::min(byte / group, groups_ - 1);
      };
      first_group_[vector] = static_cast<int32_t>(group_of(0));
      for (int64_t lane = 0; lane < W; ++lane) {
        lane_group_[vector * W + lane] = static_cast<int32_t>(group_of(lane) - group_of(0));
      }
    }
    lane_head_.allocate(lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t head = std::min(lane / groups_, call_.K - 1);
      lane_head_[lane] = static_cast<int32_t>(head - first_head(lane / W));
    }
  }
  // Of the groups that are vector `vector` of the lanes.
  int64_t first_head(int64_t vector) const { return vector * W / groups_; }

  // Where weights of a vector of lanes go: as floats, and as bytes, from key to key.
  struct Lanes {
    float* weights;
    int64_t weight_stride;
    uint32_t* bytes;
    int64_t byte_stride;
    float* unit;
  };

  // load(j, &p, &scale, &offset) gives what belongs to key j. `offsets` is what the sum of p *
  // offset starts from, and `scale_offset` times the scale belongs to the offset. Returns the sum,
  // less what the bias of the codes will add.
  template <class Value, bool kHasOffsets, class Load>
  static JAX_GLUON_INLINE F weigh_lanes(int64_t count, F offsets, float scale_offset, Lanes to,
                                        Load load) {
    F largest = Isa::zero(), sum = Isa::zero();
    for (int64_t j = 0; j < count; ++j) {
      F p, scale, offset;
      load(j, &p, &scale, &offset);
      const F weight = Isa::where_nonzero(p, Isa::mul(p, scale));
      if constexpr (kHasOffsets) {
        offsets = Isa::add(offsets, Isa::where_nonzero(p, Isa::mul(p, offset)));
      }
      largest = Isa::max(weight, largest);
      sum = Isa::add(sum, weight);
      Isa::store(to.weights + j * to.weight_stride, weight);
    }
    for (int64_t j = count; j < round_up(count, 4); ++j) {
      Isa::store(to.weights + j * to.weight_stride, Isa::zero());
    }
    // What a weight of 1 is worth: nothing where all are nothing.
    const F smallest = Isa::set1(std::numeric_limits<float>::min());
    F unit = Isa::mul(largest, Isa::set1(1.0f / static_cast<float>(Value::kMaxWeight)));
    const F inverse = Isa::where_less(unit, smallest, Isa::zero(), Isa::div(Isa::set1(1.0f), unit));
    unit = Isa::where_less(unit, smallest, Isa::zero(), unit);
    I total = Isa::set1_i32(0);
    for (int64_t j = 0; j < count; j += 4) {
      I integer[4];
      JAX_GLUON_UNROLL
      for (int64_t e = 0; e < 4; ++e) {
        const F weight = Isa::load(to.weights + (j + e) * to.weight_stride);
        integer[e] = Isa::to_int(Isa::mul(weight, inverse));
        if constexpr (Value::kValueBias != 0) total = Isa::add_i32(total, integer[e]);
      }
      Isa::store_i32(to.bytes + j / 4 * to.byte_stride,
                     Isa::pack_bytes(integer[0], integer[1], integer[2], integer[3]));
    }
    // NaN where a weight is not finite.
    Isa::store(to.unit, Isa::fma(sum, Isa::zero(), unit));
    if (scale_offset != 0.0f) offsets = Isa::fma(sum, Isa::set1(scale_offset), offsets);
    if constexpr (Value::kValueBias == 0) return offsets;
    const F bias = Isa::set1(static_cast<float>(-Value::kValueBias));
    return Isa::fma(Isa::mul(Isa::to_float(total), unit), bias, offsets);
  }

  // The lanes are rows.
  template <class Value>
  void weigh_rows(int64_t b, Range keys, const Rows& rows, Scratch& s) const {
    const float *scales = s.scale.get(), *offsets = s.offset.get();
    if (load_scales_of_rows(queries_, call_.value, b, keys, s.scale.get(), s.offset.get())) {
      weigh_rows<Value, true>(keys.end - keys.begin, scales, offsets, rows, s);
    } else {
      weigh_rows<Value, false>(keys.end - keys.begin, scales, offsets, rows, s);
    }
  }
  template <class Value, bool kHasOffsets>
  void weigh_rows(int64_t count, const float* scales, const float* offsets, const Rows& rows,
                  Scratch& s) const {
    const int64_t padded = queries_.padded_rows;
    for (int64_t i = 0; i < padded; i += W) {
      const float* probabilities = rows.probabilities + i;
      const auto load = [&](int64_t j, F* p, F* scale, F* offset) {
        *p = Isa::load(probabilities + j * padded);
        *scale = Isa::load(scales + j * padded + i);
        if constexpr (kHasOffsets) *offset = Isa::load(offsets + j * padded + i);
      };
      const Lanes to{rows.probabilities + i, padded, s.weights.get() + i, padded, s.unit.get() + i};
      const F sum = Isa::load(rows.offsets + i);
      Isa::store(rows.offsets + i, weigh_lanes<Value, kHasOffsets>(count, sum, 0.0f, to, load));
    }
  }

  // Whether the groups of all heads can be read in whole vectors from the scales or minima `x` as
  // they are stored. Past the last head a vector holds numbers of later keys, which nobody uses:
  // there have to be as many.
  bool has_vectors_of_heads(const Operand& x, Range keys) const {
    return has_bf16_rows(x) && (call_.K == 1 || x.stride[1] == groups_) &&
           has_lanes_beside(x, keys.end, call_.S);
  }
  bool has_lanes_beside(const Operand& x, int64_t end, int64_t stored) const {
    return (stored - end) * x.stride[0] >= lanes_ - call_.K * groups_;
  }

  // Rows of bfloat16 numbers, `stride` apart, that are read in whole vectors.
  struct Bf16Rows {
    const uint16_t* data;
    int64_t stride;
  };
  // Those of `keys`: in place, or copied where they are on several pages, or are the last of one.
  Bf16Rows vectors_of_heads(const Operand& x, int64_t b, Range keys, uint16_t* to) const {
    const auto* data = static_cast<const uint16_t*>(x.data);
    const int64_t page_end = end_of_piece(x, keys.begin, call_.S);
    const bool in_place =
        x.pages == 0 || (keys.end <= page_end && has_lanes_beside(x, keys.end, page_end));
    if (in_place) return {data + token_offset(x, b, keys.begin), x.stride[0]};
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const uint16_t* row = data + token_offset(x, b, j);
      uint16_t* copy = to + (j - keys.begin) * lanes_;
      std::copy(row, row + call_.K * groups_, copy);
      std::fill(copy + call_.K * groups_, copy + lanes_, uint16_t{0});
    }
    return {to, lanes_};
  }

  // The lanes are the groups of all heads.
  template <class Value>
  void weigh_groups(int64_t b, Range keys, const Rows& rows, Scratch& s) const {
    const Quantization& q = call_.value.quantization;
    const int64_t count = keys.end - keys.begin;
    if (q.token_block == 1 && q.offset_kind == Quantization::Offset::kMinimum &&
        has_vectors_of_heads(q.scale, keys) && has_vectors_of_heads(q.offset, keys)) {
      const Bf16Rows scales = vectors_of_heads(q.scale, b, keys, s.scale_rows.get());
      const Bf16Rows minima = vectors_of_heads(q.offset, b, keys, s.minimum_rows.get());
      // What the least code adds to the minima is added for all keys at once.
      weigh_heads<Value>(count, -least_code(q), rows, s,
                         [&](int64_t j, int64_t lane, F* scale, F* offset) {
                           *scale = Isa::load_bf16(scales.data + j * scales.stride + lane);
                           *offset = Isa::load_bf16(minima.data + j * minima.stride + lane);
                         });
      return;
    }
    float *scales = s.scale.get(), *offsets = s.offset.get();
    std::fill(scales, scales + count * lanes_, 0.0f);
    std::fill(offsets, offsets + count * lanes_, 0.0f);
    for (int64_t i = 0; i < count * call_.K * groups_; ++i) {
      const int64_t j = i / (call_.K * groups_), lane = i % (call_.K * groups_);
      const ScaleAndOffset x =
          scale_at(call_.value, b, keys.begin + j, lane / groups_, lane % groups_);
      scales[j * lanes_ + lane] = x.scale;
      offsets[j * lanes_ + lane] = x.offset;
    }
    weigh_heads<Value>(count, 0.0f, rows, s, [&](int64_t j, int64_t lane, F* scale, F* offset) {
      *scale = Isa::load(scales + j * lanes_ + lane);
      *offset = Isa::load(offsets + j * lanes_ + lane);
    });
  }

  // Probabilities of row r of each head, side by side.
  struct HeadRows {
    const float* data;
    int64_t key_step, row_step;
  };
  HeadRows rows_by_head(const float* probabilities, int64_t count, Scratch& s) const {
    const int64_t padded = queries_.padded_rows, rows = queries_.head_rows, heads = call_.K;
    if (rows == 1) return {probabilities, padded, 0};
    float* to = s.by_head.get();
    for (int64_t j = 0; j < count; ++j, probabilities += padded) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < heads; ++k) *to++ = probabilities[k * rows + r];
      }
    }
    return {s.by_head.get(), rows * heads, heads};
  }

  // load_lanes(j, lane, &scale, &offset) gives those of key j and W lanes.
  template <class Value, class Load>
  void weigh_heads(int64_t count, float scale_offset, const Rows& rows, Scratch& s,
                   Load load_lanes) const {
    alignas(kAlignment) float weights[kMaxKeys * W];
    const HeadRows by_head = rows_by_head(rows.probabilities, count, s);
    const int64_t key_step = by_head.key_step, byte_step = queries_.head_rows * lanes_;
    for (int64_t r = 0; r < queries_.head_rows; ++r) {
      for (int64_t lane = 0; lane < lanes_; lane += W) {
        const float* first = by_head.data + r * by_head.row_step + first_head(lane / W);
        const I heads = Isa::load_i32(lane_head_.get() + lane);
        const auto load = [&](int64_t j, F* p, F* scale, F* offset) {
          *p = Isa::permute(Isa::load(first + j * key_step), heads);
          load_lanes(j, lane, scale, offset);
        };
        const int64_t at = r * lanes_ + lane;
        const Lanes to{weights, W, s.weights.get() + at, byte_step, s.unit.get() + at};
        float* offsets = rows.offsets + at;
        Isa::store(offsets,
                   weigh_lanes<Value, true>(count, Isa::load(offsets), scale_offset, to, load));
      }
    }
  }

  const AttentionForwardCall& call_;
  const DecodeQueries<Isa>& queries_;
  const int64_t groups_, lanes_;  // of a row, and of all heads in whole vectors
  // Of the vectors of a row of values: the group of the first lane, and those of all from there.
  Buffer<int32_t> first_group_, lane_group_;
  Buffer<int32_t> lane_head_;  // of the groups of all heads: from the first of each vector
};

}  // namespace
}  // namespace jax_gluon::cpu
