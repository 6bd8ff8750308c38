// The GPU: libraries, pipelines and command buffers.
#pragma once

#import <Metal/Metal.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "metal/archive.h"
#include "metal/error.h"
#include "metal/pins.h"

namespace jax_gluon::metal {

// Function constants, all ints, by index.
using Constants = std::map<uint32_t, int>;

class Context {
 public:
  // Throws Error where there is no GPU, or one without simdgroup matrices.
  Context();

  id<MTLDevice> device() const { return device_; }

  // Of kernel `name` in shaders/`stem`.metal. Compiled once for each set of constants, by whichever
  // thread asks first.
  id<MTLComputePipelineState> pipeline(const std::string& stem, const std::string& name,
                                       const Constants& constants);

  // Whether this GPU's compiler has kernel `name`: those of bfloat need MSL 3.1.
  bool has_kernel(const std::string& stem, const std::string& name);

  id<MTLCommandBuffer> command_buffer();
  // Throws what went wrong in a command buffer that has ended.
  static void check(id<MTLCommandBuffer> commands);
  // Multiply-accumulates that a command buffer may be given: JAX_GLUON_METAL_COMMAND_PRODUCTS, else
  // 2^40.
  int64_t products_of_a_command_buffer() const { return products_of_a_command_buffer_; }

  id<MTLBuffer> scratch(size_t bytes);

  Pins& pins() { return pins_; }

 private:
  id<MTLLibrary> library(const std::string& stem);

  id<MTLDevice> device_;
  id<MTLCommandQueue> queue_;
  int64_t products_of_a_command_buffer_ = int64_t{1} << 40;
  std::mutex mutex_;
  std::unique_ptr<Archive> archive_;
  Pins pins_;
  std::map<std::string, id<MTLLibrary>> libraries_;
  std::map<std::pair<std::string, Constants>, id<MTLComputePipelineState>> pipelines_;
};

}  // namespace jax_gluon::metal
