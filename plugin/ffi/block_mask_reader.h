// A block mask from the buffers of a custom call.
#pragma once

#include <cstdint>

#include "attention_call.h"
#include "ffi/buffer_reader.h"

namespace jax_gluon {

// Of blocks of that many rows and keys. Every number of the index is one that it may have.
void read_block_mask(BufferReader& reader, int64_t block, int64_t batch, AttentionCall& call);

}  // namespace jax_gluon
