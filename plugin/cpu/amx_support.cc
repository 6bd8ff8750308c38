#include "cpu/amx_support.h"

#if defined(JAX_GLUON_HAVE_AMX)
#include <cpuid.h>

#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace jax_gluon::cpu {

#if defined(JAX_GLUON_HAVE_AMX) && defined(__linux__)
namespace {

bool has_instructions() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr uint32_t kTiles = kBf16 | kTile | kInt8;
  return (edx & kTiles) == kTiles;
}

// Empty where it allows it.
const char* ask() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return "the operating system refuses AMX's tiles (arch_prctl)";
}

}  // namespace

const char* amx_refusal() {
  static const char* const refusal = has_instructions() ? ask() : "";
  return refusal;
}

bool may_use_amx() { return has_instructions() && *amx_refusal() == '\0'; }
#else
// Other systems have no such request.
const char* amx_refusal() { return ""; }
bool may_use_amx() { return false; }
#endif

}  // namespace jax_gluon::cpu
