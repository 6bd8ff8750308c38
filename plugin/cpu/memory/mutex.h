// std::mutex behind functions compiled once, for any CPU: its inline members, where a compiler
// leaves them as functions, would be compiled for the instruction set of the file that includes
// this.
#pragma once

#include <mutex>

namespace jax_gluon::cpu {

class Mutex {
 public:
  void lock();
  void unlock();

 private:
  std::mutex mutex_;
};

namespace {

class Locked {
 public:
  explicit Locked(Mutex& mutex) : mutex_(mutex) { mutex_.lock(); }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
  ~Locked() { mutex_.unlock(); }

 private:
  Mutex& mutex_;
};

}  // namespace
}  // namespace jax_gluon::cpu
