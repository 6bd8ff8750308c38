// Attention of a few queries over many keys: products in float32. Keys and values are read once, as
// they are stored, and unpacked in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/decode/decode_chunks.h"
#include "cpu/rows/stored_row.h"
#include "cpu/simd/compiler.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class DecodeFloats {
  using F = typename Isa::F;
  static constexpr int64_t W = Isa::kLanes;
  // Most keys whose scores are alive at once, and keys of a task.
  static constexpr int64_t kSubtile = 64, kChunk = 256;
  // Where all heads' keys and values of a subtile are more than a part of the second cache,
  // subtiles are shorter.
  static constexpr int64_t kMinSubtile = 16, kStreamedBytes = 256 * 1024;
  using Rules = LogitRules<Isa, kSubtile>;

 public:
  DecodeFloats(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        chunks_(call, parallel, DecodeChunks<Isa>::keys_of(call, kChunk)),
        rows_(chunks_.rows()),
        head_width_(round_up(call.H, 2 * W)),
        value_width_(round_up(call.V, 2 * W)),
        subtile_(kSubtile),
        scratch_(parallel.threads()) {
    const int64_t bytes = call.K * (row_bytes(call.key, call.H) + row_bytes(call.value, call.V));
    while (subtile_ > kMinSubtile && subtile_ * bytes > kStreamedBytes) subtile_ /= 2;
  }

  void run() {
    chunks_.run([this](int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
      attend(b, chunk, visibility, keys);
    });
  }

 private:
  // How the numbers of a row are scaled.
  enum class Scaling : uint8_t {
    kNone,   // floats
    kRow,    // one scale and offset a row
    kBlock,  // keys: for each element, shared by several rows: folded into the queries
    kGroup,  // values: one for each run of elements: folded into the probabilities
    kLoose,  // anything else: rows are dequantized to floats first
  };

  struct Scratch {
    // Of each kv head.
    Buffer<float> query;    // [K][rows][head_width], in the order of the stored vectors
    Buffer<float> out;      // [K][rows][value_width], in the order of the stored vectors
    Buffer<float> offsets;  // [K][rows][groups]: sums of probability * offset
    Buffer<float> maximum, sum, query_sum, center;  // [K][rows]
    // Of the head and the subtile at hand.
    Buffer<float> folded;               // as query
    Buffer<float> constant;             // [rows]
    Buffer<float> scores;               // [rows][kSubtile]
    Buffer<float> weights;              // [rows][kSubtile][groups]
    Buffer<float> scales, row_offsets;  // [kSubtile][groups], or of the elements of one row
    Buffer<float> row, dequantized;
    Buffer<char> gathered;
  };

  // The part of the scratch that belongs to a kv head.
  struct Head {
    int64_t k;
    float *query, *out, *offsets, *maximum, *sum, *query_sum, *center;
  };
  Head head_state(const Scratch& s, int64_t k) const {
    const int64_t first = k * rows_;
    return {k,
            s.query.get() + first * head_width_,
            s.out.get() + first * value_width_,
            s.offsets.get() + first * value_groups(),
            s.maximum.get() + first,
            s.sum.get() + first,
            s.query_sum.get() + first,
            s.center.get() + first};
  }

  static Scaling key_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    return q.token_block == 0 || q.token_block >= 8 ? Scaling::kBlock : Scaling::kLoose;
  }
  static Scaling value_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    return q.head_block % (2 * W) == 0 ? Scaling::kGroup : Scaling::kLoose;
  }
  int64_t value_groups() const {
    const Quantization& q = call_.value.quantization;
    return value_scaling(q) == Scaling::kGroup ? ceil_div(call_.V, q.head_block) : 1;
  }

  void prepare(Scratch& s) const {
    const int64_t groups = value_groups();
    const int64_t all = call_.K * rows_;
    s.query.allocate(all * head_width_);
    s.folded.allocate(rows_ * head_width_);
    s.scores.allocate(rows_ * kSubtile);
    s.weights.allocate(groups * rows_ * kSubtile);
    s.out.allocate(all * value_width_);
    s.offsets.allocate(all * groups);
    s.constant.allocate(rows_);
    for (Buffer<float>* each : {&s.maximum, &s.sum, &s.query_sum, &s.center}) each->allocate(all);
    const int64_t widest = std::max(head_width_, value_width_);
    s.row.allocate(widest);
    s.dequantized.allocate(kSubtile * widest);
    s.gathered.allocate(kSubtile * widest * 4);
    for (Buffer<float>* each : {&s.scales, &s.row_offsets}) {
      each->allocate(std::max(kSubtile * groups, 2 * head_width_) + W);
    }
  }

  // Calls f with the storage of an operand as a StoredRow type; loose rows are floats.
  template <class Function>
  static void with_storage(const Operand& x, bool loose, Function f) {
    if (loose) return f(StoredRow<Isa, DType::kF32>());
    switch (x.dtype) {
      case DType::kF32:
        return f(StoredRow<Isa, DType::kF32>());
      case DType::kBF16:
        return f(StoredRow<Isa, DType::kBF16>());
      case DType::kF16:
        return f(StoredRow<Isa, DType::kF16>());
      case DType::kS8:
        return f(StoredRow<Isa, DType::kS8>());
      case DType::kU4x2:
        return f(StoredRow<Isa, DType::kU4x2>());
    }
  }

  // A chunk of keys, for all heads: those of a token lie side by side.
  void attend(int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    const int64_t all = call_.K * rows_;
    std::fill(s.out.get(), s.out.get() + all * value_width_, 0.0f);
    std::fill(s.offsets.get(), s.offsets.get() + all * value_groups(), 0.0f);
    std::fill(s.maximum.get(), s.maximum.get() + all, kHidden);
    std::fill(s.sum.get(), s.sum.get() + all, 0.0f);
    const bool loose_keys = key_scaling(call_.key.quantization) == Scaling::kLoose;
    const bool loose_values = value_scaling(call_.value.quantization) == Scaling::kLoose;
    with_storage(call_.key, loose_keys, [&](auto key) {
      with_storage(call_.value, loose_values, [&](auto value) {
        attend_keys<decltype(key), decltype(value)>(visibility, b, keys, s);
        for (int64_t k = 0; k < call_.K; ++k) {
          store_partial<decltype(value)>(b, chunk, head_state(s, k));
        }
      });
    });
  }

  template <class Key, class Value>
  void attend_keys(const Visibility& visibility, int64_t b, Range keys, Scratch& s) const {
    for (int64_t k = 0; k < call_.K; ++k) load_queries<Key>(b, head_state(s, k), s);
    for (int64_t j = keys.begin; j < keys.end; j += subtile_) {
      const Range subtile{j, std::min(j + subtile_, keys.end)};
      stream_heads(call_.key, b, subtile.begin, subtile.end, call_.K, call_.H);
      stream_heads(call_.value, b, subtile.begin, subtile.end, call_.K, call_.V);
      for (int64_t k = 0; k < call_.K; ++k) {
        const Head head = head_state(s, k);
        find_scores<Key>(b, head, subtile, s);
        bool finite = true;
        if (find_weights(visibility, b, head, subtile, s, finite)) {
          add_values<Value>(visibility, b, head, subtile, finite, s);
        }
      }
    }
  }

  // Queries, scaled, in the order in which the key's elements come; their padding is zero.
  template <class Key>
  void load_queries(int64_t b, const Head& head, Scratch& s) const {
    std::fill(head.query, head.query + rows_ * head_width_, 0.0f);
    const float* center = stored_center(call_.key, b, head.k);
    for (int64_t r = 0; r < rows_; ++r) {
      float* row = s.row.get();
      QuantizedRow<Isa>::load_uncentered(call_.query, b, chunks_.query_of(r),
                                         chunks_.head_of(head.k, r), call_.H, row);
      scale_row<Isa>(row, call_.H, call_.scale * kLog2E);
      float* query = head.query + r * head_width_;
      float total = 0.0f;
      for (int64_t h = 0; h < call_.H; ++h) {
        query[Key::position(h)] = row[h];
        total += row[h];
      }
      head.query_sum[r] = total;
      head.center[r] = center ? dot<Isa>(row, center, call_.H) : 0.0f;
    }
  }

  // The rows of a subtile, one after another, in whole steps: dequantized if loose, else copied as
  // they are stored. (Heads lie between the rows of one head: read in place, a power of two of them
  // maps all rows to one set of the cache, and no prefetcher follows. So the rows of the next
  // subtile are asked for here.)
  template <class Stored>
  const char* gather_rows(const QuantizableOperand& x, int64_t b, int64_t k, Range keys,
                          int64_t width, bool loose, int64_t* stride, Scratch& s) const {
    const int64_t padded = round_up(width, Stored::kStep);
    if (loose) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        float* row = s.dequantized.get() + (j - keys.begin) * padded;
        QuantizedRow<Isa>::load(x, b, j, k, width, row);
        std::fill(row + width, row + padded, 0.0f);
      }
      *stride = padded * 4;
      return reinterpret_cast<const char*>(s.dequantized.get());
    }
    const int64_t bytes = Stored::bytes(padded), used = Stored::bytes(width);
    const int64_t step = x.stride[0] * static_cast<int64_t>(size_of(x.dtype));
    const char* from = static_cast<const char*>(row_of(x, b, keys.begin, k));
    *stride = bytes;
    if (step == bytes && used == bytes) return from;
    char* row = s.gathered.get();
    constexpr int64_t kVector = 4 * W;
    const bool whole = used % kVector == 0;
    for (int64_t j = keys.begin; j < keys.end; ++j, row += bytes, from += step) {
      if (whole) {  // a call of memcpy costs as much as the rest of a short row
        for (int64_t i = 0; i < used; i += kVector) {
          Isa::store_i32(row + i, Isa::load_i32(from + i));
        }
      } else {
        std::memcpy(row, from, static_cast<size_t>(used));
      }
      if (bytes > used) std::memset(row + used, 0, static_cast<size_t>(bytes - used));
    }
    return s.gathered.get();
  }

  // Scales and offsets of a subtile's rows: [keys][per_row].
  static void gather_scales(const QuantizableOperand& x, int64_t b, int64_t k, Range keys,
                            int64_t per_row, float* scales, float* offsets) {
    const Quantization& q = x.quantization;
    const float least = least_code(q);
    for (int64_t j = keys.begin; j < keys.end; ++j, scales += per_row, offsets += per_row) {
      read_scales(q.scale, q, b, j, k, per_row, scales);
      if (!q.offset) continue;
      read_scales(q.offset, q, b, j, k, per_row, offsets);
      const bool minimum = q.offset_kind == Quantization::Offset::kMinimum;
      for (int64_t g = 0; g < per_row; ++g) {
        offsets[g] = minimum ? offsets[g] - least * scales[g] : -offsets[g] * scales[g];
      }
    }
  }

  static void read_scales(const Operand& from, const Quantization& q, int64_t b, int64_t j,
                          int64_t k, int64_t count, float* to) {
    const int64_t at = scale_offset(from, q, b, j, k);
    if (from.dtype == DType::kF32 && count == 1) {
      *to = static_cast<const float*>(from.data)[at];
    } else if (count == 1 || from.stride[2] == 0) {
      std::fill(to, to + count, float_at(from.data, from.dtype, at));
    } else {
      const char* p = static_cast<const char*>(from.data);
      load_row<Isa>(p + at * static_cast<int64_t>(size_of(from.dtype)), from.dtype, count, to);
    }
  }

  template <class Key>
  void find_scores(int64_t b, const Head& head, Range keys, Scratch& s) const {
    const int64_t k = head.k;
    std::fill(s.constant.get(), s.constant.get() + rows_, 0.0f);
    const Scaling scaling = key_scaling(call_.key.quantization);
    const int64_t count = keys.end - keys.begin;
    int64_t stride = 0;
    const char* rows =
        gather_rows<Key>(call_.key, b, k, keys, call_.H, scaling == Scaling::kLoose, &stride, s);
    if (scaling != Scaling::kBlock) {
      dot_rows<Key>(rows, stride, head.query, 0, count, s);
    } else {
      // Runs of keys that share scales.
      const int64_t size = call_.key.quantization.token_block;
      for (int64_t j = 0; j < count;) {
        const int64_t token = keys.begin + j;
        const int64_t next =
            size == 0 ? count : std::min(count, (token / size + 1) * size - keys.begin);
        fold_scales<Key>(b, token, head, s);
        dot_rows<Key>(rows + j * stride, stride, s.folded.get(), j, next, s);
        j = next;
      }
    }
    if (scaling != Scaling::kRow) return;
    gather_scales(call_.key, b, k, keys, 1, s.scales.get(), s.row_offsets.get());
    const bool offsets = static_cast<bool>(call_.key.quantization.offset);
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = s.scores.get() + r * kSubtile;
      for (int64_t j = 0; j < count; ++j) {
        scores[j] =
            scores[j] * s.scales[j] + (offsets ? s.row_offsets[j] * head.query_sum[r] : 0.0f);
      }
    }
  }

  // Products of all queries with keys [begin, end) of the subtile.
  template <class Key>
  void dot_rows(const char* rows, int64_t stride, const float* query, int64_t begin, int64_t end,
                Scratch& s) const {
    int64_t r = 0;
    for (; r + 4 <= rows_; r += 4) dot_keys<Key, 4>(rows, stride, query, r, begin, end, s);
    for (; r < rows_; ++r) dot_keys<Key, 1>(rows, stride, query, r, begin, end, s);
  }

  template <class Key, int kRows>
  void dot_keys(const char* row, int64_t stride, const float* query, int64_t r, int64_t begin,
                int64_t end, Scratch& s) const {
    // As many as the registers hold sums of.
    constexpr int64_t kMany = Key::kVectors == 1 ? 3 : 1;
    int64_t j = begin;
    for (; j + kMany <= end; j += kMany, row += kMany * stride) {
      dot_some<Key, kRows, kMany>(row, stride, query, r, j, s);
    }
    for (; j < end; ++j, row += stride) dot_some<Key, kRows, 1>(row, stride, query, r, j, s);
  }

  template <class Key, int kRows, int kKeys>
  void dot_some(const char* row, int64_t stride, const float* query, int64_t r, int64_t j,
                Scratch& s) const {
    constexpr int64_t kStep = Key::kStep;
    constexpr int kVectors = Key::kVectors;
    const float* q = query + r * head_width_;
    const int64_t whole = round_up(call_.H, kStep);
    F acc[kRows][kKeys][kVectors];
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int k = 0; k < kKeys; ++k) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) acc[i][k][v] = Isa::zero();
      }
    }
    for (int64_t h = 0; h < whole; h += kStep) {
      F x[kKeys][kVectors];
      JAX_GLUON_UNROLL
      for (int k = 0; k < kKeys; ++k) Key::load(row + k * stride + Key::bytes(h), x[k]);
      JAX_GLUON_UNROLL
      for (int i = 0; i < kRows; ++i) {
        JAX_GLUON_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const F left = Isa::load(q + i * head_width_ + h + v * W);
          JAX_GLUON_UNROLL
          for (int k = 0; k < kKeys; ++k) acc[i][k][v] = Isa::fma(x[k][v], left, acc[i][k][v]);
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAX_GLUON_UNROLL
      for (int k = 0; k < kKeys; ++k) {
        F total = acc[i][k][0];
        if constexpr (kVectors == 2) total = Isa::add(total, acc[i][k][1]);
        s.scores[(r + i) * kSubtile + j + k] = Isa::reduce_add(total) + s.constant[r + i];
      }
    }
  }

  // Queries times the scales that key j shares with others of its block, and their product with the
  // offsets.
  template <class Key>
  void fold_scales(int64_t b, int64_t j, const Head& head, Scratch& s) const {
    const Quantization& q = call_.key.quantization;
    // Scales in the order of the stored vectors; past the row they are 0.
    const int64_t count = ceil_div(call_.H, q.head_block);
    std::fill(s.scales.get(), s.scales.get() + 2 * head_width_, 0.0f);
    std::fill(s.row_offsets.get(), s.row_offsets.get() + 2 * head_width_, 0.0f);
    gather_scales(call_.key, b, head.k, {j, j + 1}, count, s.scales.get(), s.row_offsets.get());
    if (q.head_block > 1) {
      for (int64_t h = call_.H; h-- > 0;) {
        s.scales[h] = s.scales[h / q.head_block];
        s.row_offsets[h] = s.row_offsets[h / q.head_block];
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const float* query = head.query + r * head_width_;
      float* folded = s.folded.get() + r * head_width_;
      F constant = Isa::zero();
      for (int64_t h = 0; h < round_up(call_.H, Key::kStep); h += Key::kStep) {
        F scale[Key::kVectors], offset[Key::kVectors];
        load_in_order<Key>(s.scales.get() + h, scale);
        load_in_order<Key>(s.row_offsets.get() + h, offset);
        for (int v = 0; v < Key::kVectors; ++v) {
          const F x = Isa::load(query + h + v * W);
          Isa::store(folded + h + v * W, Isa::mul(x, scale[v]));
          constant = Isa::fma(x, offset[v], constant);
        }
      }
      s.constant[r] = Isa::reduce_add(constant);
    }
  }

  // Elements in their natural order as the vectors of a step.
  template <class Stored>
  static void load_in_order(const float* from, F* out) {
    out[0] = Isa::load(from);
    if constexpr (Stored::kVectors == 2) Isa::deinterleave(out[0], Isa::load(from + W), out);
  }

  // Scores to probabilities relative to each row's running maximum, then to weights of the stored
  // values. False where no row sees any of the keys; `finite` becomes false where a product is not,
  // which may hide a key.
  bool find_weights(const Visibility& visibility, int64_t b, const Head& head, Range keys,
                    Scratch& s, bool& finite) const {
    const int64_t count = keys.end - keys.begin, padded = round_up(count, W);
    bool any = false;
    for (int64_t r = 0; r < rows_; ++r) {
      float* scores = s.scores.get() + r * kSubtile;
      finite &= all_finite<Isa>(scores, count);
      std::fill(scores + count, scores + padded, 0.0f);
      if (needs_whole_logits(call_) && head.center[r] != 0.0f) {
        for (int64_t j = 0; j < padded; ++j) scores[j] += head.center[r];
      }
      const Rules rules(call_, b, chunks_.head_of(head.k, r));
      Range visible = visibility.of_row(chunks_.query_of(r));
      visible.end = std::min(visible.end, keys.end);
      rules.apply(scores, chunks_.query_of(r), keys.begin, 0, padded, visible);
      any |= find_probabilities(scores, padded, r, head);
    }
    if (!any) return false;
    weigh(b, head, keys, s);
    return true;
  }

  bool find_probabilities(float* scores, int64_t padded, int64_t r, const Head& head) const {
    F largest = Isa::set1(kHidden), nan = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F x = Isa::load(scores + j);
      largest = Isa::max(x, largest);
      nan =
          Isa::add(nan, Isa::where_less(x, Isa::set1(0.0f), Isa::zero(), Isa::mul(x, Isa::zero())));
    }
    const float before = head.maximum[r], now = std::max(before, Isa::reduce_max(largest));
    const bool poisoned = Isa::reduce_add(nan) != 0.0f;
    if (now == kHidden && !poisoned) {
      std::fill(scores, scores + padded, 0.0f);
      return false;
    }
    const float reference = now == kHidden ? 0.0f : now;
    if (before != now && before != kHidden) {
      const float rescale = std::exp2(before - now);
      head.sum[r] *= rescale;
      scale_row<Isa>(head.out + r * value_width_, value_width_, rescale);
      const int64_t groups = value_groups();
      for (int64_t g = 0; g < groups; ++g) head.offsets[r * groups + g] *= rescale;
    }
    const F minus = Isa::set1(-reference);
    F total = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F p = Isa::template exp2<5>(Isa::add(Isa::load(scores + j), minus));
      Isa::store(scores + j, p);
      total = Isa::add(total, p);
    }
    head.maximum[r] = now;
    head.sum[r] += Isa::reduce_add(total);
    return true;
  }

  // Probabilities times the scales of their values; what the offsets add is summed apart. A hidden
  // key weighs exactly nothing, whatever its scale.
  void weigh(int64_t b, const Head& head, Range keys, Scratch& s) const {
    const Scaling scaling = value_scaling(call_.value.quantization);
    const int64_t groups = value_groups(), count = keys.end - keys.begin;
    const bool scaled = scaling == Scaling::kRow || scaling == Scaling::kGroup;
    if (!scaled) {
      std::memcpy(s.weights.get(), s.scores.get(),
                  static_cast<size_t>(rows_ * kSubtile) * sizeof(float));
      return;
    }
    const bool has_offsets = static_cast<bool>(call_.value.quantization.offset);
    gather_scales(call_.value, b, head.k, keys, groups, s.scales.get(), s.row_offsets.get());
    for (int64_t r = 0; r < rows_; ++r) {
      const float* probabilities = s.scores.get() + r * kSubtile;
      float* weights = s.weights.get() + r * kSubtile * groups;
      float* sums = head.offsets + r * groups;
      for (int64_t j = 0; j < count; ++j) {
        const float p = probabilities[j];
        const float* scale = s.scales.get() + j * groups;
        const float* offset = s.row_offsets.get() + j * groups;
        if (p == 0.0f) {
          std::fill(weights + j * groups, weights + (j + 1) * groups, 0.0f);
          continue;
        }
        for (int64_t g = 0; g < groups; ++g) weights[j * groups + g] = p * scale[g];
        for (int64_t g = 0; has_offsets && g < groups; ++g) sums[g] += p * offset[g];
      }
    }
  }

  template <class Value>
  void add_values(const Visibility& visibility, int64_t b, const Head& head, Range keys,
                  bool finite, Scratch& s) const {
    const Quantization& q = call_.value.quantization;
    const Scaling scaling = value_scaling(q);
    int64_t stride = 0;
    const char* rows = gather_rows<Value>(call_.value, b, head.k, keys, call_.V,
                                          scaling == Scaling::kLoose, &stride, s);
    // Floats of a hidden key may be NaN, which a weight of 0 does not take away.
    const bool floats = scaling == Scaling::kNone || scaling == Scaling::kLoose;
    const bool guard =
        floats && (!finite || call_.mask || call_.bias || (call_.T > 1 && !same(visibility)));
    const int64_t whole = round_up(call_.V, Value::kStep), count = keys.end - keys.begin;
    constexpr int64_t kMany = 4 / Value::kVectors;
    const int64_t groups = value_groups();
    const auto group_of = [&](int64_t h) {
      return scaling == Scaling::kGroup ? std::min(h, call_.V - 1) / q.head_block : 0;
    };
    // Several steps of a row, or fewer of several rows: sums that the registers hold.
    constexpr int64_t kFew = 2 / Value::kVectors;
    const auto add = [&](auto tile, int64_t r, int64_t h) {
      using Tile = decltype(tile);
      const float* weights[Tile::kSteps];
      for (int64_t i = 0; i < Tile::kSteps; ++i) {
        const int64_t group = group_of(h + i * Value::kStep);
        weights[i] = s.weights.get() + r * kSubtile * groups + group;
      }
      add_columns<Value, Tile>(rows + Value::bytes(h), stride, count, weights, groups,
                               head.out + r * value_width_ + h);
    };
    int64_t steps = 1;
    for (int64_t h = 0; h < whole; h += steps * Value::kStep) {
      int64_t r = 0;
      if (!guard && rows_ >= 4 && h + kFew * Value::kStep <= whole) {
        steps = kFew;
        for (; r + 4 <= rows_; r += 4) add(ValueTile<4, kFew, false>(), r, h);
        for (; r < rows_; ++r) add(ValueTile<1, kFew, false>(), r, h);
      } else if (!guard && h + kMany * Value::kStep <= whole) {
        steps = kMany;
        for (; r < rows_; ++r) add(ValueTile<1, kMany, false>(), r, h);
      } else {
        steps = 1;
        for (; !guard && r + 4 <= rows_; r += 4) add(ValueTile<4, 1, false>(), r, h);
        for (; r < rows_; ++r) {
          guard ? add(ValueTile<1, 1, true>(), r, h) : add(ValueTile<1, 1, false>(), r, h);
        }
      }
    }
  }

  // Whether all queries see the same keys.
  bool same(const Visibility& visibility) const {
    const Range all = visibility.keys();
    return contains(visibility.of_row(0), all) && contains(visibility.of_row(call_.T - 1), all);
  }

  // Rows, and steps of their columns, whose sums are in registers at once.
  template <int kRows_, int kSteps_, bool kGuard_>
  struct ValueTile {
    static constexpr int kRows = kRows_, kSteps = kSteps_;
    static constexpr bool kGuard = kGuard_;
  };

  // `weights` are the first row's, of each step.
  template <class Value, class Tile>
  void add_columns(const char* row, int64_t stride, int64_t count, const float* const* weights,
                   int64_t groups, float* out) const {
    constexpr int kRows = Tile::kRows, kSteps = Tile::kSteps, kVectors = Value::kVectors;
    F acc[kRows][kSteps * kVectors];
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kSteps * kVectors; ++v) {
        acc[r][v] = Isa::load(out + r * value_width_ + v * W);
      }
    }
    for (int64_t j = 0; j < count; ++j, row += stride) {
      JAX_GLUON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        F x[kVectors];
        Value::load(row + Value::bytes(i * Value::kStep), x);
        JAX_GLUON_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const F weight = Isa::set1(weights[i][(r * kSubtile + j) * groups]);
          JAX_GLUON_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            F& a = acc[r][i * kVectors + v];
            // The same bits with and without the guard.
            a = Isa::fma(Tile::kGuard ? Isa::where_nonzero(weight, x[v]) : x[v], weight, a);
          }
        }
      }
    }
    JAX_GLUON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      JAX_GLUON_UNROLL
      for (int v = 0; v < kSteps * kVectors; ++v) {
        Isa::store(out + r * value_width_ + v * W, acc[r][v]);
      }
    }
  }

  // Of each row: its sum of values, in the order of its elements, maximum and sum of probabilities.
  template <class Value>
  void store_partial(int64_t b, int64_t chunk, const Head& head) const {
    const int64_t groups = value_groups();
    const int64_t size = groups == 1 ? call_.V : call_.value.quantization.head_block;
    for (int64_t r = 0; r < rows_; ++r) {
      const auto to = chunks_.partial(b, head.k, chunk, r);
      const float* out = head.out + r * value_width_;
      for (int64_t c = 0; c < call_.V; ++c) {
        to.values[c] = out[Value::position(c)] + head.offsets[r * groups + c / size];
      }
      *to.maximum = head.maximum[r];
      *to.sum = head.sum[r];
      if (head.sum[r] != 0.0f && !needs_whole_logits(call_) && head.maximum[r] != kHidden) {
        *to.maximum += head.center[r];
      }
    }
  }

  const AttentionForwardCall& call_;
  DecodeChunks<Isa> chunks_;
  const int64_t rows_, head_width_, value_width_;
  int64_t subtile_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
