// What the software device offers beyond Metal's own interface: work counters, faults, settings.
// Plain C, so that host programs, the jax_gluon plugin and Python (ctypes) can use it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Work of each dispatch since the last reset, oldest first, as a JSON array of objects with the
// fields of softmetal::Counters, "kernel" and "command_buffer", a number that dispatches of one
// command buffer share; at most the last 65,536. Returns the length needed,
// with the terminator; writes at most `capacity` bytes.
size_t softmetal_counters_json(char* text, size_t capacity);
void softmetal_counters_reset(void);

// Makes the device fail in a chosen way, `count` times (-1: until cleared). Also read once from
// SOFTMETAL_FAULT="name[:count][,name...]". Returns 0 for a name it does not know. Names:
//   nil_device                     MTLCreateSystemDefaultDevice returns nil
//   old_family                     a GPU without simdgroup matrices
//   old_language                   newLibraryWithSource compiles as MSL 3.0, without bfloat
//   compile_failure                newLibraryWithSource fails
//   pipeline_failure               newComputePipelineState fails
//   out_of_memory                  newBuffer returns nil
//   no_copy_refused                newBufferWithBytesNoCopy returns nil
//   command_buffer_error           a command buffer ends with an internal error
//   command_buffer_out_of_memory   a command buffer ends out of memory
//   watchdog                       a command buffer is ended by the watchdog
//   slow_completion                a command buffer completes 0.2 s late
//   hang                           a command buffer never ends
//   lost_threadgroup               a dispatch leaves out some threadgroups: finite, wrong results
int softmetal_inject_fault(const char* name, int count);
void softmetal_clear_faults(void);

// The order in which the threads of kernels are scheduled: 0 in order of lanes, else pseudo-random
// by this seed (SOFTMETAL_SEED).
void softmetal_set_seed(uint64_t seed);

// How libraries made from source from now on are compiled (SOFTMETAL_INSTRUMENT): "none",
// "counters" (bytes, products and exponentials are counted), "address", "thread" or "undefined" (a
// sanitizer, whose runtime the process must have loaded). Returns 0 for another name.
int softmetal_set_instrumentation(const char* name);

#ifdef __cplusplus
}
#endif
