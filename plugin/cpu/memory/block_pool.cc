#include "cpu/memory/block_pool.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

namespace jax_gluon::cpu {
namespace {

constexpr size_t kPage = size_t{1} << 14;  // Apple's; a multiple of others

struct Block {
  void* data;
  size_t bytes;
  uint64_t given;  // how many were given back before it
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> kept;    // the one that was given back last is last
  size_t offered_blocks = 0;  // the first of those that are kept, whose pages the system may have
  uint64_t given_blocks = 0;
  size_t kept_bytes = 0, made_blocks = 0;
};

// Never destroyed: XLA's threads may run to the end of the process.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// Blocks of a few sizes, at most an eighth larger than asked for, so that they fit other calls.
size_t rounded(size_t bytes) {
  size_t step = kPage;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Takes a block out of those that are kept.
Block remove(size_t i) {
  const Block block = pool().kept[i];
  pool().kept.erase(pool().kept.begin() + static_cast<std::ptrdiff_t>(i));
  pool().kept_bytes -= block.bytes;
  if (i < pool().offered_blocks) --pool().offered_blocks;
  return block;
}

void offer_pages() {
#if defined(__linux__)
  // Of a block that was not wanted while so many others were given back: to tell the system of
  // every block would cost as much as new pages do.
  constexpr uint64_t kPatience = 256;
  // Pages that are written again before memory is short stay what they are.
  std::vector<Block>& kept = pool().kept;
  size_t& i = pool().offered_blocks;
  for (; i < kept.size() && pool().given_blocks - kept[i].given > kPatience; ++i) {
    madvise(kept[i].data, kept[i].bytes, MADV_FREE);
  }
#endif
}

}  // namespace

void* take_block(size_t bytes) {
  const size_t size = rounded(bytes);
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    const std::vector<Block>& kept = pool().kept;
    for (size_t i = kept.size(); i-- > 0;) {
      if (kept[i].bytes == size) return remove(i).data;
    }
    ++pool().made_blocks;
  }
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return data;
}

void give_block(void* block, size_t bytes) {
  const size_t size = rounded(bytes);
  const std::lock_guard<std::mutex> lock(pool().mutex);
  try {
    pool().kept.push_back({block, size, pool().given_blocks++});
  } catch (const std::bad_alloc&) {  // destructors call this
    munmap(block, size);
    return;
  }
  pool().kept_bytes += size;
  while (pool().kept_bytes > kMaxKeptBytes) {
    const Block oldest = remove(0);
    munmap(oldest.data, oldest.bytes);
  }
  offer_pages();
}

BlockPoolState block_pool_state() {
  const std::lock_guard<std::mutex> lock(pool().mutex);
  return {pool().kept_bytes, pool().made_blocks};
}

}  // namespace jax_gluon::cpu
