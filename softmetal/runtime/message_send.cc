// objc_msgSend and its relatives: find the method in the cache of the receiver's class and jump
// there with all argument registers as they came. Offsets are those of objc_class and MethodCache
// in abi.h.
#include "softmetal/runtime/abi.h"

namespace softmetal::objc {
namespace {

[[noreturn]] void unrecognized(id receiver, SEL selector) {
  send<void>(receiver, sel_registerName("doesNotRecognizeSelector:"), selector);
  abort();
}

}  // namespace
}  // namespace softmetal::objc

static_assert(sizeof(softmetal::objc::MethodCache::Entry) == 16);

extern "C" {

[[gnu::visibility("hidden"), gnu::used]] IMP softmetal_objc_find(id receiver, SEL selector) {
  IMP method = softmetal::objc::lookup(receiver->isa, selector);
  return method ? method : reinterpret_cast<IMP>(softmetal::objc::unrecognized);
}

[[gnu::visibility("hidden"), gnu::used]] IMP softmetal_objc_find_super(const objc_super* super,
                                                                       SEL selector) {
  IMP method = softmetal::objc::lookup(super->super_class->superclass, selector);
  return method ? method : reinterpret_cast<IMP>(softmetal::objc::unrecognized);
}

[[gnu::visibility("hidden"), gnu::used]] IMP softmetal_objc_find_named_super(
    const objc_super* super, SEL selector) {
  IMP method = softmetal::objc::lookup(super->super_class, selector);
  return method ? method : reinterpret_cast<IMP>(softmetal::objc::unrecognized);
}

}  // extern "C"

#if defined(__x86_64__)

asm(R"(
.text

# Calls \finder with receiver and selector; leaves its result in %r11 and all argument registers alone.
.macro CALL_FINDER finder, receiver, selector
  pushq %rbp
  .cfi_adjust_cfa_offset 8
  .cfi_rel_offset %rbp, 0
  movq %rsp, %rbp
  subq $192, %rsp
  .cfi_adjust_cfa_offset 192
  andq $-16, %rsp
  movq %rdi, 0(%rsp)
  movq %rsi, 8(%rsp)
  movq %rdx, 16(%rsp)
  movq %rcx, 24(%rsp)
  movq %r8, 32(%rsp)
  movq %r9, 40(%rsp)
  movq %rax, 48(%rsp)
  movups %xmm0, 64(%rsp)
  movups %xmm1, 80(%rsp)
  movups %xmm2, 96(%rsp)
  movups %xmm3, 112(%rsp)
  movups %xmm4, 128(%rsp)
  movups %xmm5, 144(%rsp)
  movups %xmm6, 160(%rsp)
  movups %xmm7, 176(%rsp)
.ifc \receiver,%rsi
  movq %rsi, %rdi
  movq %rdx, %rsi
.endif
  call \finder
  movq %rax, %r11
  movq 0(%rsp), %rdi
  movq 8(%rsp), %rsi
  movq 16(%rsp), %rdx
  movq 24(%rsp), %rcx
  movq 32(%rsp), %r8
  movq 40(%rsp), %r9
  movq 48(%rsp), %rax
  movups 64(%rsp), %xmm0
  movups 80(%rsp), %xmm1
  movups 96(%rsp), %xmm2
  movups 112(%rsp), %xmm3
  movups 128(%rsp), %xmm4
  movups 144(%rsp), %xmm5
  movups 160(%rsp), %xmm6
  movups 176(%rsp), %xmm7
  leave
  .cfi_def_cfa %rsp, 8
  .cfi_same_value %rbp
.endm

.macro ENTRY name
  .globl \name
  .type \name, @function
  .p2align 4
\name:
  .cfi_startproc
.endm

.macro END_ENTRY name
  .cfi_endproc
  .size \name, . - \name
.endm

.macro SEND name, receiver, selector
ENTRY \name
  testq \receiver, \receiver
  jz 4f
  movq (\receiver), %r10
  movq 16(%r10), %r10
  movq \selector, %r11
  shrq $3, %r11
  andq (%r10), %r11
  shlq $4, %r11
  leaq 16(%r10,%r11), %r11
1:
  cmpq (%r11), \selector
  jne 2f
  jmpq *8(%r11)
2:
  cmpq $0, (%r11)
  je 3f
  addq $16, %r11
  jmp 1b
3:
  CALL_FINDER softmetal_objc_find, \receiver, \selector
  jmpq *%r11
4:
.endm

SEND objc_msgSend, %rdi, %rsi
  xorl %eax, %eax
  xorl %edx, %edx
  xorps %xmm0, %xmm0
  xorps %xmm1, %xmm1
  ret
END_ENTRY objc_msgSend

SEND objc_msgSend_stret, %rsi, %rdx
  movq %rdi, %rax
  ret
END_ENTRY objc_msgSend_stret

SEND objc_msgSend_fpret, %rdi, %rsi
  fldz
  xorl %eax, %eax
  ret
END_ENTRY objc_msgSend_fpret

SEND objc_msgSend_fp2ret, %rdi, %rsi
  fldz
  fldz
  ret
END_ENTRY objc_msgSend_fp2ret

.macro SEND_SUPER name, finder, super, selector
ENTRY \name
  CALL_FINDER \finder, \super, \selector
  movq (\super), \super
  jmpq *%r11
END_ENTRY \name
.endm

SEND_SUPER objc_msgSendSuper2, softmetal_objc_find_super, %rdi, %rsi
SEND_SUPER objc_msgSendSuper2_stret, softmetal_objc_find_super, %rsi, %rdx
SEND_SUPER objc_msgSendSuper, softmetal_objc_find_named_super, %rdi, %rsi
SEND_SUPER objc_msgSendSuper_stret, softmetal_objc_find_named_super, %rsi, %rdx
)");

