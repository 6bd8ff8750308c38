// Scratch memory: aligned, uninitialised, its size fixed by the problem's shape.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "cpu/memory/block_pool.h"
#include "cpu/memory/mutex.h"
#include "numerics.h"
#include "poison.h"

namespace jax_gluon::cpu {
namespace {

constexpr size_t kAlignment = 64;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc, which the handlers turn into an error.
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { release(); }

  void allocate(int64_t count) {
    if (count <= count_) return;
    release();
    const size_t bytes = bytes_of(count);
    data_ = static_cast<T*>(bytes >= kMinPooledBytes
                                ? take_block(bytes)
                                : ::operator new(bytes, std::align_val_t{kAlignment}));
    count_ = count;
    poison(data_, bytes);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static size_t bytes_of(int64_t count) { return static_cast<size_t>(count) * sizeof(T); }
  void release() {
    const size_t bytes = bytes_of(count_);
    if (bytes >= kMinPooledBytes) {
      give_block(data_, bytes);
    } else {
      ::operator delete(data_, std::align_val_t{kAlignment});
    }
    data_ = nullptr;
    count_ = 0;
  }

  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Hands each task a scratch object that at most as many tasks hold as run at once.
template <class Scratch>
class ScratchPool {
 public:
  class Lease {
   public:
    Lease(ScratchPool& pool, Scratch&& scratch) : pool_(pool), scratch_(std::move(scratch)) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
      const Locked locked(pool_.mutex_);
      pool_.free_.push_back(std::move(scratch_));
    }
    Scratch* operator->() { return &scratch_; }
    Scratch& operator*() { return scratch_; }

   private:
    ScratchPool& pool_;
    Scratch scratch_;
  };

  explicit ScratchPool(int64_t threads) { free_.reserve(static_cast<size_t>(threads) + 1); }

  Lease acquire() {
    {
      const Locked locked(mutex_);
      if (!free_.empty()) {
        Scratch scratch = std::move(free_.back());
        free_.pop_back();
        return Lease(*this, std::move(scratch));
      }
    }
    return Lease(*this, Scratch());
  }

 private:
  Mutex mutex_;
  std::vector<Scratch> free_;
};

}  // namespace
}  // namespace jax_gluon::cpu
