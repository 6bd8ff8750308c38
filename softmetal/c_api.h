// The compiler and the executor as plain C, for callers that load this library at run time
// (Python's ctypes) and for the command-line program. What host programs use is Metal's own
// interface.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "softmetal/executor.h"

extern "C" {

// The compiler's settings. Null texts stand for the defaults.
struct softmetal_compile_request {
  const char* source;
  const char* name;                 // what diagnostics call the text
  const char* macros;               // lines NAME=VALUE
  const char* include_directories;  // one a line
  const char* output;
  const char* target;
  int instrumentation;
  int safe_math;
  uint32_t language_version;  // 0x30001 is MSL 3.1; 0: the newest
};

// Returns 0 and the image's path, or 1 and the diagnostics, in `text`.
int softmetal_compile(const softmetal_compile_request* request, char* text, size_t capacity);

// The same of the strict check of address spaces: 0, or 1 and the diagnostics.
int softmetal_check(const softmetal_compile_request* request, char* text, size_t capacity);

// One function constant: by name where it has one.
struct softmetal_constant {
  const char* name;
  uint32_t index;
  uint32_t size;
  const void* value;
};

// Null and a message in `text` where it fails.
void* softmetal_image_open(const char* path, const softmetal_constant* constants, uint32_t count,
                           char* text, size_t capacity);
void softmetal_image_close(void* image);

// What the image declares, as JSON: kernels with their arguments, function constants. Returns the
// length needed, with the terminator.
size_t softmetal_image_json(void* image, char* text, size_t capacity);

struct softmetal_dispatch_request {
  const char* kernel;
  void* const* buffers;         // [31], null: not bound
  const uint64_t* lengths;      // [31]
  const uint32_t* threadgroup;  // [31], bytes
  uint32_t grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t grid_in_threads;
  uint32_t workers;
  uint64_t seed;
  double time_limit;
};

// 0, or 1 and a message in `text`, 2 where the time limit was passed.
int softmetal_dispatch(void* image, const softmetal_dispatch_request* request,
                       softmetal::Counters* counters, char* text, size_t capacity);
}
