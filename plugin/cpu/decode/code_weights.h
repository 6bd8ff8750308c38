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
  const Quantization& q = x.quantization;
  const int64_t rows = queries.all_rows, padded = queries.padded_rows;
  const auto load = [&](const Operand& from, int64_t j, float* to) {
    const int64_t at = scale_offset(from, q, b, j, 0), step = from.stride[1];
    if (queries.head_rows == 1 && step == 1 && from.dtype == DType::kF32) {
      std::memcpy(to, static_cast<const float*>(from.data) + at,
                  static_cast<size_t>(rows) * sizeof(float));
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
      : call_(call),
        queries_(queries),
        groups_(queries.groups),
        group_stride_(round_up(groups_, W) + W) {
    if (groups_ > 1) find_groups();
  }

  struct Scratch {
    Buffer<uint32_t> weights;     // [keys / 4][padded rows], or [all rows][keys / 4][group stride]
    Buffer<float> unit;           // [padded rows], or [all rows][group stride]: of a weight of 1
    Buffer<float> scale, offset;  // [keys][padded rows]
    Buffer<float> group_scale, group_offset;  // [keys][groups in whole vectors]
  };

  void prepare(Scratch& s) const {
    const int64_t padded = queries_.padded_rows;
    const int64_t count = std::max(padded, queries_.all_rows * group_stride_);
    s.weights.allocate(kMaxKeys / 4 * count);
    s.unit.allocate(count);
    const int64_t groups = round_up(groups_, W);
    for (Buffer<float>* each : {&s.scale, &s.offset}) each->allocate(kMaxKeys * padded);
    for (Buffer<float>* each : {&s.group_scale, &s.group_offset}) {
      each->allocate(kMaxKeys * groups);
      std::fill(each->get(), each->get() + kMaxKeys * groups, 0.0f);
    }
  }

  // What is weighed: probabilities, [keys][padded rows], and the sums of probability * offset that
  // grow meanwhile, [all rows][groups].
  struct Rows {
    float *probabilities, *offsets;
  };

  // Weights against the largest of each row. A hidden key weighs exactly nothing, whatever its
  // scale.
  template <class Value>
  void weigh(int64_t b, Range keys, const Rows& rows, Scratch& s) const {
    groups_ == 1 ? weigh_rows<Value>(b, keys, rows, s) : weigh_groups<Value>(b, keys, rows, s);
  }

  // Those of row i.
  CodeWeightsOfRow of_row(int64_t i, const Scratch& s) const {
    if (groups_ == 1) {
      return {s.weights.get() + i, queries_.padded_rows, s.unit.get() + i, nullptr, nullptr};
    }
    return {s.weights.get() + i * (kMaxKeys / 4) * group_stride_, group_stride_,
            s.unit.get() + i * group_stride_, lane_group_.get(), first_group_.get()};
  }

 private:
  static int64_t codes_of_byte(const Quantization& q) { return q.bits == 4 ? 2 : 1; }

  // The groups that the lanes of a vector of values belong to.
  void find_groups() {
    const int64_t codes = codes_of_byte(call_.value.quantization);
    const int64_t group = call_.value.quantization.head_block / codes;
    const int64_t vectors = queries_.value_width / codes / W;
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
  }

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

  // Whether the vectors that hold the groups of head k end within the scales or minima `x`: all but
  // those of the last keys do, and what they hold besides belongs to other heads or keys.
  bool has_whole_vectors(const Operand& x, Range keys, int64_t k) const {
    const int64_t beside = round_up(groups_, W) - groups_;
    return (call_.S - keys.end) * x.stride[0] + (call_.K - 1 - k) * x.stride[1] >= beside;
  }

  // The lanes are groups.
  template <class Value>
  void weigh_groups(int64_t b, Range keys, const Rows& rows, Scratch& s) const {
    const Quantization& q = call_.value.quantization;
    const int64_t count = keys.end - keys.begin, stride = round_up(groups_, W);
    const bool is_plain = q.token_block == 1 && has_bf16_rows(q.scale) &&
                          q.offset_kind == Quantization::Offset::kMinimum &&
                          has_bf16_rows(q.offset);
    for (int64_t k = 0; k < call_.K; ++k) {
      if (is_plain && has_whole_vectors(q.scale, keys, k) && has_whole_vectors(q.offset, keys, k)) {
        const auto first = [&](const Operand& x) {
          return static_cast<const uint16_t*>(x.data) + scale_offset(x, q, b, keys.begin, k);
        };
        const uint16_t *scales = first(q.scale), *minima = first(q.offset);
        const int64_t scale_step = q.scale.stride[0], minimum_step = q.offset.stride[0];
        // What the least code adds to the minima is added for all keys at once.
        weigh_head<Value>(k, count, -least_code(q), rows, s,
                          [&](int64_t j, int64_t g, F* scale, F* offset) {
                            *scale = Isa::load_bf16(scales + j * scale_step + g);
                            *offset = Isa::load_bf16(minima + j * minimum_step + g);
                          });
        continue;
      }
      float *scales = s.group_scale.get(), *offsets = s.group_offset.get();
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t g = 0; g < groups_; ++g) {
          const ScaleAndOffset x = scale_at(call_.value, b, keys.begin + j, k, g);
          scales[j * stride + g] = x.scale;
          offsets[j * stride + g] = x.offset;
        }
      }
      weigh_head<Value>(k, count, 0.0f, rows, s, [&](int64_t j, int64_t g, F* scale, F* offset) {
        *scale = Isa::load(scales + j * stride + g);
        *offset = Isa::load(offsets + j * stride + g);
      });
    }
  }

  // load_group(j, g, &scale, &offset) gives those of key j and W groups.
  template <class Value, class Load>
  void weigh_head(int64_t k, int64_t count, float scale_offset, const Rows& rows, Scratch& s,
                  Load load_group) const {
    alignas(kAlignment) float weights[kMaxKeys * W], sums[W];
    const int64_t first = k * queries_.head_rows, padded = queries_.padded_rows;
    for (int64_t i = first; i < first + queries_.head_rows; ++i) {
      const float* probabilities = rows.probabilities + i;
      for (int64_t g = 0; g < groups_; g += W) {
        const auto load = [&](int64_t j, F* p, F* scale, F* offset) {
          *p = Isa::set1(probabilities[j * padded]);
          load_group(j, g, scale, offset);
        };
        const Lanes to{weights, W, s.weights.get() + i * (kMaxKeys / 4) * group_stride_ + g,
                       group_stride_, s.unit.get() + i * group_stride_ + g};
        Isa::store(sums, weigh_lanes<Value, true>(count, Isa::zero(), scale_offset, to, load));
        for (int64_t e = 0; e < std::min(W, groups_ - g); ++e) {
          rows.offsets[i * groups_ + g + e] += sums[e];
        }
      }
    }
  }

  const AttentionForwardCall& call_;
  const DecodeQueries<Isa>& queries_;
  const int64_t groups_, group_stride_;
  // Of the vectors of a row of values: the group of the first lane, and those of all from there.
  Buffer<int32_t> first_group_, lane_group_;
};

}  // namespace
}  // namespace jax_gluon::cpu
