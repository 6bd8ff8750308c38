// Blocks: clang's block ABI, with blocks as Objective-C objects of class NSBlock.
#include <cstdlib>
#include <cstring>

#include "softmetal/runtime/abi.h"
#include "softmetal/runtime/sanitizer.h"

namespace {

enum BlockFlags : int32_t {
  kReferenceMask = 0xfffe,  // counts in steps of two
  kReferenceOne = 2,
  kNeedsFree = 1 << 24,
  kHasCopyDispose = 1 << 25,
  kIsGlobal = 1 << 28,
};

// What is captured, as clang describes it to _Block_object_assign.
enum FieldFlags : int {
  kFieldIsObject = 3,
  kFieldIsBlock = 7,
  kFieldIsByref = 8,
  kByrefCaller = 128,
};

struct Descriptor {
  uintptr_t reserved;
  uintptr_t size;
  void (*copy)(void*, const void*);
  void (*dispose)(const void*);
};

struct Block {
  void* isa;
  std::atomic<int32_t> flags;
  int32_t reserved;
  void (*invoke)(void*, ...);
  Descriptor* descriptor;
};

// A __block variable.
struct Byref {
  void* isa;
  Byref* forwarding;
  std::atomic<int32_t> flags;
  uint32_t size;
  void (*keep)(Byref*, Byref*);  // this and the next only with kHasCopyDispose
  void (*destroy)(Byref*);
};

// Returns false where the count is pinned: such an object is never freed.
template <typename T>
bool retain(T* object) {
  if ((object->flags.load(std::memory_order_relaxed) & kReferenceMask) == kReferenceMask)
    return false;
  object->flags.fetch_add(kReferenceOne, std::memory_order_relaxed);
  return true;
}

template <typename T>
bool release_was_last(T* object) {
  if ((object->flags.load(std::memory_order_relaxed) & kReferenceMask) == kReferenceMask)
    return false;
  softmetal::objc::tsan_release(object);
  const int32_t before = object->flags.fetch_sub(kReferenceOne, std::memory_order_acq_rel);
  if ((before & kReferenceMask) != kReferenceOne) return false;
  softmetal::objc::tsan_acquire(object);
  return true;
}

Byref* copy_byref(Byref* source) {
  Byref* byref = source->forwarding;
  if (byref->flags & kNeedsFree) {
    retain(byref);
    return byref;
  }
  auto* copy = static_cast<Byref*>(malloc(byref->size));
  memcpy(static_cast<void*>(copy), byref, byref->size);
  // One reference for the block, one for the frame that declared the variable.
  copy->flags = (byref->flags & ~kReferenceMask) | kNeedsFree | 2 * kReferenceOne;
  copy->forwarding = copy;
  byref->forwarding = copy;
  if (byref->flags & kHasCopyDispose) byref->keep(copy, byref);
  return copy;
}

void release_byref(Byref* source) {
  Byref* byref = source->forwarding;
  if (!(byref->flags & kNeedsFree) || !release_was_last(byref)) return;
  if (byref->flags & kHasCopyDispose) byref->destroy(byref);
  free(byref);
}

}  // namespace

extern "C" {

#pragma GCC visibility push(default)

// Become classes in NSObject.mm.
void* _NSConcreteGlobalBlock[32];
void* _NSConcreteStackBlock[32];
void* _NSConcreteMallocBlock[32];

void* _Block_copy(const void* pointer) {
  auto* block = static_cast<Block*>(const_cast<void*>(pointer));
  if (!block) return nullptr;
  const int32_t flags = block->flags.load(std::memory_order_relaxed);
  if (flags & kIsGlobal) return block;
  if (flags & kNeedsFree) {
    retain(block);
    return block;
  }
  auto* copy = static_cast<Block*>(malloc(block->descriptor->size));
  memcpy(static_cast<void*>(copy), block, block->descriptor->size);
  copy->isa = _NSConcreteMallocBlock;
  copy->flags = (flags & ~kReferenceMask) | kNeedsFree | kReferenceOne;
  if (flags & kHasCopyDispose) block->descriptor->copy(copy, block);
  return copy;
}

void _Block_release(const void* pointer) {
  auto* block = static_cast<Block*>(const_cast<void*>(pointer));
  if (!block || !(block->flags.load(std::memory_order_relaxed) & kNeedsFree)) return;
  if (!release_was_last(block)) return;
  if (block->flags & kHasCopyDispose) block->descriptor->dispose(block);
  free(block);
}

// A __block variable (kByrefCaller) does not own the object that it holds.
void _Block_object_assign(void* target, const void* object, const int flags) {
  void* value = const_cast<void*>(object);
  if (flags & kByrefCaller) {
    // as it is
  } else if (flags & kFieldIsByref) {
    value = copy_byref(static_cast<Byref*>(value));
  } else if ((flags & kFieldIsBlock) == kFieldIsBlock) {
    value = _Block_copy(object);
  } else if ((flags & kFieldIsObject) == kFieldIsObject) {
    objc_retain(static_cast<id>(value));
  }
  *static_cast<void**>(target) = value;
}

void _Block_object_dispose(const void* object, const int flags) {
  void* value = const_cast<void*>(object);
  if (flags & kByrefCaller) {
    return;
  } else if (flags & kFieldIsByref) {
    release_byref(static_cast<Byref*>(value));
  } else if ((flags & kFieldIsBlock) == kFieldIsBlock) {
    _Block_release(object);
  } else if ((flags & kFieldIsObject) == kFieldIsObject) {
    objc_release(static_cast<id>(value));
  }
}

id objc_retainBlock(id block) { return static_cast<id>(_Block_copy(block)); }

#pragma GCC visibility pop
}
