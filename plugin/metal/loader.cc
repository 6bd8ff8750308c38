// Finds the library of Metal host code. A development build on Linux knows where it is built; other
// builds for Linux leave it out.
#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

#include "metal/metal.h"

namespace jax_gluon {
namespace {

struct Loaded {
  const JaxGluonMetal* metal = nullptr;
  std::string why;
};

Loaded load() {
#if defined(JAX_GLUON_METAL_LIBRARY)
  // Its symbols stay its own; it is never unloaded, since its threads may run to the end.
  void* library = dlopen(JAX_GLUON_METAL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = dlerror();
    return {nullptr, "the software Metal device is not built (" +
                         std::string(error ? error : "unknown error") +
                         "); \"make metal\" builds it, with clang 19"};
  }
  using Entry = const JaxGluonMetal* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "jax_gluon_metal"));
  if (!entry) return {nullptr, std::string(JAX_GLUON_METAL_LIBRARY) + " is not jax_gluon's"};
  // The plugin may have been built since, or before, with other structs.
  using Interface = const char* (*)();
  const auto interface = reinterpret_cast<Interface>(dlsym(library, "jax_gluon_metal_interface"));
  if (!interface || std::string(interface()) != JAX_GLUON_METAL_INTERFACE) {
    return {nullptr, std::string(JAX_GLUON_METAL_LIBRARY) +
                         " is of another version than this plugin; \"make metal\" builds it anew "
                         "(\"make test\" both), and Python has to be started again"};
  }
  const JaxGluonMetal* metal = entry();
  if (!metal->device) return {nullptr, metal->why};
  return {metal, ""};
#elif defined(__APPLE__)
  const JaxGluonMetal* metal = jax_gluon_metal();
  if (!metal->device) return {nullptr, metal->why};
  return {metal, ""};
#else
  return {nullptr, "this build of jax_gluon has no Metal kernels"};
#endif
}

// A failure is looked at again: the library may be built, or the device come, while we run.
Loaded loaded() {
  static std::mutex& mutex = *new std::mutex;
  static Loaded& kept = *new Loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!kept.metal) kept = load();
  return kept;
}

}  // namespace

Device* metal_device(std::string* why) {
  const Loaded found = loaded();
  if (found.metal) return found.metal->device;
  if (why) *why = found.why;
  return nullptr;
}

std::string metal_device_name() {
  const Loaded found = loaded();
  return found.metal ? found.metal->name : "";
}

std::string metal_device_family() {
  const Loaded found = loaded();
  return found.metal ? found.metal->family : "";
}

std::string metal_shaders() {
  const Loaded found = loaded();
  return found.metal ? found.metal->shaders : "";
}

int64_t metal_pin(const void* address, size_t bytes, std::string* why) {
  const Loaded found = loaded();
  if (found.metal) return found.metal->pin(address, bytes, why);
  *why = found.why;
  return 0;
}

void metal_unpin(int64_t pin) {
  if (const Loaded found = loaded(); found.metal) found.metal->unpin(pin);
}

int64_t metal_pin_uses(int64_t pin) {
  const Loaded found = loaded();
  return found.metal ? found.metal->pin_uses(pin) : 0;
}

std::string metal_counters(bool reset) {
  const Loaded found = loaded();
  if (!found.metal || !found.metal->counters_json) return "[]";
  std::vector<char> text(found.metal->counters_json(nullptr, 0));
  // Another dispatch may end in between.
  for (size_t needed;
       (needed = found.metal->counters_json(text.data(), text.size())) > text.size();) {
    text.resize(needed);
  }
  if (reset) found.metal->counters_reset();
  return text.data();
}

}  // namespace jax_gluon
