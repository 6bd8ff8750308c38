#include "cpu/arm64_support.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#endif

namespace jax_gluon::cpu {

#if defined(__aarch64__) && defined(__linux__)
// Bits of the kernel's interface, by its numbers: headers of old systems lack the names.
bool has_dotprod() {
  constexpr unsigned long kDotProd = 1ul << 20;
  return (getauxval(AT_HWCAP) & kDotProd) != 0;
}

bool has_i8mm_and_bf16() {
  constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14, kAll = kI8mm | kBf16;
  return has_dotprod() && (getauxval(AT_HWCAP2) & kAll) == kAll;
}
#elif defined(__aarch64__) && defined(__APPLE__)
namespace {

// A system that does not know the name has a processor that it does not ask for.
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value != 0;
}

}  // namespace

bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }

bool has_i8mm_and_bf16() {
  return has_dotprod() && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16");
}
#else
bool has_dotprod() { return false; }
bool has_i8mm_and_bf16() { return false; }
#endif

}  // namespace jax_gluon::cpu
