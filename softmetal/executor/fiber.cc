#include "executor/fiber.h"

#include <sys/mman.h>

#include <cstdint>

namespace softmetal {
namespace {
constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
}  // namespace

StackPool::~StackPool() {
  for (char* stack : stacks_) munmap(stack - kGuardBytes, kStackBytes + kGuardBytes);
}

char* StackPool::stack(size_t index) {
  while (stacks_.size() <= index) {
    void* memory =
        mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, kAnonymous, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    mprotect(memory, kGuardBytes, PROT_NONE);
    stacks_.push_back(static_cast<char*>(memory) + kGuardBytes);
  }
  return stacks_[index];
}

void StackPool::renew(char* stack) {
  mmap(stack, kStackBytes, PROT_READ | PROT_WRITE, kAnonymous | MAP_FIXED, -1, 0);
}

#if defined(__x86_64__)

asm(R"(
.text
.globl softmetal_switch
.type softmetal_switch, @function
softmetal_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size softmetal_switch, .-softmetal_switch
)");

void* prepare_fiber(char* stack, void (*entry)()) {
  // Aligned as at a function's first instruction: 8 bytes past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl softmetal_switch
.type softmetal_switch, @function
softmetal_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size softmetal_switch, .-softmetal_switch
)");

void* prepare_fiber(char* stack, void (*entry)()) {
  uint64_t* frame = reinterpret_cast<uint64_t*>(stack + kStackBytes - 64 - 160);
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uint64_t>(entry);  // x30
  return frame;
}

#else
#error "fibers: x86-64 and arm64 only"
#endif

}  // namespace softmetal
