// Attention of a few queries over many keys, as in generating token by token: keys and values are
// read once, as they are stored.
#pragma once

#include <string>

#include "cpu/decode/decode_codes.h"
#include "cpu/decode/decode_floats.h"

namespace jax_gluon::cpu {
namespace {

template <class Isa>
struct AttentionDecode {
  static bool takes(const AttentionForwardCall& call) { return DecodeChunks<Isa>::takes(call); }

  static KernelOffer offer(const AttentionForwardCall& call) {
    const char* arithmetic = DecodeCodes<Isa>::takes(call) ? "int8" : "float32";
    return {Kernel::kDecode, arithmetic, {DecodeChunks<Isa>::kMaxQueries, 0, 0, 0}, {}, {}, {}};
  }

  static void run(const AttentionForwardCall& call, Parallel& parallel) {
    if (DecodeCodes<Isa>::takes(call)) {
      DecodeCodes<Isa>(call, parallel).run();
    } else {
      DecodeFloats<Isa>(call, parallel).run();
    }
  }
};

}  // namespace
}  // namespace jax_gluon::cpu
