// Attention of a few queries over many keys: products in float32. Keys and values are read once, as
// they are stored, and unpacked in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/decode/decode_queries.h"
#include "cpu/decode/float_products.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
class DecodeFloats {
  using F = typename Isa::F;
  using Queries = DecodeQueries<Isa>;
  static constexpr int64_t W = Isa::kLanes;
  // Keys whose scores are alive at once, at most, and keys of a task.
  static constexpr int64_t kSubtile = FloatProducts<Isa, DType::kF32>::kMaxKeys, kChunk = 256;
  // Where all heads' keys and values of a subtile are more than a part of the second cache,
  // subtiles are shorter.
  static constexpr int64_t kMinSubtile = 16, kStreamedBytes = 256 * 1024;
  using Rules = LogitRules<Isa, kSubtile>;

 public:
  DecodeFloats(const AttentionForwardCall& call, Parallel& parallel)
      : call_(call),
        queries_(call, parallel, kChunk, 2 * W, value_groups(call)),
        subtile_(kSubtile),
        scratch_(parallel.threads()) {
    const int64_t bytes = call.K * (row_bytes(call.key, call.H) + row_bytes(call.value, call.V));
    while (subtile_ > kMinSubtile && subtile_ * bytes > kStreamedBytes) subtile_ /= 2;
  }

  void run() {
    queries_.run([this](int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
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

  struct Scratch : Queries::Scratch {
    // Of the head and the subtile at hand.
    Buffer<float> scores;                 // [head rows][kSubtile]
    Buffer<float> weights;                // [head rows][kSubtile][groups]
    Buffer<float> row_scale, row_offset;  // [kSubtile][groups]
    Buffer<float> dequantized;
    Buffer<char> gathered;
  };

  static Scaling key_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    const bool is_shared = q.token_block == 0 || q.token_block >= Queries::kMinSharingKeys;
    return is_shared ? Scaling::kBlock : Scaling::kLoose;
  }
  static Scaling value_scaling(const Quantization& q) {
    if (!q) return Scaling::kNone;
    if (q.head_block == 0) return Scaling::kRow;
    return q.head_block % (2 * W) == 0 ? Scaling::kGroup : Scaling::kLoose;
  }
  static int64_t value_groups(const AttentionForwardCall& call) {
    const Quantization& q = call.value.quantization;
    return value_scaling(q) == Scaling::kGroup ? ceil_div(call.V, q.head_block) : 1;
  }

  void prepare(Scratch& s) const {
    queries_.prepare(s);
    const int64_t rows = queries_.head_rows;
    s.scores.allocate(rows * kSubtile);
    s.weights.allocate(rows * kSubtile * queries_.groups);
    const int64_t widest = std::max(queries_.head_width, queries_.value_width);
    s.dequantized.allocate(kSubtile * widest);
    s.gathered.allocate(kSubtile * widest * 4);
    for (Buffer<float>* each : {&s.row_scale, &s.row_offset}) {
      each->allocate(kSubtile * queries_.groups);
    }
  }

  // Calls f with the storage of an operand as a FloatProducts type; loose rows are floats.
  template <class Function>
  static void with_storage(const Operand& x, bool loose, Function f) {
    if (loose) return f(FloatProducts<Isa, DType::kF32>());
    switch (x.dtype) {
      case DType::kF32:
        return f(FloatProducts<Isa, DType::kF32>());
      case DType::kBF16:
        return f(FloatProducts<Isa, DType::kBF16>());
      case DType::kF16:
        return f(FloatProducts<Isa, DType::kF16>());
      case DType::kS8:
        return f(FloatProducts<Isa, DType::kS8>());
      case DType::kU4x2:
        return f(FloatProducts<Isa, DType::kU4x2>());
    }
  }

  // A chunk of keys, for all heads: those of a token lie side by side.
  void attend(int64_t b, int64_t chunk, const Visibility& visibility, Range keys) {
    auto lease = scratch_.acquire();
    Scratch& s = *lease;
    prepare(s);
    const bool loose_keys = key_scaling(call_.key.quantization) == Scaling::kLoose;
    const bool loose_values = value_scaling(call_.value.quantization) == Scaling::kLoose;
    with_storage(call_.key, loose_keys, [&](auto key) {
      with_storage(call_.value, loose_values, [&](auto value) {
        attend_keys<decltype(key), decltype(value)>(visibility, b, keys, s);
        queries_.template store<decltype(value)>(b, chunk, s);
      });
    });
  }

  template <class Key, class Value>
  void attend_keys(const Visibility& visibility, int64_t b, Range keys, Scratch& s) const {
    for (int64_t i = 0; i < queries_.all_rows; ++i) queries_.template load_query<Key>(b, i, s);
    for (int64_t j = keys.begin; j < keys.end; j += subtile_) {
      const Range subtile{j, std::min(j + subtile_, keys.end)};
      stream_heads(call_.key, b, subtile.begin, subtile.end, call_.K, call_.H);
      stream_heads(call_.value, b, subtile.begin, subtile.end, call_.K, call_.V);
      for (int64_t k = 0; k < call_.K; ++k) {
        find_scores<Key>(b, k, subtile, s);
        bool finite = true;
        if (find_weights(visibility, b, k, subtile, s, finite)) {
          add_values<Value>(visibility, b, k, subtile, finite, s);
        }
      }
    }
  }

  // The rows of a subtile, one after another, in whole steps: dequantized if loose, else copied as
  // they are stored. (Heads lie between the rows of one head: read in place, a power of two of them
  // maps all rows to one set of the cache, and no prefetcher follows. So the rows of the next
  // subtile are asked for here.)
  template <class Stored>
  StoredRows gather_rows(const QuantizableOperand& x, int64_t b, int64_t k, Range keys,
                         int64_t width, bool loose, Scratch& s) const {
    const int64_t count = keys.end - keys.begin;
    const int64_t padded = round_up(width, Stored::kStep);
    if (loose) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        float* row = s.dequantized.get() + (j - keys.begin) * padded;
        QuantizedRow<Isa>::load(x, b, j, k, width, row);
        std::fill(row + width, row + padded, 0.0f);
      }
      return {reinterpret_cast<const char*>(s.dequantized.get()), padded * 4, count};
    }
    const int64_t bytes = Stored::bytes(padded), used = Stored::bytes(width);
    const int64_t step = x.stride[0] * static_cast<int64_t>(size_of(x.dtype));
    int64_t end = end_of_piece(x, keys.begin, keys.end);
    const char* from = static_cast<const char*>(row_of(x, b, keys.begin, k));
    if (step == bytes && used == bytes && end == keys.end) return {from, bytes, count};
    char* row = s.gathered.get();
    constexpr int64_t kVector = 4 * W;
    const bool whole = used % kVector == 0;
    for (int64_t j = keys.begin; j < keys.end; ++j, row += bytes, from += step) {
      if (j == end) {  // of a page
        end = end_of_piece(x, j, keys.end);
        from = static_cast<const char*>(row_of(x, b, j, k));
      }
      if (whole) {  // a call of memcpy costs as much as the rest of a short row
        for (int64_t i = 0; i < used; i += kVector) {
          Isa::store_i32(row + i, Isa::load_i32(from + i));
        }
      } else {
        std::memcpy(row, from, static_cast<size_t>(used));
      }
      if (bytes > used) std::memset(row + used, 0, static_cast<size_t>(bytes - used));
    }
    return {s.gathered.get(), bytes, count};
  }

