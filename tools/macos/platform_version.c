// What `@available` calls; Xcode's clang has it in libclang_rt.osx.a.
#include <stdint.h>

struct Version {
  uint32_t platform, version;
};
_Bool _availability_version_check(uint32_t count, struct Version versions[]);

int32_t __isPlatformVersionAtLeast(uint32_t platform, uint32_t major, uint32_t minor,
                                   uint32_t subminor) {
  struct Version version = {platform, major << 16 | (minor & 0xff) << 8 | (subminor & 0xff)};
  return _availability_version_check(1, &version);
}
