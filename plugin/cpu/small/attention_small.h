// Attention over few keys.
#pragma once

#include "cpu/small/one_key.h"
#include "cpu/small/small_backward.h"
#include "cpu/small/small_forward.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
struct AttentionSmall {
  using Heads = SmallHeads<Isa>;

  static bool takes(const AttentionForwardCall& call) { return Heads::takes(call); }
  static KernelOffer offer(const AttentionForwardCall&) {
    return {Kernel::kSmall, "float32", {0, 0, 0, Heads::kMaxKeys}, {}, {}, {}};
  }
  static bool takes(const AttentionBackwardCall& call) {
    return Heads::takes(call) && call.T <= SmallBackward<Isa>::kMaxTokens &&
           call.S <= SmallBackward<Isa>::kMaxTokens;
  }
  static KernelOffer offer(const AttentionBackwardCall&) {
    constexpr int64_t kMaxTokens = SmallBackward<Isa>::kMaxTokens;
    return {Kernel::kSmall, "float32", {kMaxTokens, 0, 0, kMaxTokens}, {}, {}, {}};
  }

  static void run(const AttentionForwardCall& call, Parallel& parallel) {
    if (has_one_probability(call)) {
      OneKeyForward<Isa>(call, parallel).run();
    } else {
      SmallForward<Isa>(call, parallel).run();
    }
  }
  static void run(const AttentionBackwardCall& call, Parallel& parallel) {
    if (has_one_probability(call) && !call.is_partial) {
      OneKeyBackward<Isa>(call, parallel).run();
    } else {
      SmallBackward<Isa>(call, parallel).run();
    }
  }

 private:
  // Whether a key's probability is 1 wherever it is seen.
  static bool has_one_probability(const AttentionCall& call) { return call.S == 1 && !call.sinks; }
};

}  // namespace
}  // namespace jax_gluon::cpu
