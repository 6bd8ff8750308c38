// All keys and values of a call, packed for the tiles of the transposed kernel.
#pragma once

#include <algorithm>

#include "cpu/forward/key_value_rows.h"
#include "cpu/rows/visibility.h"
#include "cpu/transposed/transposed_pack.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class TransposedKeyValues {
  using Isa = typename Core::Isa;
  static constexpr bool kInt8 = Core::kArithmetic == Arithmetic::kInt8;
  static constexpr int64_t W = Isa::kLanes, kTaskUnits = 8;

 public:
  TransposedKeyValues(const AttentionForwardCall& call, const KeyValueRows<Core>& rows)
      : call_(call),
        rows_(rows),
        lanes_(row_lanes<Core>(call.H)),
        value_tiles_(ceil_div(call.V, W)),
        units_(ceil_div(call.S, kUnitKeys)) {}

  void pack_all(Parallel& parallel) {
    const int64_t heads = call_.B * call_.K, tasks = ceil_div(units_, kTaskUnits);
    const int64_t keys = units_ * kUnitKeys;
    keys_.allocate(heads * keys * lanes_);
    values_.allocate(heads * keys / 2 * value_tiles_ * W);
    has_zeros_.allocate(heads * keys);
    if (kInt8) scales_.allocate(heads * keys);
    ScratchPool<Scratch> scratch(parallel.threads());
    parallel.run(heads * tasks, [&](int64_t task) {
      auto lease = scratch.acquire();
      lease->rows.prepare(call_);
      lease->values.allocate(kUnitKeys * value_tiles_ * W);
      const int64_t first = task % tasks * kTaskUnits, head = task / tasks;
      for (int64_t unit = first; unit < std::min(first + kTaskUnits, units_); ++unit) {
        pack(head, unit, *lease);
      }
    });
  }

  int64_t lanes() const { return lanes_; }
  int64_t value_tiles() const { return value_tiles_; }
  // Those of a kv head from a unit on.
  const uint32_t* keys(int64_t head, int64_t unit) const {
    return keys_.get() + at(head, unit) * lanes_;
  }
  const uint32_t* values(int64_t head, int64_t unit) const {
    return values_.get() + at(head, unit) / 2 * value_tiles_ * W;
  }
  // INT8: of each key.
  const float* scales(int64_t head, int64_t unit) const { return scales_.get() + at(head, unit); }
  // Of each key: whether its value row is packed as zeros, because it is not finite.
  const uint8_t* has_zeros(int64_t head, int64_t unit) const {
    return has_zeros_.get() + at(head, unit);
  }

 private:
  struct Scratch {
    RowScratch<Core> rows;
    Buffer<float> values;  // [kUnitKeys][value_tiles * W]
  };

  int64_t at(int64_t head, int64_t unit) const { return (head * units_ + unit) * kUnitKeys; }

  // What no row sees is packed as zeros.
  void pack(int64_t head, int64_t unit, Scratch& s) {
    const int64_t b = head / call_.K, k = head % call_.K, first = unit * kUnitKeys;
    const Range all = intersect(Visibility(call_, b).keys(), {first, first + kUnitKeys});
    touch_rows(call_.key, b, all.begin, all.end, k, call_.H);
    touch_rows(call_.value, b, all.begin, all.end, k, call_.V);
    const int64_t columns = value_tiles_ * W;
    const float per_unit = 1.0f / rows_.value_unit(head);
    for (int64_t j = 0; j < kUnitKeys; ++j) {
      uint32_t* key = keys_.get() + (at(head, unit) + j) * lanes_;
      float* value = s.values.get() + j * columns;
      uint8_t& has_zeros = has_zeros_[at(head, unit) + j];
      has_zeros = 0;
      if (first + j < all.begin || first + j >= all.end) {
        std::fill(key, key + lanes_, uint32_t{0});
        std::fill(value, value + columns, 0.0f);
        if (kInt8) scales_[at(head, unit) + j] = 0.0f;
        continue;
      }
      pack_key(head, first + j, at(head, unit) + j, s.rows, key);
      rows_.values().load(b, first + j, k, s.rows.row.get());
      has_zeros = !all_finite<Isa>(s.rows.row.get(), call_.V);
      std::fill(value, value + columns, 0.0f);
      for (int64_t v = 0; !has_zeros && v < call_.V; ++v) value[v] = s.rows.row[v] * per_unit;
    }
    TransposedPack<Isa>::pack_columns(s.values.get(), columns,
                                      values_.get() + at(head, unit) / 2 * columns);
  }

  void pack_key(int64_t head, int64_t j, int64_t place, RowScratch<Core>& s, uint32_t* out) {
    const int64_t b = head / call_.K, k = head % call_.K;
    if constexpr (kInt8) {
      const auto [codes, own] = rows_.keys().codes_of(b, j, k, s.row.get(), s.codes.get());
      row_to_lanes<Core>(codes, DType::kS8, call_.H, 0, out);
      scales_[place] = own.scale;
    } else {
      row_to_lanes<Core>(row_of(call_.key, b, j, k), call_.key.dtype, call_.H, 0, out);
    }
  }

  const AttentionForwardCall& call_;
  const KeyValueRows<Core>& rows_;
  const int64_t lanes_, value_tiles_, units_;
  Buffer<uint32_t> keys_, values_;
  Buffer<float> scales_;
  Buffer<uint8_t> has_zeros_;
};

}  // namespace
}  // namespace jax_gluon::cpu
