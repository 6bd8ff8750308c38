#include "cpu/memory/mutex.h"

namespace jax_gluon::cpu {

void Mutex::lock() { mutex_.lock(); }
void Mutex::unlock() { mutex_.unlock(); }

}  // namespace jax_gluon::cpu
