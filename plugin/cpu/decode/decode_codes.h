// Attention of a few queries over many keys, all of them codes: products in integers. Queries are
// rounded to 8 bits after the scales of keys that lie along the product were folded into them, and
// so are the probabilities times the scales of the values. Rows are read in the order in which they
// lie in memory, all heads of a token side by side, and the softmax of many heads takes place in
// the lanes of a vector.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/decode/code_products.h"
#include "cpu/decode/decode_chunks.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class DecodeCodes {
  using F = typename Isa::F;
  using I = typename Isa::I;
  static constexpr int64_t W = Isa::kLanes;
  // Keys of a subtile, against whose largest probability the others are rounded: fewer where the
  // integers are smaller.
  static constexpr int64_t kSubtile = 32, kShortSubtile = 16, kChunk = 512;
  // Bytes of a group of values: the lanes of a vector, 16 bytes apart, then belong to at most W.
  static constexpr int64_t kMinGroupBytes = 8;
  // Rows whose distance is a power of two share a set of the first cache, which holds eight.
  static constexpr int64_t kRowsOfASet = 8;
  using Rules = LogitRules<Isa, kSubtile>;

 public:
  DecodeCodes(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        chunks_(call, parallel, DecodeChunks<Isa>::keys_of(call, kChunk)),
        rows_(chunks_.rows()),
        all_(call.K * rows_),
        lanes_(round_up(all_, W)),
        head_width_(round_up(call.H, 8 * W)),
        value_width_(round_up(call.V, 8 * W)),
        subtile_(call.value.quantization.bits == 8 && Isa::kMaxWeight < 255 ? kShortSubtile
                                                                            : kSubtile),
        groups_(groups_of(call)),
        group_stride_(round_up(groups_, W) + W),
        scratch_(parallel.threads()) {
    if (groups_ > 1) find_groups();
  }

  // Where all operands are codes and no scale but those of the keys lies along a product.
  static bool takes(const AttentionForwardCall& call) {
    const Quantization& key = call.key.quantization;
    const Quantization& value = call.value.quantization;
    if (!call.query.quantization || !key || !value) return false;
    if (key.head_block != 0 && key.token_block != 0 && key.token_block < kMinBlock) return false;
    const int64_t codes = value.bits == 4 ? 2 : 1;
    return groups_of(call) == 1 ||
           (value.head_block % codes == 0 && value.head_block / codes >= kMinGroupBytes);
  }

  void run() {
    chunks_.run([this](int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
      with_codes(call_.key, [&](auto key) {
        with_codes(call_.value, [&](auto value) {
          attend<decltype(key), decltype(value)>(b, chunk, visibility, keys);
        });
      });
    });
  }

 private:
  // Tokens that share the scales which are folded into the queries for them.
  static constexpr int64_t kMinBlock = 8;

  // Arrays by row of all kv heads are lanes long.
  struct Scratch {
    Buffer<float> query;   // [all][head_width], in the order of the stored codes
    Buffer<float> folded;  // [head_width]
    Buffer<int8_t> codes;  // [all][head_width]
    Buffer<float> code_scale, query_sum, center, constant;
    Buffer<int32_t> bias;         // of the products
    Buffer<int64_t> head_at;      // byte of the key's head in its token
    Buffer<float> scores;         // [kSubtile][lanes]: scores, probabilities, weights
    Buffer<float> scale, offset;  // [kSubtile][lanes]: of keys, of values with one group
    Buffer<float> maximum, sum;
    Buffer<float> out;         // [all][value_width], in the order of the stored codes
    Buffer<float> offsets;     // [all][groups]: sums of probability * offset
    Buffer<uint32_t> weights;  // [quads][lanes], or [all][quads][group_stride]
    Buffer<float> factors;     // [lanes], or [all][group_stride]: what a weight of 1 is worth
    Buffer<float> group_scale, group_offset;  // [kSubtile][round_up(groups, W)]
    Buffer<float> row;
    Buffer<char> gathered;
  };

  void prepare(Scratch& s) const {
    s.query.allocate(all_ * head_width_);
    s.folded.allocate(3 * head_width_);
    s.codes.allocate(all_ * head_width_);
    for (Buffer<float>* each :
         {&s.code_scale, &s.query_sum, &s.center, &s.constant, &s.maximum, &s.sum}) {
      each->allocate(lanes_);
      std::fill(each->get(), each->get() + lanes_, 0.0f);
    }
    std::fill(s.maximum.get(), s.maximum.get() + lanes_, kHidden);
    s.bias.allocate(lanes_);
    std::fill(s.bias.get(), s.bias.get() + lanes_, 0);
    s.head_at.allocate(all_);
    for (Buffer<float>* each : {&s.scores, &s.scale, &s.offset}) each->allocate(kSubtile * lanes_);
    s.out.allocate(all_ * value_width_);
    std::fill(s.out.get(), s.out.get() + all_ * value_width_, 0.0f);
    s.offsets.allocate(std::max(lanes_, all_ * groups_));
    std::fill(s.offsets.get(), s.offsets.get() + std::max(lanes_, all_ * groups_), 0.0f);
    s.weights.allocate(kSubtile / 4 * std::max(lanes_, all_ * group_stride_));
    s.factors.allocate(std::max(lanes_, all_ * group_stride_));
    const int64_t groups = round_up(groups_, W);
    for (Buffer<float>* each : {&s.group_scale, &s.group_offset}) {
      each->allocate(kSubtile * groups);
      std::fill(each->get(), each->get() + kSubtile * groups, 0.0f);
    }
    s.row.allocate(head_width_);
    s.gathered.allocate(std::max(call_.K * head_width_, kSubtile * value_width_));
  }

  template <class Function>
  static void with_codes(const Operand& x, Function f) {
    if (x.dtype == DType::kU4x2) return f(CodeProducts<Isa, true>());
    f(CodeProducts<Isa, false>());
  }
  static int64_t bytes_of(const Operand& x, int64_t width) {
    return x.dtype == DType::kU4x2 ? width / 2 : width;
  }
  // From one head to the next, in bytes.
  static int64_t head_step(const Operand& x) {
    return x.stride[1] * static_cast<int64_t>(size_of(x.dtype));
  }
  static const char* token(const Operand& x, int64_t b, int64_t j, int64_t k) {
    return static_cast<const char*>(row_of(x, b, j, k));
  }

  static int64_t groups_of(const AttentionForwardCall& call) {
    const int64_t size = call.value.quantization.head_block;
    return size == 0 ? 1 : std::max<int64_t>(1, ceil_div(call.V, size));
  }
  // The groups that the lanes of a vector of values belong to.
  void find_groups() {
    const int64_t codes = call_.value.quantization.bits == 4 ? 2 : 1;
    const int64_t group = call_.value.quantization.head_block / codes;
    const int64_t vectors = value_width_ / codes / W;
    index_.allocate(vectors * W);
    first_.allocate(vectors);
    for (int64_t vector = 0; vector < vectors; ++vector) {
      const auto group_of = [&](int64_t lane) {
        const int64_t byte = vector / 4 * 4 * W + lane / 4 * 16 + vector % 4 * 4 + lane % 4;
        return std::min(byte / group, groups_ - 1);
      };
      first_[vector] = static_cast<int32_t>(group_of(0));
      for (int64_t lane = 0; lane < W; ++lane) {
        index_[vector * W + lane] = static_cast<int32_t>(group_of(lane) - group_of(0));
      }
    }
  }

  template <class Key, class Value>
  void attend(int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    load_queries<Key>(b, s);
    for (int64_t j = keys.begin; j < keys.end; j += subtile_) {
      const Range subtile{j, std::min(j + subtile_, keys.end)};
      find_scores<Key>(b, subtile, s);
      apply_rules(visibility, b, subtile, s);
      find_probabilities(subtile, s);
      stream(call_.value, b, subtile, bytes_of(call_.value, call_.V));
      if (groups_ == 1) {
        weigh<Value>(b, subtile, s);
      } else {
        weigh_groups<Value>(b, subtile, s);
      }
      add_values<Value>(b, subtile, s);
    }
    store<Value>(b, chunk, s);
  }

  // Queries, scaled, in the order in which the key's codes come; their padding is zero.
  template <class Key>
  void load_queries(int64_t b, Scratch& s) const {
    std::fill(s.query.get(), s.query.get() + all_ * head_width_, 0.0f);
    const bool folded = call_.key.quantization.head_block != 0;
    float* row = s.row.get();
    for (int64_t i = 0; i < all_; ++i) {
      const int64_t k = i / rows_, r = i % rows_;
      QuantizedRow<Isa>::load_uncentered(call_.query, b, chunks_.query_of(r), chunks_.head_of(k, r),
                                         call_.H, row);
      float* query = s.query.get() + i * head_width_;
      const float factor = call_.scale * kLog2E;
      float total = 0.0f;
      for (int64_t h = 0; h < call_.H; ++h) {
        row[h] *= factor;
        query[Key::query_position(h)] = row[h];
        total += row[h];
      }
      const float* center = stored_center(call_.key, b, k);
      s.query_sum[i] = total;
      s.center[i] = center ? dot<Isa>(row, center, call_.H) : 0.0f;
      s.head_at[i] = k * head_step(call_.key);
      if (!folded && !take_query<Key>(b, i, factor, s)) round_query<Key>(query, i, s);
    }
  }

  // The stored codes of row i of the queries, if they are all that it is made of.
  template <class Key>
  bool take_query(int64_t b, int64_t i, float factor, Scratch& s) const {
    const Quantization& q = call_.query.quantization;
    if (q.head_block != 0 || q.offset || q.center) return false;
    int8_t* codes = s.codes.get() + i * head_width_;
    std::fill(codes, codes + head_width_, static_cast<int8_t>(0));
    const int64_t t = chunks_.query_of(i % rows_), n = chunks_.head_of(i / rows_, i % rows_);
    ScaleAndOffset scale;
    int8_t* unpacked = reinterpret_cast<int8_t*>(s.folded.get());
    const int8_t* stored =
        QuantizedRow<Isa>::codes_of(call_.query, b, t, n, call_.H, s.row.get(), unpacked, &scale);
    int32_t sum = 0;
    for (int64_t h = 0; h < call_.H; ++h) {
      codes[Key::query_position(h)] = stored[h];
      sum += stored[h];
    }
    s.code_scale[i] = scale.scale * factor;
    s.bias[i] = -Key::kKeyBias * sum;
    return true;
  }

  // Codes of row i of the queries, and what one of them is worth: NaN where an element is not
  // finite.
  template <class Key>
  void round_query(const float* query, int64_t i, Scratch& s) const {
    const int64_t width = round_up(call_.H, Key::kStep);
    const float largest = QuantizedRow<Isa>::largest_magnitude(query, width);
    const float unit = largest / 127.0f;
    const bool some = unit >= std::numeric_limits<float>::min();
    const F inverse = Isa::set1(some ? 1.0f / unit : 0.0f);
    int8_t* codes = s.codes.get() + i * head_width_;
    I sum = Isa::set1_i32(0);
    for (int64_t h = 0; h < width; h += W) {
      const I code = Isa::to_int(Isa::mul(Isa::load(query + h), inverse));
      Isa::store_s8(codes + h, code);
      sum = Isa::add_i32(sum, code);
    }
    s.code_scale[i] = some || largest != largest ? unit : 0.0f;
    s.bias[i] = -Key::kKeyBias * static_cast<int32_t>(Isa::reduce_add(Isa::to_float(sum)));
  }

  template <class Key>
  void find_scores(int64_t b, Range keys, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    if (q.head_block == 0) {
      dot_tokens<Key>(b, keys, s.scores.get(), s);
      scale_scores(b, keys, s);
      return;
    }
    // Runs of keys that share scales.
    for (int64_t j = keys.begin; j < keys.end;) {
      int64_t next = keys.end;
      if (q.token_block != 0) next = std::min(next, (j / q.token_block + 1) * q.token_block);
      fold_scales<Key>(b, j, s);
      dot_tokens<Key>(b, {j, next}, s.scores.get() + (j - keys.begin) * lanes_, s);
      j = next;
    }
  }

  // Products of all rows with `keys`.
  template <class Key>
  void dot_tokens(int64_t b, Range keys, float* scores, Scratch& s) const {
    const int64_t used = bytes_of(call_.key, call_.H);
    const int64_t bytes = Key::bytes(round_up(call_.H, Key::kStep));
    const int64_t* head_at = s.head_at.get();
    for (int64_t j = keys.begin; j < keys.end; ++j, scores += lanes_) {
      const char* heads = token(call_.key, b, j, 0);
      const auto dot_some = [&](int64_t first, int64_t count) {
        I acc[W];
        for (int64_t i = 0; i < W; ++i) {
          if (i >= count) {
            acc[i] = Isa::set1_i32(0);
            continue;
          }
          const int8_t* query = s.codes.get() + (first + i) * head_width_;
          const char* key = heads + head_at[first + i];
          if (used != bytes) key = padded(key, used, bytes, s.gathered.get());
          acc[i] = Key::dot(key, query, bytes);
        }
        const I product = Isa::add_i32(Isa::sum_each(acc), Isa::load_i32(s.bias.get() + first));
        const F scale = Isa::load(s.code_scale.get() + first);
        const F constant = Isa::load(s.constant.get() + first);
        Isa::store(scores + first, Isa::fma(Isa::to_float(product), scale, constant));
      };
      int64_t i = 0;
      for (; i + W <= all_; i += W) dot_some(i, W);
      if (i < all_) dot_some(i, all_ - i);
    }
  }

  static const char* padded(const char* row, int64_t used, int64_t bytes, char* to) {
    std::memcpy(to, row, static_cast<size_t>(used));
    std::memset(to + used, 0, static_cast<size_t>(bytes - used));
    return to;
  }

  // One scale, and perhaps an offset, for each row of keys.
  void scale_scores(int64_t b, Range keys, Scratch& s) const {
    const bool has_offsets = load_scales(call_.key, b, keys, s);
    for (int64_t j = 0; j < (keys.end - keys.begin) * lanes_; j += lanes_) {
      for (int64_t i = 0; i < lanes_; i += W) {
        F score = Isa::mul(Isa::load(s.scores.get() + j + i), Isa::load(s.scale.get() + j + i));
        if (has_offsets) {
          score =
              Isa::fma(Isa::load(s.offset.get() + j + i), Isa::load(s.query_sum.get() + i), score);
        }
        Isa::store(s.scores.get() + j + i, score);
      }
    }
  }

  // Scales and offsets of rows with one of each; false where there are no offsets.
  bool load_scales(const QuantizableOperand& x, int64_t b, Range keys, Scratch& s) const {
    const Quantization& q = x.quantization;
    const auto load = [&](const Operand& from, int64_t j, float* to) {
      const int64_t at = scale_offset(from, q, b, j, 0), step = from.stride[1];
      if (rows_ == 1 && step == 1 && from.dtype == DType::kF32) {
        std::memcpy(to, static_cast<const float*>(from.data) + at,
                    static_cast<size_t>(all_) * sizeof(float));
      } else {
        for (int64_t i = 0; i < all_; ++i) {
          to[i] = float_at(from.data, from.dtype, at + i / rows_ * step);
        }
      }
      std::fill(to + all_, to + lanes_, 0.0f);
    };
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      float* scale = s.scale.get() + (j - keys.begin) * lanes_;
      load(q.scale, j, scale);
      if (!q.offset) continue;
      float* offset = s.offset.get() + (j - keys.begin) * lanes_;
      load(q.offset, j, offset);
      for (int64_t i = 0; i < all_; ++i) offset[i] = code_offset(q, scale[i], offset[i]);
    }
    return static_cast<bool>(q.offset);
  }

  static bool is_plain(const Operand& x) { return x.dtype == DType::kBF16 && x.stride[2] == 1; }
  static const uint16_t* bf16_at(const Operand& x, int64_t index) {
    return static_cast<const uint16_t*>(x.data) + index;
  }

  // Queries times the scales that key j shares with others of its block, and their products with
  // the offsets.
  template <class Key>
  void fold_scales(int64_t b, int64_t j, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    const F least = Isa::set1(-least_code(q));
    const bool is_fast = q.head_block == 1 && call_.H % W == 0 && is_plain(q.scale) &&
                         q.offset_kind == Quantization::Offset::kMinimum && is_plain(q.offset);
    for (int64_t k = 0; k < call_.K; ++k) {
      const uint16_t* scales = nullptr;
      const uint16_t* minima = nullptr;
      if (is_fast) {
        scales = bf16_at(q.scale, scale_offset(q.scale, q, b, j, k));
        minima = bf16_at(q.offset, scale_offset(q.offset, q, b, j, k));
      }
      const auto fast_scale = [&](int64_t h) { return Isa::load_bf16(scales + h); };
      const auto fast_offset = [&](int64_t h, F scale) {
        return Isa::fma(scale, least, Isa::load_bf16(minima + h));
      };
      if (is_fast && call_.H % Key::kStep == 0) {
        fold<Key>(k, fast_scale, fast_offset, s);
        continue;
      }
      float* scale = s.folded.get() + head_width_;
      float* offset = scale + head_width_;
      std::fill(scale, offset + head_width_, 0.0f);
      for (int64_t h = 0; is_fast && h < call_.H; h += W) {
        const F x = fast_scale(h);
        Isa::store(scale + h, x);
        Isa::store(offset + h, fast_offset(h, x));
      }
      for (int64_t h = 0; !is_fast && h < call_.H; ++h) {
        const ScaleAndOffset x = scale_at(call_.key, b, j, k, h / q.head_block);
        scale[h] = x.scale;
        offset[h] = x.offset;
      }
      fold<Key>(
          k, [&](int64_t h) { return Isa::load(scale + h); },
          [&](int64_t h, F) { return Isa::load(offset + h); }, s);
    }
  }

  // scale_of(h) and offset_of(h, scale) are those of W elements of head k, in their natural order.
  template <class Key, class ScaleOf, class OffsetOf>
  void fold(int64_t k, ScaleOf scale_of, OffsetOf offset_of, Scratch& s) const {
    for (int64_t i = k * rows_; i < (k + 1) * rows_; ++i) {
      const float* query = s.query.get() + i * head_width_;
      float* folded = s.folded.get();
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
      s.constant[i] = Isa::reduce_add(constant);
      round_query<Key>(folded, i, s);
    }
  }

  // Bias, soft cap and masks, for rows that have any.
  void apply_rules(const Visibility& visibility, int64_t b, Range keys, Scratch& s) const {
    const bool all_have = call_.bias || call_.mask || call_.soft_cap != 0.0f;
    alignas(kAlignment) float row[kSubtile];
    const int64_t count = keys.end - keys.begin, whole = round_up(count, W);
    for (int64_t i = 0; i < all_; ++i) {
      const int64_t k = i / rows_, r = i % rows_, query = chunks_.query_of(r);
      const Range visible = visibility.of_row(query);
      if (!all_have && visible.begin <= keys.begin && keys.end <= visible.end) continue;
      const float center = needs_whole_logits(call_) ? s.center[i] : 0.0f;
      std::fill(row, row + whole, 0.0f);
      for (int64_t j = 0; j < count; ++j) row[j] = s.scores[j * lanes_ + i] + center;
      Rules(call_, b, chunks_.head_of(k, r))
          .apply(row, query, keys.begin, 0, whole,
                 {visible.begin, std::min(visible.end, keys.end)});
      for (int64_t j = 0; j < count; ++j) s.scores[j * lanes_ + i] = row[j];
    }
  }

  // Brings the rows of all heads into the cache, in the order in which they lie in memory: read
  // head by head, rows are pages apart, which no prefetcher follows. Loads, since processors drop
  // software prefetches of pages that are not in the TLB.
  void stream(const Operand& x, int64_t b, Range keys, int64_t bytes) const {
    if (call_.K == 1 || head_step(x) != bytes || bytes > 64) return;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const char* row = token(x, b, j, 0);
      for (int64_t byte = 0; byte < call_.K * bytes; byte += 64) {
        static_cast<void>(*static_cast<const volatile char*>(row + byte));
      }
    }
  }

  // Scores to probabilities relative to each row's running maximum; what was summed before is
  // rescaled.
  void find_probabilities(Range keys, Scratch& s) const {
    const int64_t end = (keys.end - keys.begin) * lanes_;
    const F hidden = Isa::set1(kHidden);
    for (int64_t i = 0; i < lanes_; i += W) {
      float* scores = s.scores.get() + i;
      const F before = Isa::load(s.maximum.get() + i);
      F now = before;
      for (int64_t j = 0; j < end; j += lanes_) now = Isa::max(Isa::load(scores + j), now);
      const F reference = Isa::where_less(hidden, now, now, Isa::zero());
      const F rescale = Isa::template exp2<5>(Isa::sub(before, reference));
      F sum = Isa::mul(Isa::load(s.sum.get() + i), rescale);
      for (int64_t j = 0; j < end; j += lanes_) {
        const F p = Isa::template exp2<5>(Isa::sub(Isa::load(scores + j), reference));
        Isa::store(scores + j, p);
        sum = Isa::add(sum, p);
      }
      Isa::store(s.sum.get() + i, sum);
      Isa::store(s.maximum.get() + i, now);
      float factors[W];
      Isa::store(factors, rescale);
      for (int64_t lane = 0; lane < W && i + lane < all_; ++lane) {
        if (factors[lane] == 1.0f) continue;
        scale_row<Isa>(s.out.get() + (i + lane) * value_width_, value_width_, factors[lane]);
        float* offsets = s.offsets.get() + (i + lane) * groups_;
        for (int64_t g = 0; g < groups_; ++g) offsets[g] *= factors[lane];
      }
    }
  }

  // What a weight of 1 is worth, 0 where all are nothing, and its reciprocal or 0.
  template <class Value>
  static F unit_of(F largest, F* inverse) {
    const F least = Isa::set1(std::numeric_limits<float>::min());
    const F unit = Isa::mul(largest, Isa::set1(1.0f / static_cast<float>(Value::kMaxWeight)));
    *inverse = Isa::where_less(unit, least, Isa::zero(), Isa::div(Isa::set1(1.0f), unit));
    return Isa::where_less(unit, least, Isa::zero(), unit);
  }

  // Probabilities times the scales of their values, as integers against the largest; what the
  // offsets add is summed apart. A hidden key weighs exactly nothing, whatever its scale.
  template <class Value>
  void weigh(int64_t b, Range keys, Scratch& s) const {
    const int64_t count = keys.end - keys.begin, end = count * lanes_;
    const bool has_offsets = load_scales(call_.value, b, keys, s);
    for (int64_t i = 0; i < lanes_; i += W) {
      float* weights = s.scores.get() + i;
      F largest = Isa::zero(), sum = Isa::zero(), offsets = Isa::load(s.offsets.get() + i);
      for (int64_t j = 0; j < end; j += lanes_) {
        const F p = Isa::load(weights + j);
        const F weight = Isa::where_nonzero(p, Isa::mul(p, Isa::load(s.scale.get() + j + i)));
        if (has_offsets) {
          const F offset = Isa::mul(p, Isa::load(s.offset.get() + j + i));
          offsets = Isa::add(offsets, Isa::where_nonzero(p, offset));
        }
        largest = Isa::max(weight, largest);
        sum = Isa::add(sum, weight);
        Isa::store(weights + j, weight);
      }
      F inverse;
      const F unit = unit_of<Value>(largest, &inverse);
      I total = Isa::set1_i32(0);
      for (int64_t j = 0; j < count; j += 4) {
        I quad[4];
        for (int64_t e = 0; e < 4; ++e) {
          quad[e] = j + e < count
                        ? Isa::to_int(Isa::mul(Isa::load(weights + (j + e) * lanes_), inverse))
                        : Isa::set1_i32(0);
          if constexpr (Value::kValueBias != 0) total = Isa::add_i32(total, quad[e]);
        }
        Isa::store_i32(s.weights.get() + j / 4 * lanes_ + i,
                       Isa::pack_bytes(quad[0], quad[1], quad[2], quad[3]));
      }
      finish<Value>(unit, sum, total, offsets, s.factors.get() + i, s.offsets.get() + i);
    }
  }

  // Adds what the bias of the codes took to the offsets; the factor is NaN where a weight is not
  // finite.
  template <class Value>
  static void finish(F unit, F sum, I total, F offsets, float* factor, float* offset) {
    if constexpr (Value::kValueBias != 0) {
      const F bias = Isa::set1(static_cast<float>(-Value::kValueBias));
      offsets = Isa::fma(Isa::mul(Isa::to_float(total), unit), bias, offsets);
    }
    Isa::store(factor, Isa::fma(sum, Isa::zero(), unit));
    Isa::store(offset, offsets);
  }

  // Whether the vectors that hold the groups of head k end within the scales or minima `x`: all but
  // those of the last keys do, and what they hold besides belongs to other heads or keys.
  bool has_whole_vectors(const Operand& x, Range keys, int64_t k) const {
    const int64_t beside = round_up(groups_, W) - groups_;
    return (call_.S - keys.end) * x.stride[0] + (call_.K - 1 - k) * x.stride[1] >= beside;
  }

  // The same where a row of values has several scales.
  template <class Value>
  void weigh_groups(int64_t b, Range keys, Scratch& s) const {
    const Quantization& q = call_.value.quantization;
    const int64_t count = keys.end - keys.begin, stride = round_up(groups_, W);
    const bool plain = q.token_block == 1 && is_plain(q.scale) &&
                       q.offset_kind == Quantization::Offset::kMinimum && is_plain(q.offset);
    for (int64_t k = 0; k < call_.K; ++k) {
      if (plain && has_whole_vectors(q.scale, keys, k) && has_whole_vectors(q.offset, keys, k)) {
        const uint16_t* scales = bf16_at(q.scale, scale_offset(q.scale, q, b, keys.begin, k));
        const uint16_t* minima = bf16_at(q.offset, scale_offset(q.offset, q, b, keys.begin, k));
        const int64_t scale_step = q.scale.stride[0], minimum_step = q.offset.stride[0];
        // What the least code adds to the minima is added for all keys at once.
        weigh_head<Value>(
            k, count,
            [&](int64_t j, int64_t g) { return Isa::load_bf16(scales + j * scale_step + g); },
            [&](int64_t j, int64_t g) { return Isa::load_bf16(minima + j * minimum_step + g); },
            -least_code(q), s);
        continue;
      }
      float *scale = s.group_scale.get(), *offset = s.group_offset.get();
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t g = 0; g < groups_; ++g) {
          const ScaleAndOffset x = scale_at(call_.value, b, keys.begin + j, k, g);
          scale[j * stride + g] = x.scale;
          offset[j * stride + g] = x.offset;
        }
      }
      weigh_head<Value>(
          k, count, [&](int64_t j, int64_t g) { return Isa::load(scale + j * stride + g); },
          [&](int64_t j, int64_t g) { return Isa::load(offset + j * stride + g); }, 0.0f, s);
    }
  }

  // scale_of(j, g) and offset_of(j, g) are those of key j and W groups; `scale_offset` times the
  // scale belongs to the offset.
  template <class Value, class ScaleOf, class OffsetOf>
  void weigh_head(int64_t k, int64_t count, ScaleOf scale_of, OffsetOf offset_of,
                  float scale_offset, Scratch& s) const {
    alignas(kAlignment) float weights[kSubtile * W];
    for (int64_t i = k * rows_; i < (k + 1) * rows_; ++i) {
      const float* probabilities = s.scores.get() + i;
      for (int64_t g = 0; g < groups_; g += W) {
        F largest = Isa::zero(), sum = Isa::zero(), offsets = Isa::zero();
        for (int64_t j = 0; j < count; ++j) {
          const F p = Isa::set1(probabilities[j * lanes_]);
          const F weight = Isa::where_nonzero(p, Isa::mul(p, scale_of(j, g)));
          offsets = Isa::add(offsets, Isa::where_nonzero(p, Isa::mul(p, offset_of(j, g))));
          largest = Isa::max(weight, largest);
          sum = Isa::add(sum, weight);
          Isa::store(weights + j * W, weight);
        }
        for (int64_t j = count; j < round_up(count, 4); ++j)
          Isa::store(weights + j * W, Isa::zero());
        F inverse;
        const F unit = unit_of<Value>(largest, &inverse);
        I total = Isa::set1_i32(0);
        uint32_t* quads = s.weights.get() + i * (kSubtile / 4) * group_stride_ + g;
        for (int64_t j = 0; j < count; j += 4, quads += group_stride_) {
          I quad[4];
          JAX_GLUON_UNROLL
          for (int64_t e = 0; e < 4; ++e) {
            quad[e] = Isa::to_int(Isa::mul(Isa::load(weights + (j + e) * W), inverse));
            if constexpr (Value::kValueBias != 0) total = Isa::add_i32(total, quad[e]);
          }
          Isa::store_i32(quads, Isa::pack_bytes(quad[0], quad[1], quad[2], quad[3]));
        }
        float sums[W];
        finish<Value>(unit, sum, total, Isa::fma(sum, Isa::set1(scale_offset), offsets),
                      s.factors.get() + i * group_stride_ + g, sums);
        for (int64_t e = 0; e < std::min(W, groups_ - g); ++e) {
          s.offsets[i * groups_ + g + e] += sums[e];
        }
      }
    }
  }

  template <class Value>
  void add_values(int64_t b, Range keys, Scratch& s) const {
    const int64_t used = bytes_of(call_.value, call_.V), count = keys.end - keys.begin;
    const int64_t bytes = Value::bytes(round_up(call_.V, Value::kStep));
    const int64_t step = call_.value.stride[0] * static_cast<int64_t>(size_of(call_.value.dtype));
    for (int64_t k = 0; k < call_.K; ++k) {
      const char* rows = token(call_.value, b, keys.begin, k);
      int64_t stride = step;
      if (used != bytes) {
        for (int64_t j = 0; j < count; ++j) {
          padded(rows + j * step, used, bytes, s.gathered.get() + j * bytes);
        }
        rows = s.gathered.get();
        stride = bytes;
      }
      const int64_t block = stride > bytes ? kRowsOfASet : count;
      for (int64_t i = k * rows_; i < (k + 1) * rows_; ++i) {
        const bool grouped = groups_ > 1;
        const int64_t quad = grouped ? group_stride_ : lanes_;
        const uint32_t* weights =
            s.weights.get() + (grouped ? i * (kSubtile / 4) * group_stride_ : i);
        const float* factors = s.factors.get() + (grouped ? i * group_stride_ : i);
        for (int64_t j = 0; j < count; j += block) {
          Value::add_rows(rows + j * stride, stride, std::min(block, count - j), bytes,
                          weights + j / 4 * quad, quad, grouped ? index_.get() : nullptr,
                          first_.get(), factors, s.out.get() + i * value_width_);
        }
      }
    }
  }

  template <class Value>
  void store(int64_t b, int64_t chunk, const Scratch& s) const {
    const int64_t size = groups_ == 1 ? call_.V : call_.value.quantization.head_block;
    for (int64_t i = 0; i < all_; ++i) {
      const auto to = chunks_.partial(b, i / rows_, chunk, i % rows_);
      const float* out = s.out.get() + i * value_width_;
      const float* offsets = s.offsets.get() + i * groups_;
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

  const AttentionForwardCall& call_;
  DecodeChunks<Isa> chunks_;
  const int64_t rows_, all_, lanes_, head_width_, value_width_, subtile_, groups_, group_stride_;
  Buffer<int32_t> index_, first_;  // of the groups of each vector of values
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
