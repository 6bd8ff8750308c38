// Allocations of this thread through operator new: counted, and one of them refused.
#pragma once

#include <cstdint>

namespace jax_gluon::handlers {

// From now on they are counted, and the one of this number (from 0) throws std::bad_alloc; none
// does of a negative number.
void watch_allocations(int64_t refused);
// How many there were.
int64_t stop_watching();
// Those that a watch does not count, and counts again. Watched or not, they are live until freed.
void pause_watching(bool paused);
// Of all threads, watched or not: how many were not freed yet.
int64_t live_allocations();

}  // namespace jax_gluon::handlers
