// In place of plugin/cpu/memory/block_pool.cc: blocks that are no larger than asked for and that
// no later call is given, so that AddressSanitizer sees where they end.
#include <new>

#include "cpu/memory/block_pool.h"

namespace jax_gluon::cpu {

constexpr std::align_val_t kPage{4096};

void* take_block(size_t bytes) { return ::operator new(bytes, kPage); }
void give_block(void* block, size_t) { ::operator delete(block, kPage); }
BlockPoolState block_pool_state() { return {0, 0}; }

}  // namespace jax_gluon::cpu
