// What the software device offers beyond Metal's own interface: work counters, faults, settings.
// Plain C, so that host programs, the jax_gluon plugin and Python (ctypes) can use it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Work of each dispatch since the last reset, oldest first, as a JSON array of objects with the
// fields of softmetal::Counters and "kernel". Returns the length needed, with the terminator;
// writes at most `capacity` bytes.
size_t softmetal_counters_json(char* text, size_t capacity);
void softmetal_counters_reset(void);

// Makes the device fail in a chosen way, `count` times (-1: until cleared). Also read once from
// SOFTMETAL_FAULT="name[:count][,name...]". Returns 0 for a name it does not know. Names:
//   nil_device, old_family, compile_failure, out_of_memory, command_buffer_error, watchdog,
//   slow_completion
int softmetal_inject_fault(const char* name, int count);
void softmetal_clear_faults(void);

// The order in which fibers are scheduled: 0 in order of lanes, else pseudo-random by this seed
// (SOFTMETAL_SEED).
void softmetal_set_seed(uint64_t seed);

#ifdef __cplusplus
}
#endif
