// A few slots for packed blocks of keys and values, filled ahead of the block that is computed on.
#pragma once

#include "packed_key_values.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class KeyValueRing {
 public:
  static constexpr int64_t kStages = 2;

  KeyValueRing(const AttentionForwardCall& call, const KeyValueRows<Core>& rows)
      : packed_(call, rows) {}

  // Blocks of kv head `head` that cover `keys`.
  void start(int64_t head, Range keys) {
    packed_.allocate(kStages, 1);
    head_ = head;
    end_ = keys.end;
    filled_ = keys.begin / kBlockKeys * kBlockKeys;
  }
  // Fills slots for every block before key0 + kStages * kBlockKeys: key0 starts the block that is
  // computed on next, whose predecessors are not read any more.
  void fill_ahead(int64_t key0, RowScratch<Core>& s) {
    for (; filled_ < std::min(end_, key0 + kStages * kBlockKeys); filled_ += kBlockKeys) {
      packed_.pack(head_, {filled_, filled_ + kBlockKeys}, {slot(filled_), filled_}, s);
    }
  }
  // The slot, a row of packed(), of the block that starts at key0.
  static int64_t slot(int64_t key0) { return key0 / kBlockKeys % kStages; }
  const PackedKeyValues<Core>& packed() const { return packed_; }

 private:
  PackedKeyValues<Core> packed_;
  int64_t head_ = 0, end_ = 0, filled_ = 0;
};

}  // namespace
}  // namespace jax_gluon::cpu
