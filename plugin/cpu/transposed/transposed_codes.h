// All keys and values of a call of INT8 codes, packed for the transposed kernel on vectors.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/forward/folded_values.h"
#include "cpu/transposed/transposed_pack.h"

namespace jax_gluon::cpu {
namespace {

// A subtile of 64 keys. Elements are bytes.
struct CodesOfSubtile {
  const uint32_t* keys;  // [64][row lanes]
  const int32_t* start;  // of each key's sums: what the queries' bias adds, taken away
  const float* scale;    // of each key
  const float *fold_log2, *fold_inverse;
  const uint32_t* values;    // [value columns][16]: a row has the 64 keys of a column
  const uint8_t* has_zeros;  // of each key: whether its values are packed as zeros
};

template <class Core>
class TransposedCodes {
  using Isa = typename Core::Isa;
  static constexpr int64_t W = kTileQueries;
  static constexpr int kKeys = kSubtileKeys, kGroups = kKeys / Core::kGroup;
  static_assert(kGroups == W);

 public:
  TransposedCodes(const AttentionForwardCall& call, const KeyValueRows<Core>& rows)
      : call_(call),
        rows_(rows),
        lanes_(row_lanes<Core>(call.H)),
        columns_(round_up(call.V, W)),
        subtiles_(ceil_div(call.S, int64_t{kKeys})) {}

  void pack_all(Parallel& parallel) {
    const int64_t count = call_.B * call_.K * subtiles_, keys = count * kKeys;
    keys_.allocate(keys * lanes_);
    start_.allocate(keys);
    scales_.allocate(keys * 3);
    values_.allocate(count * columns_ * W);
    has_zeros_.allocate(keys);
    ScratchPool<Scratch> scratch(parallel.threads());
    constexpr int64_t kTask = 4;
    parallel.run(ceil_div(count, kTask), [&](int64_t task) {
      auto lease = scratch.acquire();
      lease->rows.prepare(call_);
      lease->lines.allocate(kGroups * columns_);
      for (int64_t i = task * kTask; i < std::min((task + 1) * kTask, count); ++i) {
        pack(i / subtiles_, i % subtiles_, *lease);
      }
    });
  }

  int64_t lanes() const { return lanes_; }
  int64_t columns() const { return columns_; }
  CodesOfSubtile operator()(int64_t head, int64_t subtile) const {
    const int64_t i = head * subtiles_ + subtile, key = i * kKeys;
    const float* scales = scales_.get() + 3 * key;
    return {keys_.get() + key * lanes_,
            start_.get() + key,
            scales,
            scales + kKeys,
            scales + 2 * kKeys,
            values_.get() + i * columns_ * W,
            has_zeros_.get() + key};
  }

 private:
  struct Scratch {
    RowScratch<Core> rows;
    Buffer<uint32_t> lines;  // [columns / W][kGroups][W]: four keys a lane
  };

  // What no row sees is packed as zeros.
  void pack(int64_t head, int64_t subtile, Scratch& s) {
    const int64_t b = head / call_.K, k = head % call_.K, first = subtile * kKeys;
    const int64_t i = head * subtiles_ + subtile, at = i * kKeys;
    const Range seen = intersect(Visibility(call_, b).keys(), {first, first + kKeys});
    float* scales = scales_.get() + 3 * at;
    if (seen.empty()) {
      std::fill(keys_.get() + at * lanes_, keys_.get() + (at + kKeys) * lanes_, uint32_t{0});
      std::fill(values_.get() + i * columns_ * W, values_.get() + (i + 1) * columns_ * W,
                uint32_t{0});
      std::fill(start_.get() + at, start_.get() + at + kKeys, 0);
      std::fill(scales, scales + 3 * kKeys, 0.0f);
      std::fill(has_zeros_.get() + at, has_zeros_.get() + at + kKeys, uint8_t{0});
      return;
    }
    touch_rows(call_.key, b, first, seen.end, k, call_.H);
    touch_rows(call_.value, b, first, seen.end, k, call_.V);
    for (int64_t j = 0; j < kKeys; ++j) {
      uint32_t* key = keys_.get() + (at + j) * lanes_;
      if (first + j >= seen.end) {
        std::fill(key, key + lanes_, uint32_t{0});
        start_[at + j] = 0;
        scales[j] = 0.0f;
        continue;
      }
      const auto [codes, own] =
          rows_.keys().codes_of(b, first + j, k, s.rows.row.get(), s.rows.codes.get());
      row_to_lanes<Core>(codes, DType::kS8, call_.H, 0, key);
      start_[at + j] = -128 * sum_of(codes, call_.H);
      scales[j] = own.scale;
    }
    FoldedValues values;
    load_folded_values(rows_, call_, head, first, seen.end, s.rows, values);
    std::copy(values.fold_log2, values.fold_log2 + kKeys, scales + kKeys);
    std::copy(values.fold_inverse, values.fold_inverse + kKeys, scales + 2 * kKeys);
    std::copy(values.has_zeros, values.has_zeros + kKeys, has_zeros_.get() + at);
    for (int64_t g = 0; g < kGroups; ++g) {
      pack_value_line<Core, int8_t>(values.rows + Core::kGroup * g, call_.V, s.lines.get() + g * W,
                                    kGroups * W);
    }
    for (int64_t c = 0; c < columns_; c += W) {
      TransposedPack<Isa>::pack_right(s.lines.get() + c * kGroups, W,
                                      values_.get() + (i * columns_ + c) * W);
    }
  }

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& rows_;
  const int64_t lanes_, columns_, subtiles_;
  Buffer<uint32_t> keys_, values_;
  Buffer<int32_t> start_;
  Buffer<float> scales_;  // of each subtile: scales, logarithms and reciprocals of what is folded
  Buffer<uint8_t> has_zeros_;
};

}  // namespace
}  // namespace jax_gluon::cpu
