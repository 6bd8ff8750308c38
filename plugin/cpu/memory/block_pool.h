// Large blocks of memory that calls leave for the calls after them: pages that the system gives
// anew, zeroed, cost a gradient up to a tenth of its time.
#pragma once

#include <cstddef>

namespace jax_gluon::cpu {

// Blocks below this are the allocator's, which keeps them itself.
constexpr size_t kMinPooledBytes = size_t{1} << 16;
// Of all blocks that are kept. Linux may take their pages back where memory is short.
constexpr size_t kMaxKeptBytes = size_t{256} << 20;

// A block of at least as many bytes, aligned to a page: kMinPooledBytes or more. Throws
// std::bad_alloc.
void* take_block(size_t bytes);
// Gives back what `take_block` gave for as many bytes.
void give_block(void* block, size_t bytes);

// Bytes of blocks that are kept, and the blocks that were made so far.
struct BlockPoolState {
  size_t kept_bytes, made_blocks;
};
BlockPoolState block_pool_state();

}  // namespace jax_gluon::cpu
