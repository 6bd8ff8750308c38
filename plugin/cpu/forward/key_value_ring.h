// A few packed blocks of keys and values, filled ahead of the one that is computed on.
#pragma once

#include "cpu/forward/packed_key_values.h"

namespace jax_gluon::cpu {
namespace {

template <class Core>
class KeyValueRing {
 public:
  KeyValueRing(const AttentionForwardCall& call, const KeyValueRows<Core>& rows)
      : packed_(call, rows),
        block_keys_(ForwardBlocks<Core>::ring_keys(call)),
        stages_(call.cpu_kernel.stages) {}

  // Blocks of kv head `head` that cover `keys`.
  void start(int64_t head, Range keys) {
    packed_.allocate(stages_, block_keys_);
    head_ = head;
    keys_ = {first_block(keys), keys.end};
    filled_ = keys_.begin;
  }
  // Packs every block before key0 + stages * block_keys(): key0 starts the block that is
  // computed on next, whose predecessors are not read any more.
  void fill_ahead(int64_t key0, RowScratch<Core>& s) {
    constexpr int64_t kStep = ForwardBlocks<Core>::kStep;
    const int64_t ahead = key0 + stages_ * block_keys_;
    for (; filled_ < std::min(keys_.end, ahead); filled_ += block_keys_) {
      const int64_t end = std::min(filled_ + block_keys_, round_up(keys_.end, kStep));
      packed_.pack(head_, {filled_, end}, {slot_of(filled_), filled_}, s);
    }
  }
  int64_t block_keys() const { return block_keys_; }
  // Where the first block that has one of `keys` starts.
  static int64_t first_block(Range keys) {
    constexpr int64_t kStep = ForwardBlocks<Core>::kStep;
    return keys.begin / kStep * kStep;
  }
  // Where the block that starts at key0 is packed.
  int64_t slot_of(int64_t key0) const { return (key0 - keys_.begin) / block_keys_ % stages_; }
  const PackedKeyValues<Core>& packed() const { return packed_; }

 private:
  PackedKeyValues<Core> packed_;
  const int64_t block_keys_, stages_;
  Range keys_;  // from the first block's start
  int64_t head_ = 0, filled_ = 0;
};

}  // namespace
}  // namespace jax_gluon::cpu
