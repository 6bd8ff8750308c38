// The command buffers of a call.
#pragma once

#import <Metal/Metal.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings.h"
#include "metal/buffers.h"
#include "metal/context.h"

namespace jax_gluon::metal {

// What the slots of a kernel are bound to. A slot that nothing was given for is bound to memory
// that no kernel uses.
class Bindings {
 public:
  Bindings(Context& context, Buffers& buffers, int slots);

  void read(int slot, const void* address, size_t bytes);
  void write(int slot, void* address, size_t bytes);
  void scratch(int slot, size_t bytes);
  // A copy, of what may change or end before the kernel runs.
  void copy(int slot, const void* address, size_t bytes);

  void encode(id<MTLComputeCommandEncoder> encoder) const;

 private:
  struct Slot {
    Buffers::Range range;
    std::vector<unsigned char> bytes;  // instead, if it is not empty
  };
  Context& context_;
  Buffers& buffers_;
  std::vector<Slot> slots_;
};

// Kernels run in the order in which they are dispatched, in one command buffer, but for work of
// more than Context::products_of_a_command_buffer() multiply-accumulates: the GPU's watchdog would
// end it, so it is cut into several.
class Commands {
 public:
  explicit Commands(Context& context) : context_(context) {}
  Commands(const Commands&) = delete;
  Commands& operator=(const Commands&) = delete;
  // Waits for what was committed: it uses the caller's memory.
  ~Commands();

  // A kernel whose `grid` makes `products` multiply-accumulates, in equal shares. Where it is cut,
  // `parameters.first_group` says which threadgroup each part begins with.
  void dispatch(id<MTLComputePipelineState> pipeline, Bindings& bindings,
                AttentionParameters parameters, MTLSize grid, int64_t products);
  // One that is not cut, its parameters bound.
  void dispatch(id<MTLComputePipelineState> pipeline, const Bindings& bindings, MTLSize grid);

  // The names of what was dispatched, each as it is noted.
  void note(const std::string& name) { names_ += (names_.empty() ? "" : ", ") + name; }
  const std::string& names() const { return names_; }

  // Returns when all have ended; throws what the first failure was.
  void run();

 private:
  void encode(id<MTLComputePipelineState> pipeline, const Bindings& bindings, MTLSize grid,
              int64_t products);
  void commit();

  Context& context_;
  std::vector<id<MTLCommandBuffer>> committed_;
  id<MTLCommandBuffer> current_ = nil;
  int64_t products_ = 0;  // of the current one
  std::string names_;
};

}  // namespace jax_gluon::metal
