// Whether a Metal device computes what the CPU does: GPUs, drivers and compilers of shaders are
// known that give finite wrong numbers.
#pragma once

#include <string>

#include "device.h"

namespace jax_gluon {

struct MetalVerdict {
  bool passed = false;
  std::string why;          // of a device that did not pass
  bool remembered = false;  // from an earlier process
  std::string file;         // where it is kept; empty where it is not
};

// Whether the device is tested before it is used: where calls may go to it by default, or on a Mac.
// JAX_GLUON_METAL_SELF_TEST=0: never.
bool tests_metal();

// Runs each kind of matrix on both devices, once in a process, and compares. What came out is kept
// in the cache folder for this device, system and package; `again` does not read it. Other threads
// wait. Ends after JAX_GLUON_METAL_SELF_TEST_SECONDS, or 120: a device that hangs did not pass.
MetalVerdict metal_verdict(bool again);

// Nothing where `device` may be used; else why it may not.
Status refusal_of_metal();

// What is run: small problems whose results are compared. Nothing, or what is wrong.
Status compare_devices(Device& metal, Device& cpu);

}  // namespace jax_gluon
