// A library of Metal host code in name alone. INTERFACE: the headers that it says it was built
// with.
#include "metal/metal.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#if defined(INTERFACE)
EXPORT const char* jax_gluon_metal_interface() { return INTERFACE; }
#endif

EXPORT const JaxGluonMetal* jax_gluon_metal() {
  static JaxGluonMetal metal = {};
  metal.device = reinterpret_cast<jax_gluon::Device*>(&metal);  // which nobody calls
  metal.why = "";
  metal.name = "a stand-in";
  return &metal;
}
