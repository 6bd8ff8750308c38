// Faults that a test asks for (softmetal_inject_fault, SOFTMETAL_FAULT).
#pragma once

namespace softmetal {

enum class Fault {
  kNilDevice,            // MTLCreateSystemDefaultDevice returns nil
  kOldFamily,            // a GPU without simdgroup matrices
  kOldLanguage,          // newLibraryWithSource compiles as MSL 3.0, without bfloat
  kCompileFailure,       // newLibraryWithSource fails
  kPipelineFailure,      // newComputePipelineState fails
  kOutOfMemory,          // newBuffer returns nil
  kNoCopyRefused,        // newBufferWithBytesNoCopy returns nil
  kCommandBufferError,   // a command buffer ends with an internal error
  kCommandBufferMemory,  // a command buffer ends out of memory
  kWatchdog,             // a command buffer is ended by the watchdog
  kSlowCompletion,       // a command buffer completes 0.2 s late
  kHang,                 // a command buffer never ends
  kLostThreadgroup,      // a dispatch leaves out its last threadgroups, and says nothing
  kCount,
};

// True as often as the fault was asked for.
bool fault(Fault fault);

}  // namespace softmetal