#elif defined(__aarch64__)

asm(R"(
.text

.macro CALL_FINDER finder
  stp x29, x30, [sp, #-16]!
  .cfi_adjust_cfa_offset 16
  .cfi_rel_offset x29, 0
  .cfi_rel_offset x30, 8
  mov x29, sp
  .cfi_def_cfa x29, 16
  sub sp, sp, #208
  stp x0, x1, [sp, #0]
  stp x2, x3, [sp, #16]
  stp x4, x5, [sp, #32]
  stp x6, x7, [sp, #48]
  str x8, [sp, #64]
  stp q0, q1, [sp, #80]
  stp q2, q3, [sp, #112]
  stp q4, q5, [sp, #144]
  stp q6, q7, [sp, #176]
  bl \finder
  mov x17, x0
  ldp x0, x1, [sp, #0]
  ldp x2, x3, [sp, #16]
  ldp x4, x5, [sp, #32]
  ldp x6, x7, [sp, #48]
  ldr x8, [sp, #64]
  ldp q0, q1, [sp, #80]
  ldp q2, q3, [sp, #112]
  ldp q4, q5, [sp, #144]
  ldp q6, q7, [sp, #176]
  mov sp, x29
  ldp x29, x30, [sp], #16
  .cfi_def_cfa sp, 0
  .cfi_restore x29
  .cfi_restore x30
.endm

.globl objc_msgSend
.type objc_msgSend, %function
.p2align 4
objc_msgSend:
  .cfi_startproc
  cbz x0, 4f
  ldr x16, [x0]
  ldr x16, [x16, #16]
  ldr x17, [x16]
  and x17, x17, x1, lsr #3
  add x17, x16, x17, lsl #4
  add x17, x17, #16
1:
  ldar x16, [x17]
  cmp x16, x1
  b.ne 2f
  ldr x16, [x17, #8]
  br x16
2:
  cbz x16, 3f
  add x17, x17, #16
  b 1b
3:
  CALL_FINDER softmetal_objc_find
  br x17
4:
  mov x0, #0
  mov x1, #0
  movi d0, #0
  movi d1, #0
  movi d2, #0
  movi d3, #0
  ret
  .cfi_endproc
.size objc_msgSend, . - objc_msgSend

.macro SEND_SUPER name, finder
.globl \name
.type \name, %function
.p2align 4
\name:
  .cfi_startproc
  CALL_FINDER \finder
  ldr x0, [x0]
  br x17
  .cfi_endproc
.size \name, . - \name
.endm

SEND_SUPER objc_msgSendSuper2, softmetal_objc_find_super
SEND_SUPER objc_msgSendSuper, softmetal_objc_find_named_super
)");

#else
#error "objc_msgSend is written for x86-64 and aarch64"
#endif
