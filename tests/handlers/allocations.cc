#include "allocations.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace jax_gluon::handlers {
namespace {

std::atomic<int64_t> live{0};
thread_local bool is_watched = false;
thread_local int64_t count = 0, refused_number = -1;

void* allocate_or_null(size_t bytes, size_t alignment) {
  if (is_watched && count++ == refused_number) return nullptr;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* const data = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (data != nullptr) ++live;
  return data;
}

void* allocate(size_t bytes, size_t alignment) {
  void* const data = allocate_or_null(bytes, alignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void release(void* data) {
  if (data == nullptr) return;
  --live;
  std::free(data);
}

}  // namespace

void watch_allocations(int64_t refused) {
  count = 0;
  refused_number = refused;
  is_watched = true;
}

int64_t stop_watching() {
  is_watched = false;
  return count;
}

void pause_watching(bool paused) { is_watched = !paused; }

int64_t live_allocations() { return live; }

}  // namespace jax_gluon::handlers

constexpr size_t kDefault = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
using jax_gluon::handlers::allocate;
using jax_gluon::handlers::allocate_or_null;
using jax_gluon::handlers::release;

void* operator new(size_t bytes) { return allocate(bytes, kDefault); }
void* operator new[](size_t bytes) { return allocate(bytes, kDefault); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return allocate_or_null(bytes, kDefault);
}
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept {
  return allocate_or_null(bytes, kDefault);
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* data) noexcept { release(data); }
void operator delete[](void* data) noexcept { release(data); }
void operator delete(void* data, size_t) noexcept { release(data); }
void operator delete[](void* data, size_t) noexcept { release(data); }
void operator delete(void* data, std::align_val_t) noexcept { release(data); }
void operator delete[](void* data, std::align_val_t) noexcept { release(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { release(data); }
void operator delete[](void* data, size_t, std::align_val_t) noexcept { release(data); }
