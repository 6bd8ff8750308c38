// Says what the loader makes of the library of Metal host code that it was compiled with.
#include <cstdio>

#include "metal/metal.h"

int main() {
  std::string why;
  const bool is_found = jax_gluon::metal_device(&why) != nullptr;
  std::printf("%s%s\n", is_found ? "found " : "",
              (is_found ? jax_gluon::metal_device_name() : why).c_str());
  return 0;
}
