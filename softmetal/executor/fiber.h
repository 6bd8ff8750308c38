// Fibers: stacks of their own, and a switch between them that saves what the calling convention
// asks a function to keep.
#pragma once

#include <cstddef>
#include <vector>

namespace softmetal {

// Bytes of a fiber's stack, and of those below it that can't be touched: whole pages of any system.
// Kernels are compiled so that they touch every page of a large frame.
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kGuardBytes = size_t{64} << 10;

// Stacks that are used again; they are unmapped with the pool.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  // The lowest usable byte of stack `index`; null where there is no memory.
  char* stack(size_t index);
  // Gives a stack fresh pages: ThreadSanitizer takes what an earlier fiber wrote there for a race.
  static void renew(char* stack);

 private:
  std::vector<char*> stacks_;
};

// A stack pointer to switch to: `entry` starts there, and never returns.
void* prepare_fiber(char* stack, void (*entry)());

}  // namespace softmetal

// Saves the running fiber's stack pointer in *from and goes on where `to` was saved.
extern "C" void softmetal_switch(void** from, void* to);
