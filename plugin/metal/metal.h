// The way from the handlers to Metal.
#pragma once

#include <cstdint>
#include <string>

#include "device.h"

namespace jax_gluon {

// The Metal device, or null and why there is none. On Linux it is the software device, in
// development builds alone.
Device* metal_device(std::string* why);

// The head dims that its kernels take, of attention and of the quantizer.
constexpr int64_t kMaxHeadDimOfMetal = 256, kMaxQuantizedHeadDimOfMetal = 512;

// What `metal_device` is called: that of a real GPU, or "Software Metal". Empty where there is
// none.
std::string metal_device_name();
// The newest family of Apple's GPUs that it belongs to: "Apple7" and so on, or "none".
std::string metal_device_family();
// A digest of the shaders that it compiles.
std::string metal_shaders();

// Work of each dispatch of the software device since the last reset, as a JSON array; "[]" on a
// real GPU, which does not count.
std::string metal_counters(bool reset);

// Keeps memory as a buffer of Metal's, for all calls until it is let go; its owner keeps it alive
// and unchanged. Returns the pin's number, or 0 and why there is none.
int64_t metal_pin(const void* address, size_t bytes, std::string* why);
void metal_unpin(int64_t pin);
// How many operands of calls were read from it.
int64_t metal_pin_uses(int64_t pin);

}  // namespace jax_gluon

// What the library of Metal host code exports, where the plugin loads it at run time.
extern "C" {
struct JaxGluonMetal {
  jax_gluon::Device* device;  // null: `why` says so
  const char* why;
  const char* name;
  const char* family;
  const char* shaders;
  int64_t (*pin)(const void* address, size_t bytes, std::string* why);
  void (*unpin)(int64_t pin);
  int64_t (*pin_uses)(int64_t pin);
  size_t (*counters_json)(char* text, size_t capacity);  // null on a real GPU
  void (*counters_reset)();
};
const JaxGluonMetal* jax_gluon_metal();
// Where the two are built apart: names the headers that they share, as the library was built with
// them. All else in the library may be read only where they are the plugin's own.
const char* jax_gluon_metal_interface();
}