  // Scales and offsets of a subtile's rows: [keys][per_row].
  static void gather_scales(const QuantizableOperand& x, int64_t b, int64_t k, Range keys,
                            int64_t per_row, Scratch& s) {
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      const int64_t at = (j - keys.begin) * per_row;
      QuantizedRow<Isa>::load_scales(x, b, j, k, per_row, s.row_scale.get() + at,
                                     s.row_offset.get() + at);
    }
  }

  template <class Key>
  void find_scores(int64_t b, int64_t k, Range keys, Scratch& s) const {
    const Scaling scaling = key_scaling(call_.key.quantization);
    const int64_t first = k * queries_.head_rows;
    const StoredRows rows =
        gather_rows<Key>(call_.key, b, k, keys, call_.H, scaling == Scaling::kLoose, s);
    typename Key::Queries queries{s.query.get() + first * queries_.head_width, queries_.head_width,
                                  queries_.head_rows, call_.H, s.constant.get() + first};
    if (scaling != Scaling::kBlock) {
      Key::dot(rows, queries, s.scores.get());
    } else {
      queries.data = s.folded.get();
      queries_.each_run(keys, [&](Range run) {
        queries_.template fold_scales<Key>(b, run.begin, k, s);
        const int64_t begin = run.begin - keys.begin;
        Key::dot(rows.part(begin, run.end - keys.begin), queries, s.scores.get() + begin);
        queries_.apply_powers(b, run, k, s.scores.get() + begin, kSubtile, 1);
      });
    }
    if (scaling != Scaling::kRow) return;
    gather_scales(call_.key, b, k, keys, 1, s);
    const bool has_offsets = static_cast<bool>(call_.key.quantization.offset);
    for (int64_t r = 0; r < queries_.head_rows; ++r) {
      float* scores = s.scores.get() + r * kSubtile;
      for (int64_t j = 0; j < rows.count; ++j) {
        scores[j] = scores[j] * s.row_scale[j] +
                    (has_offsets ? s.row_offset[j] * s.query_sum[first + r] : 0.0f);
      }
    }
  }

  // Scores to probabilities relative to each row's running maximum, then to weights of the stored
  // values. False where no row sees any of the keys; `finite` becomes false where a product is not,
  // which may hide a key.
  bool find_weights(const Visibility& visibility, int64_t b, int64_t k, Range keys, Scratch& s,
                    bool& finite) const {
    const int64_t count = keys.end - keys.begin, padded = round_up(count, W);
    bool any = false;
    for (int64_t r = 0; r < queries_.head_rows; ++r) {
      const int64_t i = k * queries_.head_rows + r, query = queries_.query_of(i);
      float* scores = s.scores.get() + r * kSubtile;
      finite &= all_finite<Isa>(scores, count);
      std::fill(scores + count, scores + padded, 0.0f);
      if (needs_whole_logits(call_) && s.center[i] != 0.0f) {
        for (int64_t j = 0; j < padded; ++j) scores[j] += s.center[i];
      }
      Range visible = visibility.of_row(query);
      visible.end = std::min(visible.end, keys.end);
      Rules(call_, b, queries_.head_of(i)).apply(scores, query, keys.begin, 0, padded, visible);
      any |= find_probabilities(scores, padded, i, s);
    }
    if (!any) return false;
    weigh(b, k, keys, s);
    return true;
  }

  // Of row i.
  bool find_probabilities(float* scores, int64_t padded, int64_t i, Scratch& s) const {
    F largest = Isa::set1(kHidden), nan = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F x = Isa::load(scores + j);
      largest = Isa::max(x, largest);
      nan =
          Isa::add(nan, Isa::where_less(x, Isa::set1(0.0f), Isa::zero(), Isa::mul(x, Isa::zero())));
    }
    const float before = s.maximum[i], now = std::max(before, Isa::reduce_max(largest));
    const bool has_nan = Isa::reduce_add(nan) != 0.0f;
    if (now == kHidden && !has_nan) {
      std::fill(scores, scores + padded, 0.0f);
      return false;
    }
    const float reference = now == kHidden ? 0.0f : now;
    if (before != now && before != kHidden) {
      const float rescale = std::exp2(before - now);
      s.sum[i] *= rescale;
      queries_.rescale(i, rescale, s);
    }
    const F minus = Isa::set1(-reference);
    F total = Isa::zero();
    for (int64_t j = 0; j < padded; j += W) {
      const F p = Isa::template exp2<5>(Isa::add(Isa::load(scores + j), minus));
      Isa::store(scores + j, p);
      total = Isa::add(total, p);
    }
    s.maximum[i] = now;
    s.sum[i] += Isa::reduce_add(total);
    return true;
  }

  // Probabilities times the scales of their values; what the offsets add is summed apart. A hidden
  // key weighs exactly nothing, whatever its scale.
  void weigh(int64_t b, int64_t k, Range keys, Scratch& s) const {
    const Scaling scaling = value_scaling(call_.value.quantization);
    const int64_t rows = queries_.head_rows, groups = queries_.groups;
    if (scaling == Scaling::kNone || scaling == Scaling::kLoose) {
      std::memcpy(s.weights.get(), s.scores.get(),
                  static_cast<size_t>(rows * kSubtile) * sizeof(float));
      return;
    }
    const bool has_offsets = static_cast<bool>(call_.value.quantization.offset);
    gather_scales(call_.value, b, k, keys, groups, s);
    for (int64_t r = 0; r < rows; ++r) {
      const float* probabilities = s.scores.get() + r * kSubtile;
      float* weights = s.weights.get() + r * kSubtile * groups;
      float* sums = s.offsets.get() + queries_.groups_at(k * rows + r);
      for (int64_t j = 0; j < keys.end - keys.begin; ++j) {
        const float p = probabilities[j];
        const float* scale = s.row_scale.get() + j * groups;
        const float* offset = s.row_offset.get() + j * groups;
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
  void add_values(const Visibility& visibility, int64_t b, int64_t k, Range keys, bool finite,
                  Scratch& s) const {
    const Scaling scaling = value_scaling(call_.value.quantization);
    const StoredRows rows =
        gather_rows<Value>(call_.value, b, k, keys, call_.V, scaling == Scaling::kLoose, s);
    // Floats of a hidden key may be NaN, which a weight of 0 does not take away.
    const bool are_floats = scaling == Scaling::kNone || scaling == Scaling::kLoose;
    const bool guards = are_floats && (!finite || call_.has_mask() || call_.bias ||
                                       !visibility.all_see({0, call_.T}, visibility.keys()));
    const int64_t head_rows = queries_.head_rows, width = queries_.value_width;
    Value::add_rows(rows,
                    {s.weights.get(), queries_.groups, call_.value.quantization.head_block, guards},
                    {s.out.get() + k * head_rows * width, width, head_rows, call_.V});
  }

  const AttentionForwardCall& call_;
  Queries queries_;
  int64_t subtile_;
  ScratchPool<Scratch> scratch_;
};

}  // namespace
}  // namespace jax_gluon::cpu
