// Settings of the process (softmetal.h), and the log of work.
#pragma once

#include <cstdint>
#include <string>

#include "softmetal/compiler.h"
#include "softmetal/executor.h"

namespace softmetal {

uint64_t seed();
Instrumentation instrumentation();
double time_limit();  // of a command buffer, in seconds; 0: none

// Work that this thread logs from now on belongs to another command buffer.
void begin_command_buffer();
// Adds a dispatch to the log of work.
void log_work(const std::string& kernel, const Counters& counters);

}  // namespace softmetal
