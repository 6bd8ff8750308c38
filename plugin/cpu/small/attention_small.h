// Attention of few queries over few keys.
#pragma once

#include "cpu/small/one_key.h"
#include "cpu/small/small_backward.h"
#include "cpu/small/small_forward.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
struct AttentionSmall {
  static bool takes(const AttentionCall& call) { return SmallHeads<Isa>::takes(call); }
  static KernelOffer offer() { return SmallHeads<Isa>::offer(); }

  static void run(const AttentionForwardCall& call, Parallel& parallel) {
    if (call.S == 1) {
      OneKeyForward<Isa>(call, parallel).run();
    } else {
      SmallForward<Isa>(call, parallel).run();
    }
  }
  static void run(const AttentionBackwardCall& call, Parallel& parallel) {
    if (call.S == 1) {
      OneKeyBackward<Isa>(call, parallel).run();
    } else {
      SmallBackward<Isa>(call, parallel).run();
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
